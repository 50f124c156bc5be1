# Each target calls `setup`, which makes .venv with everything the others use.
PYTHON ?= python3
VENV ?= .venv
# processes that run tests; each file stays in one, in the order of their names: those of few long tests are not left for last
JOBS ?= 2
BIN := $(VENV)/bin
# our own tree first: a virtual environment may be shared between checkouts
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: setup demo test test-arm test-camera test-nvidia bench soak check fuzz clean

setup: $(VENV)/.stamp

$(VENV)/.stamp: constraints.txt pyproject.toml setup.py $(shell find edgekit/kernels edgekit/backends/native -name '*.cpp' -o -name '*.h')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel pybind11 torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[build,openvino,sign,torch,mcap,dev]'
	touch $@

$(VENV)/.stamp-tracking: $(VENV)/.stamp tools/tracking.txt
	$(BIN)/python -m pip install -q --no-deps -r tools/tracking.txt
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup $(VENV)/.stamp-tracking
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not clock"
	$(BIN)/python -m pytest tests -m clock

test-arm: setup
	PYTHON=$(BIN)/python bash tools/arm/test.sh

test-camera: setup
	PYTHON=$(BIN)/python bash tools/camera/host.sh
	PYTHON=$(BIN)/python bash tools/camera/test.sh

test-nvidia: setup
	PYTHON=$(BIN)/python bash tools/nvidia/test.sh

bench: setup
	$(BIN)/python benchmarks/run.py

soak: setup
	$(BIN)/python tools/soak.py

fuzz: setup
	$(BIN)/python tools/fuzz.py
	$(BIN)/python tools/fuzz_native.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist runs

#!/usr/bin/env bash
# make test-nvidia: compiles the CUDA kernels with NVIDIA's NVRTC and parses and builds every Jetson payload with
# NVIDIA's own builder, without a GPU.
#   PYTHON             an environment with edgekit's toolchain (default: .venv/bin/python, else python3)
#   NVIDIA_VENV        where NVIDIA's builder is installed, kept between runs (default: .venv/nvidia)
#   NVIDIA_REQUIRED=1  a builder that cannot be had is a failure instead of a skip
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
VENV=${NVIDIA_VENV:-.venv/nvidia}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

skip() {
    echo "test-nvidia: SKIPPED: $1"
    [ "${NVIDIA_REQUIRED:-0}" = 1 ] && exit 1
    exit 0
}

STAMP=$VENV/.stamp-$(cat tools/nvidia/requirements.txt constraints.txt | sha256sum | cut -c1-16)
if [ ! -e "$STAMP" ]; then
    echo "test-nvidia: installing NVIDIA's builder (about 100 MB) into $VENV"
    rm -rf "$VENV"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install -q -r tools/nvidia/requirements.txt >"$WORK/pip.log" 2>&1 ||
        skip "tensorrt_rtx cannot be installed: $(grep -i '^error' "$WORK/pip.log" | tail -n 1)"
    "$VENV/bin/python" -m pip install -q -c constraints.txt onnx onnx-ir numpy pytest hypothesis
    touch "$STAMP"
fi
"$VENV/bin/python" -c 'import tensorrt_rtx as trt; print("test-nvidia: tensorrt_rtx", trt.__version__)' ||
    skip "tensorrt_rtx does not load on this machine"

echo "== CUDA kernels for Orin and Thor"
"$VENV/bin/python" tools/nvidia/kernels.py

echo "== tests marked nvidia"
# only their own files: the small environment lacks what others import
mapfile -t FILES < <(grep -lE 'mark\.nvidia' tests/test_*.py)
"$VENV/bin/python" -m pytest -m nvidia "${FILES[@]}"

TARGETS=$("$PYTHON" - <<'PY'
from edgekit.target import Target

boards = [Target.load(n) for n in Target.names() if n != "host"]
print(",".join(b.name for b in boards if "tensorrt" in b.backends))
PY
)
[ -n "$TARGETS" ] || { echo "test-nvidia: no board has the backend tensorrt"; exit 1; }

SHARED=${EDGEKIT_SHARED:-../shared}
MODELS=()
for app in apps/*/edgekit.toml; do
    [ -e "$app" ] && MODELS+=("$app")
done
[ ${#MODELS[@]} -gt 0 ] || echo "test-nvidia: no apps/*/edgekit.toml to build"
if [ -d "$SHARED/data/models" ]; then
    MODELS+=("$SHARED/data/models/yolox_nano/yolox_nano.onnx" "$SHARED/data/models/fastestdet/FastestDet.onnx")
else
    echo "test-nvidia: no $SHARED/data: YOLOX-nano and FastestDet are not checked"
fi
for precision in float16 float32; do
    # float16 is what these boards run by default; float32 is the same network on each
    boards=$TARGETS
    [ "$precision" = float32 ] && boards=${TARGETS%%,*}
    for model in ${MODELS[@]+"${MODELS[@]}"}; do
        echo "== build $model at $precision for $boards"
        # what is checked is what NVIDIA says of the payloads, not how good they are
        few=""
        [[ $model == apps/* ]] && few="--limit 4 --allow-drop"
        # shellcheck disable=SC2086
        "$PYTHON" -m edgekit build "$model" --target "$boards" --precision "$precision" $few --out "$WORK/$precision" \
            >"$WORK/build.log" 2>&1 || { cat "$WORK/build.log"; exit 1; }
    done
done

# int8: where Q/DQ is placed does not depend on how ranges are found, so a few pictures and plain ranges do for
# the large ones; the app's detector goes through the search once, with its repairs
INT8=()
for app in apps/*/edgekit.toml; do
    scheme=minmax
    [[ $app == apps/detect/* ]] && scheme=""
    INT8+=("$app" "$scheme" "--limit 8")
done
if [ -d "$SHARED/data/models" ]; then
    mkdir "$WORK/pictures"
    # no `head`: it may leave before `sort` has written all, and pipefail takes that for a failure
    mapfile -t PICTURES < <(find "$SHARED/data/coco_mini/train" -name '*.jpg' | sort)
    cp "${PICTURES[@]:0:8}" "$WORK/pictures/"
    for name in yolox_nano/yolox_nano fastestdet/FastestDet; do
        INT8+=("$SHARED/data/models/$name.onnx" "minmax" "--calibration $WORK/pictures")
    done
fi
for ((i = 0; i < ${#INT8[@]}; i += 3)); do
    model=${INT8[i]} scheme=${INT8[i + 1]} options=${INT8[i + 2]}
    echo "== build $model at int8${scheme:+, ranges by $scheme,} for $TARGETS"
    # shellcheck disable=SC2086
    "$PYTHON" -m edgekit build "$model" --target "$TARGETS" --precision int8 ${scheme:+--quantization $scheme} \
        $options --allow-drop --out "$WORK/int8" >"$WORK/build.log" 2>&1 || { cat "$WORK/build.log"; exit 1; }
done

echo "== check for 8.6 (Orin) and 12.0 (Thor)"
mapfile -t BUNDLES < <(find "$WORK" -name '*.edge' | sort)
[ ${#BUNDLES[@]} -gt 0 ] || { echo "test-nvidia: nothing was built"; exit 1; }
"$VENV/bin/python" tools/nvidia/check.py --cc 8.6 12.0 -- "${BUNDLES[@]}"

"""tools/nvidia/check.py on the workstation: what it says of operands. NVIDIA's builder is asked in make test-nvidia."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgekit.backends.tensorrt.plan import BuildPlan, Hardware, SparseLayers
from tests.helpers import load_script
from tests.tensorrt_graphs import qdq

check = load_script("tools/nvidia/check.py", "nvidia_check")


def item(floats: int | None) -> object:
    return check.Candidate("x", b"", BuildPlan((), (), 1 << 20, Hardware("any", "8.7")), floats)


def test_both_operands_are_counted() -> None:
    def counted(**changed: bool) -> tuple[int, int, int]:
        found: tuple[int, int, int] = check.quantized(check.load(qdq(**changed).SerializeToString(), "x"))
        return found

    assert counted() == (1, 0, 1)
    assert counted(activation=False) == counted(weight=False) == (0, 1, 1)
    assert counted(activation=False, weight=False) == (0, 0, 1)


@pytest.mark.parametrize(
    ("floats", "counts", "words"),
    [
        (6, (107, 0, 113), ""),
        (None, (0, 0, 113), ""),  # float payloads, and models of which nothing is known
        (6, (106, 1, 113), "1 products have one quantized operand only"),
        (6, (106, 0, 113), "expected 107"),
        (113, (0, 0, 113), "without any product in INT8"),
    ],
)
def test_an_int8_payload_is_held_to_its_plan(
    floats: int | None, counts: tuple[int, int, int], words: str
) -> None:
    said = check.problem(item(floats), *counts)
    assert words in said and bool(said) == bool(words)


def test_floats_are_those_that_the_evidence_names() -> None:
    rows = [{"op": "Conv"}, {"op": "Sigmoid"}, {"op": "Gemm"}]
    assert check.left_in_float({"quantization": {"integer": {"tensorrt": {"float": rows}}}}) == 2


def test_sparse_layers_are_those_of_the_plan() -> None:
    plan = item(None).plan  # type: ignore[attr-defined]
    told = replace(plan, sparse_weights=True, sparse=SparseLayers("2:4", ("a", "b"), {}))
    assert not check.sparse_problem(check.Candidate("x", b"", plan), 1)  # a board that cannot skip zeros
    assert not check.sparse_problem(check.Candidate("x", b"", told), 2)
    said = check.sparse_problem(check.Candidate("x", b"", told), 1)
    assert said == "1 layers are 2:4 sparse, its plan says 2"

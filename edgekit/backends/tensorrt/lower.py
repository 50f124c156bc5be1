"""Toolchain half: from a graph to a strongly typed ONNX and the plan by which a Jetson compiles it.

Nothing is compiled here: an engine fits only the GPU, the number of SMs and the TensorRT release that
built it, so the device does that at the first load (`engine`, `docs/tensorrt.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgekit.backends.base import Payload, Ports
from edgekit.backends.tensorrt.float16 import to_float16
from edgekit.backends.tensorrt.lint import dtype_name, lint, summary
from edgekit.backends.tensorrt.plan import MIN_TENSORRT, BuildPlan, Hardware, Io, SparseLayers, parse_version
from edgekit.errors import LoweringError
from edgekit.passes.graph import constant, new_weight
from edgekit.quant import qdq, sparsity
from edgekit.quant.annotate import quant, state_codes
from edgekit.quant.rules import WEIGHTED, rules_for, weight
from edgekit.spec import DType, QuantParams, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.target import Target

PRECISIONS = ("float16", "float32", "int8")
MAX_IR_VERSION = 10


def lower(
    model: ir.Model, target: Target, precision: str, ranges: Mapping[str, float] | None = None
) -> tuple[Payload, ...]:
    """One payload: `model` at `precision` for the GPU of `target`; `model` is not changed.

    Graph inputs and outputs keep their names and types. At float16 the body is float16 with explicit Casts;
    `ranges` (value name -> largest absolute activation) keeps nodes out of it that would overflow. int8 takes
    a model annotated by `quant.placement.place`: explicit Q/DQ, the rest as at float16; states are int8 codes.
    Raises: LoweringError, one line with every reason, when TensorRT on that board cannot run the graph;
    UsageError for int8 without annotations.
    """
    from onnx_ir.passes import common

    from edgekit.passes import compact

    what = f"network for {target.name}"
    if precision not in PRECISIONS:
        known = f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        raise LoweringError(f"{what}: precision {precision!r} is not supported by tensorrt, expected {known}")
    release = _release(target)
    assert target.gpu is not None

    codes: dict[str, QuantParams] = {}
    if precision == "int8":
        codes = state_codes(model)
        ranges = {**magnitudes(model), **(ranges or {})}
        model = qdq.lowered(_without_half(model), rules_for("tensorrt", target), target.name)
        _read_exact(model)
    else:
        model = model.clone()
    for step in (
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.ShapeInferencePass(),
        common.RemoveUnusedNodesPass(),
    ):
        model = step(model).model
    # judged with the user's own node names first; types once more after the conversion
    _refuse(model, target, release, what)
    unknown = [str(v.name) for node in model.graph for v in node.outputs if v.uses() and not dtype_name(v)]
    if unknown:  # the conversion goes by types, and would leave these as they are
        raise LoweringError(
            f"{what}: types of {', '.join(unknown[:5])} cannot be inferred. Check the model file"
        )
    sparse = sparse_layers(model, target)  # with the user's names; float16 makes no zero into another number
    kept = None
    if precision != "float32":
        kept = to_float16(model, ranges)
        _refuse(model, target, release, what)
    plan = BuildPlan(
        inputs=tuple(_io(v, what) for v in model.graph.inputs),
        outputs=tuple(_io(v, what) for v in model.graph.outputs),
        workspace_bytes=workspace_bytes(target),
        hardware=_hardware(target),
        # nodes that a float16 body keeps in float32 are there for their range, which TF32 has too
        tf32=precision != "float32",
        kept_float32=kept,
        sparse_weights=sparse is not None,
        sparse=sparse,
    )
    compact.run(model)
    return (
        Payload(
            backend="tensorrt",
            precision=precision,
            format="onnx",
            data=_serialize(model),
            inputs=tuple(_spec(io, codes) for io in plan.inputs),
            outputs=tuple(_spec(io, codes) for io in plan.outputs),
            options={**plan.to_options(), **Ports(codes=codes).to_options()},
        ),
    )


def _without_half(model: ir.Model) -> ir.Model:
    """A copy in which products that read floats have float weights: a search gave them back, their weights
    still carry what a repair chose."""
    model = model.clone()
    for node in model.graph:
        value = weight(node) if node.op_type in WEIGHTED else None
        if value is None or quant(value) is None or quant(node.inputs[0]) is not None:
            continue
        numbers = constant(value)
        assert numbers is not None, "weights are constants"
        own = new_weight(model.graph, f"{value.name}.of.{node.outputs[0].name}", numbers)
        node.replace_input_with(list(node.inputs).index(value), own)
    return model


def _read_exact(model: ir.Model) -> None:
    """Products in float read a value before its Q/DQ, which is there for other readers."""
    for node in model.graph:
        if node.op_type not in WEIGHTED:
            continue
        sources = [None if v is None else v.producer() for v in node.inputs[:2]]
        first, second = (s is not None and s.op_type == "DequantizeLinear" for s in sources)
        if first and not second:
            codes = sources[0].inputs[0] if sources[0] is not None else None
            quantize = codes.producer() if codes is not None else None
            if quantize is not None and quantize.op_type == "QuantizeLinear":
                node.replace_input_with(0, quantize.inputs[0])


def sparse_layers(model: ir.Model, target: Target) -> SparseLayers | None:
    """The 2:4 sparse layers of `model`, None where there are none or the GPU cannot skip their zeros."""
    if target.gpu is None or not target.gpu.sparse_2_4:
        return None
    rows = sparsity.layers(model)
    if not any(row.sparse for row in rows):
        return None
    dense = {row.id: row.reason for row in rows if not row.sparse}
    return SparseLayers("2:4", tuple(row.id for row in rows if row.sparse), dense)


def magnitudes(model: ir.Model) -> dict[str, float]:
    """Value name -> largest absolute number of its codes, of every annotated activation."""
    found: dict[str, float] = {}
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        params = quant(value)
        if params is not None:
            # before and behind the pair that `quant.qdq` puts there
            found[str(value.name)] = found[f"{value.name}.real"] = 128 * params.scale[0]
    return found


def workspace_bytes(target: Target) -> int:
    """Scratch memory that compiling and running may take: an eighth of the memory that a Jetson's CPU and GPU
    share, at most 4 GiB (TensorRT's own default is all of it)."""
    return min(target.dram_bytes // 8, 4 << 30)


def _serialize(model: ir.Model) -> bytes:
    import onnx_ir as ir

    # the newest format that the ONNX 1.16 inside TensorRT 10.0 to 10.5 knows
    model.ir_version = min(model.ir_version or MAX_IR_VERSION, MAX_IR_VERSION)
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _release(target: Target) -> str:
    """The oldest usable TensorRT that the board's system images carry."""
    if target.gpu is None:
        raise LoweringError(
            f"target {target.name}: has no GPU, which tensorrt needs. Use backend onnxruntime"
        )
    known = {s.tensorrt for s in target.software if s.tensorrt}
    usable = sorted((v for v in known if parse_version(v) >= parse_version(MIN_TENSORRT)), key=parse_version)
    if known and not usable:
        newest = max(known, key=parse_version)
        raise LoweringError(
            f"target {target.name}: its newest system image carries TensorRT {newest}, "
            f"expected {MIN_TENSORRT} or newer. Use backend onnxruntime"
        )
    return usable[0] if usable else MIN_TENSORRT


def _refuse(model: ir.Model, target: Target, release: str, what: str) -> None:
    assert target.gpu is not None
    findings = lint(model, release, target.gpu.compute_capability)
    if findings:
        raise LoweringError(f"{what}: TensorRT {release} cannot run it: {summary(findings)}")


def _hardware(target: Target) -> Hardware:
    gpu = target.gpu
    assert gpu is not None
    modes = {
        f"{m.name} ({m.config})" if m.config else m.name: m.gpu_sms
        for m in target.power_modes
        if m.gpu_sms is not None
    }
    return Hardware(gpu.name, gpu.compute_capability, gpu.check_capability, gpu.sms, modes or None)


def _io(value: ir.Value, what: str) -> Io:
    name = dtype_name(value)
    if name not in DType.__members__ or value.shape is None or not value.shape.is_static():
        raise LoweringError(
            f"{what}: tensor {value.name!r} is {name or 'of unknown type'} of shape {value.shape}, "
            "expected a known type and fixed sizes"
        )
    return Io(str(value.name), name, tuple(int(d) for d in value.shape if isinstance(d, int)))


def _spec(io: Io, codes: Mapping[str, QuantParams]) -> TensorSpec:
    layout = "NCHW" if len(io.shape) == 4 else ""
    return TensorSpec(io.name, DType(io.dtype), io.shape, layout, codes.get(io.name))

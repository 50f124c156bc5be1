"""Low rank: layers become chains of smaller ones (compression.lowrank), where the target is faster for it.

It pays for large kernels over many channels and for large Linear layers, on CPUs more than on GPUs, which like few
large layers. Which kind: "auto" takes what loses least on the network's own inputs. Cited in compression/lowrank.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from edgekit.compression import latency, lowrank, lowrank_plan
from edgekit.compression.lowrank import KINDS
from edgekit.compression.lowrank_plan import Choice, Cost
from edgekit.compression.work import Work
from edgekit.errors import UsageError

RULES = ("latency", "random", "energy", "evbmf", "noise", "ratio")
AUTO = ("data", "spatial", "tucker")


@dataclass(frozen=True)
class Options:
    """kind: of chain, "auto" = the best of data, spatial and tucker, layer by layer.

    ranks: "latency" = candidates that are cheaper than their layer, chosen to make the whole network `speedup` times
    cheaper at the least error, or each the cheapest whose outputs err by at most `error` (squared, over their
    variance); "random" = the control: of the same candidates, drawn until they save the same; or a rule for every
    layer: "energy" (`value`: share of squares kept), "evbmf", "noise" (a threshold), "ratio" (`value`: of its weights).
    A rule's ranks are taken only where they are cheaper, too.
    cost: "macs", "target" (cost model of the board) or "" = target where there is one. granularity: ranks are multiples
    of it, 0 = the target's. layers: by name, none = all but heads. random_factors: factors are drawn instead of taken
    from the weights (a control). batches: for the moments that kind "data" needs. steps, lr: of the fine-tuning, lr
    None = a tenth of what suits from scratch; cp needs a small one.
    """

    kind: Literal["auto", "svd", "data", "spatial", "tucker", "cp"] = "auto"
    ranks: Literal["latency", "random", "energy", "evbmf", "noise", "ratio"] = "latency"
    speedup: float = 0.0
    error: float = 0.05
    value: float = 0.9
    cost: Literal["", "macs", "target"] = ""
    granularity: int = 0
    layers: tuple[str, ...] = ()
    random_factors: bool = False
    batches: int = 4
    steps: int = 300
    lr: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("kind", (*KINDS, "auto")), ("ranks", RULES), ("cost", ("", "macs", "target"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(filter(None, known))}, got {getattr(self, name)!r}"
                )
        if self.speedup and not self.speedup > 1:
            raise ValueError(f"speedup must be above 1, or 0 for an error budget, got {self.speedup:g}")
        for name in ("error", "value"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name):g}")
        if self.ranks == "random" and not self.speedup:
            raise ValueError(
                "ranks must be another one, or speedup given: random ranks save as much as chosen ones"
            )
        if min(self.granularity, self.steps) < 0 or self.batches < 1:
            raise ValueError("granularity and steps must be at least 0, batches at least 1")
        if self.lr is not None and not 0 < self.lr <= 10:
            raise ValueError(f"lr must be above 0 and at most 10, got {self.lr:g}")


def run(work: Work, options: Options) -> None:
    """Replace layers of `work.model` by chains and fine-tune. Raises: UsageError for a layer that is not there, or a
    speedup that no candidates reach."""
    cost, whole, unit = _costs(work, options)
    before = whole()
    found: list[Mapping[str, object]] = work.remember(
        "chosen", lambda: [asdict(c) for c in _chosen(work, options, cost, before)]
    )
    chosen = [Choice(**{**each, "ranks": tuple(each["ranks"])}) for each in found]  # type: ignore[arg-type]
    names = [c.layer for c in chosen if c.kind == "data"]
    moments = lowrank.observe(work.model, names, _inputs(work, options.batches)) if names else {}
    random = torch.Generator().manual_seed(work.seed) if options.random_factors else None
    dropped = []
    for each in chosen:
        layer = work.model.get_submodule(each.layer)
        assert isinstance(layer, lowrank.Layer)
        chain = lowrank.decompose(layer, each.kind, each.ranks, moments.get(each.layer), random)
        lowrank.replace(work.model, each.layer, chain)
        dropped += [
            name
            for name in (f"{each.layer}.weight", f"{each.layer}.bias")
            if work.masks.pop(name, None) is not None
        ]
    facts = {
        "unit": unit,
        "before": before,
        "after": whole(),
        "layers": found,
        "masks_dropped": dropped,
    }
    if options.steps and chosen:
        facts["decomposed"] = work.metric("decomposed")
        work.train(options.steps, lr=options.lr)
    work.facts[work.stage] = facts


def _inputs(work: Work, batches: int) -> list[torch.Tensor]:
    return [work.problem.batch(step)[0] for step in range(batches)]


def _chosen(work: Work, options: Options, cost: Cost, total: float) -> list[Choice]:
    kinds = AUTO if options.kind == "auto" else (options.kind,)
    model = work.model
    unknown = sorted(set(options.layers) - {name for name, _ in model.named_modules()})
    if unknown:
        raise UsageError(
            f"layer {unknown[0]!r}: not in the network. Name one of its convolutions or Linear layers"
        )
    fit = lowrank_plan.eligible(model, kinds, work.problem.head, options.layers)
    inputs = _inputs(work, options.batches)
    moments = lowrank.observe(model, fit, inputs) if "data" in kinds else {}
    seen = lowrank_plan.look(
        model, list(fit), work.problem.example, inputs[0][: lowrank_plan.PICTURES], moments
    )
    step = options.granularity or latency.granularity(work.target, work.precision)
    if options.ranks not in ("latency", "random"):
        made = [
            lowrank_plan.by_rule(name, each, fit[name], options.ranks, options.value, step, cost)
            for name, each in seen.items()
        ]
        return [c for c in made if c is not None]
    choices = {}
    for i, (name, each) in enumerate(seen.items()):
        choices[name] = [
            c for kind in fit[name] for c in lowrank_plan.candidates(name, each, kind, step, cost)
        ]
        work.progress(f"{work.stage}.candidates", i + 1, len(seen))
    if not options.speedup:
        return list(lowrank_plan.within(choices, options.error).values())
    saving = total * (1 - 1 / options.speedup)
    picked = lowrank_plan.choose(choices, saving)
    if picked is None:
        most = sum(max((c.dense - c.cost for c in each), default=0.0) for each in choices.values())
        raise UsageError(
            f"speedup {options.speedup:g}: low rank of kind {options.kind} reaches {total / (total - most):.2f} at most. "
            "Give a smaller one, or prune first"
        )
    if options.ranks == "random":
        picked = lowrank_plan.shuffled(choices, lowrank_plan.saved(picked), work.seed)
    return [picked[name] for name in seen if name in picked]


def _costs(work: Work, options: Options) -> tuple[Cost, Callable[[], float], str]:
    """(of a layer, of the whole network now, unit)."""
    target = work.target
    if options.cost == "macs" or (target is None and options.cost != "target"):
        example = tuple(work.problem.example.shape)
        return lowrank_plan.macs_cost, lambda: lowrank_plan.macs_cost(work.model, example), "macs"
    if target is None:
        raise UsageError("cost 'target': no target given. Name a board, or use cost = \"macs\"")

    def whole() -> float:
        return latency.estimator(work.model, work.problem.write, target)(work.precision).total_s

    return lowrank_plan.estimated_cost(target, work.precision), whole, "s"

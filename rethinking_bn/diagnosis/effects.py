"""How much the model's output changes with the statistics that its BN-like layers use."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rethinking_bn.diagnosis.distance import exact_statistics
from rethinking_bn.diagnosis.record import DiagnosedLayer, Record, Statistics
from rethinking_bn.diagnosis.result import LIMITS, Finding, make, severity_of, worse
from rethinking_bn.distributed import all_gather_object, get_world_size, raise_together
from rethinking_bn.layers.bn_like import communicates

Output = Callable[[Any], Any]
Choice = dict[str, Statistics | str]  # by layer: statistics, or "batch"; others keep the stored
Outputs = Sequence[list[Tensor] | None]  # of each batch; None: the model refused what came out

# where detectors have the raw outputs of their heads, by the names torchvision and detectron2 use
_HEADS = (
    "head",
    "rpn.head",
    "proposal_generator.rpn_head",
    "roi_heads.box_predictor",
    "roi_heads.mask_predictor",
    "roi_heads.mask_head.predictor",
    "roi_heads.keypoint_predictor",
)
_PROPOSALS = ("rpn", "proposal_generator")
_CHANGE = LIMITS["output-effect"]
# of all layers, from stored to exact and from exact to mini-batch statistics
_TO_EXACT, _TO_BATCH = (0.1, 0.3, math.inf), (0.5, 1.0, math.inf)
_CHANCE = 3.0  # times what half of the batches gives
_WORST = 8  # layers whose own effect is measured
_BY_BATCH = ("repeated-use", "dependent-samples", "small-batch")  # felt in mini-batches
_UNGATED = ("non-finite", "impossible-variance", "output-effect")


class Effects:
    """Runs a model on a few batches with other statistics, and compares what comes out.

    The output of one of torchvision's or detectron2's detectors is what its heads return before
    boxes are decoded, for the region proposals of the first choice throughout: then rows of two
    choices are the same regions. ``run`` takes the i-th batch always with the same random numbers;
    ``restore`` puts the model's state back.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[DiagnosedLayer], batches: Sequence[Any],
        run: Callable[[int, Any], Any], restore: Callable[[], None], output: Output | None,
        group: ProcessGroup | None,
    ) -> None:  # fmt: skip
        self.model, self.layers, self.batches = model, layers, batches
        self.run, self.restore, self.output, self.group = run, restore, output, group
        self.heads: list[nn.Module] = []
        self.proposer: nn.Module | None = None
        self.reference: Outputs = ()
        if output is None and hasattr(model, "backbone"):
            modules = dict(model.named_modules())
            self.heads = [modules[name] for name in _HEADS if name in modules]
            self.proposer = next((modules[n] for n in _PROPOSALS if n in modules), None)
        self._proposals: dict[int, Any] = {}

    def outputs(self, choice: Choice, count: int) -> Outputs:
        """Return the output tensors of each of the first batches, on the CPU in float64.

        None where the model raised a FloatingPointError, as detectron2's does for boxes that are
        not finite. Other errors fail all ranks, but where these wait within the forward.
        """
        result: list[list[Tensor] | None] = []
        error: Exception | None = None
        waits = False
        try:
            for index, batch in enumerate(self.batches[:count]):
                self.restore()
                with ExitStack() as stack:
                    for layer in self.layers:
                        stack.enter_context(_using(layer, choice.get(layer.name)))
                    waits = waiting_ranks(self.model, self.group)
                    seen = stack.enter_context(self._raw_outputs(index))
                    try:
                        returned = self.run(index, batch)
                    except FloatingPointError:
                        if waits:
                            raise
                        result.append(None)
                        continue
                if self.output is not None:
                    seen = [self.output(returned)]
                chosen = _tensors_in(seen or [returned])
                result.append([t.detach().cpu().double() for t in chosen])
        except Exception as raised:
            if waits:
                raise
            error = raised
        raise_together(error, self.group)
        return result

    @contextmanager
    def _raw_outputs(self, index: int) -> Iterator[list[Any]]:
        """Collect what the heads return, for the same proposals whenever it is this batch."""
        seen: list[Any] = []

        def same(module: nn.Module, args: Any, out: Any) -> Any:
            # copies: RoI heads add to what they are given
            kept = self._proposals.setdefault(index, copy.deepcopy(out))
            return copy.deepcopy(kept)

        with ExitStack() as stack:
            for head in self.heads:
                stack.enter_context(
                    head.register_forward_hook(lambda m, args, out: seen.append(out))
                )
            if self.proposer is not None:
                stack.enter_context(self.proposer.register_forward_hook(same))
            yield seen

    def change(self, one: Outputs, other: Outputs) -> float | None:
        """Return the change of the output in units of the reference's spread, over all ranks.

        The root mean square over output tensors of equal shapes; infinite where one is not finite
        or the model refused; None for none. A single number, such as a loss, is its own spread.
        """
        sums: dict[int, tuple[float, float]] = {}
        for before, after, normal in zip(one, other, self.reference, strict=False):
            if before is None or after is None or normal is None:
                sums[0] = (math.inf, math.inf)
                continue
            for index, (a, b, r) in enumerate(zip(before, after, normal, strict=False)):
                if a.shape == b.shape == r.shape:
                    spread = r - r.mean() if r.numel() > 1 else r
                    change, size = sums.get(index, (0.0, 0.0))
                    change += float((a - b).square().sum())
                    sums[index] = change, size + float(spread.square().sum())
        parts = all_gather_object(sums, self.group)
        ratios = []
        for index in sorted({index for part in parts for index in part}):
            found = [part[index] for part in parts if index in part]
            change, size = (sum(values) for values in zip(*found, strict=True))
            if not math.isfinite(change) or not math.isfinite(size):
                return math.inf
            if size > 0:
                ratios.append(change / size)
        return math.sqrt(sum(ratios) / len(ratios)) if ratios else None

    def all_finite(self, outputs: Outputs) -> bool:
        """Return whether every rank's outputs are finite."""
        finite = all(b is not None and all(bool(t.isfinite().all()) for t in b) for b in outputs)
        return all(all_gather_object(finite, self.group))


def waiting_ranks(model: nn.Module, group: ProcessGroup | None) -> bool:
    """Return whether ranks wait for each other in a forward, in the modes that hold now."""
    return get_world_size(group) > 1 and any(
        module.training and communicates(module) for module in model.modules()
    )


@contextmanager
def _using(layer: DiagnosedLayer, chosen: Statistics | str | None) -> Iterator[None]:
    if chosen == "batch":
        layer.normalise_by_batch()
        # MABN's training state is more than buffers
        with layer.state_untouched() if layer.mean_square else nullcontext():
            yield
        return
    layer.normalise_by_population()
    if isinstance(chosen, tuple) and not layer.by_batch:
        layer.about.write_statistics(*chosen)
    yield


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors in what a model returns, in its order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def output_effects(
    effects: Effects, records: dict[str, Record], targets: dict[str, Record],
    findings: list[Finding],
) -> list[Finding]:  # fmt: skip
    """Return the findings and those about the output; what hardly changes it is less severe."""
    layers = {layer.name: layer for layer in effects.layers}
    used = [n for n, x in layers.items() if x.stored is not None and not x.by_batch]
    used = [n for n in used if records[n].uses]
    exact: Choice = {n: exact_statistics(layers[n], records[n]) for n in used}
    half: Choice = {n: exact_statistics(layers[n], records[n], "even") for n in used}
    by_batch: Choice = {n: "batch" for n, layer in layers.items() if not layer.frozen}
    forwards = max(r.forwards for r in records.values()) // get_world_size(effects.group)
    count = min(len(effects.batches), max(2, forwards // 12))
    as_stored, as_exact, as_half, mixed = (
        effects.outputs(choice, count) for choice in ({}, exact, half, {**exact, **by_batch})
    )
    # the unit is the spread of what training sees, where frozen layers keep what they store
    frozen = any(layer.frozen for layer in layers.values())
    trained = effects.outputs(by_batch, count) if frozen else mixed
    effects.reference = trained if effects.all_finite(trained) else as_exact
    to_exact = effects.change(as_stored, as_exact)
    chance = effects.change(as_exact, as_half)
    to_batch = effects.change(as_exact, mixed)
    if to_exact is None or chance is None or to_batch is None:
        return findings
    # the noise of a moving average of usual momentum is chance, too
    usual = [min(layers[n].momentum or 0.0, 0.1) for n in used if not layers[n].frozen]
    m = max(usual, default=0.0)
    chance *= math.sqrt(1 + forwards * m / (2 - m))
    findings = [*findings, _together(to_exact, to_batch, chance, count)]

    each = max(1, count // 2)
    # where the stored statistics of all layers give nothing finite, from the exact ones instead
    sound = math.isfinite(to_exact)
    singles: dict[str, dict[str, float]] = {}
    for finding in sorted(findings, key=lambda f: f.rank):
        name = finding.layer
        if finding.severity == "ok" or not name or name in singles or len(singles) == _WORST:
            continue
        found = [f for f in findings if f.layer == name and f.severity != "ok"]
        asked = {_felt(f.kind) for f in found}
        if name not in exact:
            asked &= {"exact_to_batch"}
        others = {} if sound else {n: s for n, s in exact.items() if n != name}
        before = as_stored[:each] if sound else effects.outputs(others, each)
        base, alone = before, {}
        for key in sorted(asked, reverse=True):  # to the target, to exact, from exact to batch
            chosen: Statistics | str = "batch"
            if key != "exact_to_batch":
                seen = targets if key == "stored_to_target" else records
                chosen = exact_statistics(layers[name], seen[name])
            after = effects.outputs({**others, name: chosen}, each)
            alone[key] = effects.change(base, after)
            base = after if key == "stored_to_exact" else before
        singles[name] = {key: value for key, value in alone.items() if value is not None}
    bounds = {"stored_to_exact": to_exact, "exact_to_batch": max(to_exact, to_batch)}
    findings = [_gated(f, singles.get(f.layer, {}), bounds) for f in findings]
    return findings + [_single(name, found, each) for name, found in singles.items()]


def _together(to_exact: float, to_batch: float, chance: float, batches: int) -> Finding:
    certain = not to_exact <= _CHANCE * chance
    severity = severity_of(to_exact, _TO_EXACT) if certain else "ok"
    by_batch = severity_of(to_batch, _TO_BATCH)
    what = (
        f"with all layers on exact statistics in place of the stored ones, the output changes by "
        f"{to_exact:.2f} of its spread (chance: {chance:.2f}); from there to mini-batch ones, by "
        f"{to_batch:.2f}"
    )
    return make(
        "output-effect", "", by_batch if worse(by_batch, severity) else severity, what, to_exact,
        stored_to_exact=to_exact, exact_to_batch=to_batch, chance=chance, batches=batches,
    )  # fmt: skip


def _felt(kind: str) -> str:
    """Return which change of the output tells whether a finding of a kind matters."""
    if kind in _BY_BATCH:
        return "exact_to_batch"
    return "stored_to_target" if kind == "domain-shift" else "stored_to_exact"


def _single(name: str, changes: dict[str, float], batches: int) -> Finding:
    effect = changes.get("stored_to_exact", 0.0)
    parts = [f"{value:.2f} from {key.replace('_to_', ' to ')}" for key, value in changes.items()]
    what = f"this layer alone changes the output by {', '.join(parts) or 'nothing comparable'}"
    severity = severity_of(effect, _CHANGE)
    return make("output-effect", name, severity, what, effect, **changes, batches=batches)


def _gated(finding: Finding, alone: dict[str, float], bounds: dict[str, float]) -> Finding:
    """Add the output's change to a finding; what changes the output too little is less severe."""
    if finding.kind in _UNGATED or finding.severity == "ok":
        return finding
    key = _felt(finding.kind)
    change = alone.get(key)
    size = bounds.get(key, math.inf) if change is None else change
    severity = finding.severity
    for name, limit in (("severe", _CHANGE[1]), ("warning", _CHANGE[0])):
        if severity == name and size < limit:
            severity = "warning" if name == "severe" else "note"
    if change is None:
        return dataclasses.replace(finding, severity=severity)
    if severity == "note" and key != "exact_to_batch" and change >= _CHANGE[1]:
        severity = "warning"
    what = f"{finding.what}; alone, it changes the output by {change:.2f} of its spread"
    evidence = {**finding.evidence, "output_change": change}
    return dataclasses.replace(finding, severity=severity, evidence=evidence, what=what)

"""How much the model's output changes with the statistics that its BN-like layers use."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from rethinking_bn.diagnosis.distance import exact_statistics
from rethinking_bn.diagnosis.judge import make, rank, severity_of
from rethinking_bn.diagnosis.record import Record, Statistics
from rethinking_bn.diagnosis.result import LIMITS, SEVERITIES, Finding
from rethinking_bn.distributed import all_gather_object, get_world_size, raise_together

if TYPE_CHECKING:
    from rethinking_bn.diagnosis.examine import Session

Output = Callable[[Any], Any]
Choice = dict[str, Statistics | Literal["batch"]]  # by layer; the others use what they store
Outputs = Sequence[list[Tensor] | None]  # of each batch; None: the model refused what came out

# where detectors have the raw outputs of their heads, by the names torchvision and detectron2 use
_ROI = ("box_predictor", "mask_predictor", "mask_head.predictor", "keypoint_predictor")
_HEADS = ("head", "rpn.head", "proposal_generator.rpn_head", *(f"roi_heads.{n}" for n in _ROI))
_PROPOSALS = ("rpn", "proposal_generator")
_CHANGE = LIMITS["output-effect"]
# of all layers, from stored to exact and from exact to mini-batch statistics
_TO_EXACT, _TO_BATCH = (0.1, 0.3, math.inf), (0.5, 1.0, math.inf)
_CHANCE = 3.0  # times what half of the batches gives
_WORST = 8  # layers whose own effect is measured
# which change of the output tells whether a finding matters; of other kinds from stored to exact
_FELT = dict.fromkeys(("repeated-use", "dependent-samples", "small-batch"), "exact_to_batch")
_FELT["domain-shift"] = "stored_to_target"
_UNGATED = ("non-finite", "impossible-variance", "output-effect")


@dataclass
class Effects:
    """Runs a model on a few batches with other statistics, and compares what comes out.

    The output of one of torchvision's or detectron2's detectors is what its heads return before
    boxes are decoded, for the region proposals of the first choice throughout: then rows of two
    choices are the same regions. ``reference`` is the output whose spread is the unit.
    """

    session: Session
    batches: Sequence[Any]
    output: Output | None
    reference: Outputs = ()
    _proposals: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, self.group = self.session.model, self.session.group
        detects = self.output is None and hasattr(model, "backbone")
        modules = dict(model.named_modules()) if detects else {}
        self.heads = [modules[name] for name in _HEADS if name in modules]
        self.proposers = [modules[name] for name in _PROPOSALS if name in modules]

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
                self.session.restore()
                with ExitStack() as stack:
                    for layer in self.session.layers:
                        stack.enter_context(layer.using(choice.get(layer.name)))
                    waits = self.session.ranks_wait()
                    seen = stack.enter_context(self._raw_outputs(index))
                    try:
                        returned = self.session.run_again(index, batch)
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

        def see(module: nn.Module, args: Any, out: Any) -> None:
            seen.append(out)

        with ExitStack() as stack:
            for modules, hook in ((self.heads, see), (self.proposers[:1], same)):
                for module in modules:
                    stack.enter_context(module.register_forward_hook(hook))
            yield seen

    def change(self, one: Outputs, other: Outputs) -> float | None:
        """Return the change of the output in units of the reference's spread, over all ranks.

        The root mean square over output tensors of equal shapes; infinite where one is not finite
        or the model refused; None for none. A single number, such as a loss, is its own spread.
        """
        found: list[tuple[int, float, float]] = []
        for before, after, normal in zip(one, other, self.reference, strict=False):
            if before is None or after is None or normal is None:
                found.append((0, math.inf, math.inf))
                continue
            for index, (a, b, r) in enumerate(zip(before, after, normal, strict=False)):
                if a.shape == b.shape == r.shape:
                    spread = r - r.mean() if r.numel() > 1 else r
                    changed, size = (a - b).square().sum(), spread.square().sum()
                    found.append((index, float(changed), float(size)))
        totals: dict[int, tuple[float, float]] = {}
        for index, change, size in itertools.chain(*all_gather_object(found, self.group)):
            before_it = totals.get(index, (0.0, 0.0))
            totals[index] = before_it[0] + change, before_it[1] + size
        if not all(map(math.isfinite, itertools.chain(*totals.values()))):
            return math.inf
        ratios = [change / size for change, size in totals.values() if size > 0]
        return math.sqrt(sum(ratios) / len(ratios)) if ratios else None


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
    layers = {layer.name: layer for layer in effects.session.layers}
    stores = [n for n, layer in layers.items() if layer.stored is not None and not layer.by_batch]
    used = [n for n in stores if records[n].uses]
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
    effects.reference = trained
    if effects.change(trained, trained) == math.inf:
        effects.reference = as_exact
    to_exact = effects.change(as_stored, as_exact)
    chance = effects.change(as_exact, as_half)
    to_batch = effects.change(as_exact, mixed)
    if to_exact is None or chance is None or to_batch is None:
        return findings
    # the noise of a moving average of usual momentum is chance, too
    m = max((min(layers[n].momentum or 0.0, 0.1) for n in used if n in by_batch), default=0.0)
    chance *= math.sqrt(1 + forwards * m / (2 - m))
    findings = [*findings, _together(to_exact, to_batch, chance, count)]

    each = max(1, count // 2)
    # where the stored statistics of all layers give nothing finite, from the exact ones instead
    sound = math.isfinite(to_exact)
    loud = sorted((f for f in findings if f.severity != "ok" and f.layer), key=rank)
    changes: dict[str, dict[str, float]] = {}
    for name in list(dict.fromkeys(f.layer for f in loud))[:_WORST]:
        asked = {_FELT.get(f.kind, "stored_to_exact") for f in loud if f.layer == name}
        if name not in exact:
            asked &= {"exact_to_batch"}
        others = {} if sound else {n: s for n, s in exact.items() if n != name}
        base = before = as_stored[:each] if sound else effects.outputs(others, each)
        changes[name] = {}
        for key in sorted(asked, reverse=True):  # to the target, to exact, from exact to batch
            chosen: Statistics | Literal["batch"] = "batch"
            if key != "exact_to_batch":
                seen = targets if key == "stored_to_target" else records
                chosen = exact_statistics(layers[name], seen[name])
            after = effects.outputs({**others, name: chosen}, each)
            if (change := effects.change(base, after)) is not None:
                changes[name][key] = change
            base = after if key == "stored_to_exact" else before
    bounds = {"stored_to_exact": to_exact, "exact_to_batch": max(to_exact, to_batch)}
    findings = [_gated(f, changes.get(f.layer, {}), bounds) for f in findings]
    for name, alone in changes.items():
        parts = [f"{value:.2f} from {key.replace('_to_', ' to ')}" for key, value in alone.items()]
        what = f"this layer alone changes the output by {', '.join(parts) or 'nothing comparable'}"
        evidence: dict[str, Any] = {**alone, "batches": each}
        effect = alone.get("stored_to_exact", 0.0)
        findings.append(make("output-effect", name, effect, what, **evidence))
    return findings


def _together(to_exact: float, to_batch: float, chance: float, batches: int) -> Finding:
    certain = not to_exact <= _CHANCE * chance
    severity = severity_of(to_exact, _TO_EXACT) if certain else "ok"
    by_batch = severity_of(to_batch, _TO_BATCH)
    severity = max(severity, by_batch, key=SEVERITIES.index)
    what = (
        f"with all layers on exact statistics in place of the stored ones, the output changes by "
        f"{to_exact:.2f} of its spread (chance: {chance:.2f}); from there to mini-batch ones, by "
        f"{to_batch:.2f}"
    )
    return make(
        "output-effect", "", to_exact, what, severity=severity,
        stored_to_exact=to_exact, exact_to_batch=to_batch, chance=chance, batches=batches,
    )  # fmt: skip


def _gated(finding: Finding, alone: dict[str, float], bounds: dict[str, float]) -> Finding:
    """Add the output's change to a finding; what changes the output too little is less severe."""
    severity, key = finding.severity, _FELT.get(finding.kind, "stored_to_exact")
    if finding.kind in _UNGATED or severity == "ok":
        return finding
    size = alone.get(key, bounds.get(key, math.inf))
    if severity == "severe" and size < _CHANGE[1]:
        severity = "warning"
    if severity == "warning" and size < _CHANGE[0]:
        severity = "note"
    if key not in alone:
        return dataclasses.replace(finding, severity=severity)
    if severity == "note" and key != "exact_to_batch" and size >= _CHANGE[1]:
        severity = "warning"
    what = f"{finding.what}; alone, it changes the output by {size:.2f} of its spread"
    evidence = {**finding.evidence, "output_change": size}
    return dataclasses.replace(finding, severity=severity, evidence=evidence, what=what)

"""How much the model's output changes with the statistics its BN-like layers use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from rethinking_bn.diagnosis.layers import DiagnosedLayer, Statistics
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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of several values in what a model returns, in its order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors_in(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


class Variants:
    """Runs a model on a few batches with other statistics, and compares what comes out.

    The output of one of torchvision's or detectron2's detectors is what its heads return before
    boxes are decoded, for the region proposals of the first variant throughout: then rows of two
    variants are the same regions.

    Args:
        model: in the modes and state that every variant starts from.
        layers: of the model.
        batches: of this rank.
        run: runs the model on the i-th batch, always with the same random numbers.
        restore: puts the model's state back, but for modes of ``layers``.
        output: turns what the model returns into tensors; None: the tensors in it, or a
            detector's raw outputs.
        ranks: that run the model.

    Attributes:
        waits: whether ranks wait for each other in the forwards of the variant that runs, so that
            one that ends before its end must fail.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[DiagnosedLayer],
        batches: Sequence[Any],
        run: Callable[[int, Any], Any],
        restore: Callable[[], None],
        output: Output | None,
        ranks: int,
    ) -> None:
        self.ranks, self.waits = ranks, False
        self.model, self.layers, self.batches = model, list(layers), list(batches)
        self.run, self.restore, self.output = run, restore, output
        self.heads: list[nn.Module] = []
        self.proposer: nn.Module | None = None
        if output is None and hasattr(model, "backbone"):
            modules = dict(model.named_modules())
            self.heads = [modules[name] for name in _HEADS if name in modules]
            self.proposer = next((modules[n] for n in _PROPOSALS if n in modules), None)
        self._proposals: dict[int, Any] = {}

    def __call__(self, choice: Choice, batches: int) -> Outputs:
        """Return the output tensors of each of the first batches, on the CPU in float64.

        None where the model raised a FloatingPointError, as detectron2's proposal generator does
        for boxes that are not finite, unless other ranks wait within that very forward.
        """
        result: list[list[Tensor] | None] = []
        for index, batch in enumerate(self.batches[:batches]):
            self.restore()
            with ExitStack() as stack:
                for layer in self.layers:
                    chosen = choice.get(layer.name)
                    if chosen == "batch":
                        layer.normalise_by_batch()
                        if layer.mean_square:  # its training state is more than buffers
                            stack.enter_context(layer.state_untouched())
                    else:
                        layer.normalise_by_population()
                        if chosen is not None and not layer.by_batch:
                            layer.write(chosen)  # type: ignore[arg-type]
                self.waits = self.ranks > 1 and any(
                    module.training and communicates(module) for module in self.model.modules()
                )
                seen: list[Any] = stack.enter_context(self._raw_outputs())
                stack.enter_context(self._same_proposals(index))
                try:
                    returned = self.run(index, batch)
                except FloatingPointError:
                    if self.waits:
                        raise
                    result.append(None)
                    continue
            if self.output is not None:
                seen = [self.output(returned)]
            elif not seen:
                seen = [returned]
            result.append([t.detach().cpu().double() for t in tensors_in(seen)])
        return result

    @contextmanager
    def _raw_outputs(self) -> Iterator[list[Any]]:
        seen: list[Any] = []
        handles = [
            head.register_forward_hook(lambda m, args, out: seen.append(out)) for head in self.heads
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _same_proposals(self, index: int) -> Iterator[None]:
        if self.proposer is None:
            yield
            return

        def replace(module: nn.Module, args: Any, out: Any) -> Any:
            # copies: RoI heads add to what they are given
            kept = self._proposals.setdefault(index, copy.deepcopy(out))
            return copy.deepcopy(kept)

        handle = self.proposer.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


Sums = dict[int, tuple[float, float]]  # by output tensor: squared changes, squared spread


def squared_changes(one: Outputs, other: Outputs, reference: Outputs) -> Sums:
    """Return per output tensor the sum of squared differences, and ``reference``'s spread.

    Tensors whose shapes differ are left out: they are not about the same things. A single number,
    such as a loss, has itself for a spread. What a model refused is infinitely far.
    """
    sums: Sums = {}
    for before, after, normal in zip(one, other, reference, strict=False):
        if before is None or after is None or normal is None:
            sums[0] = (math.inf, math.inf)
            continue
        for index, (a, b, r) in enumerate(zip(before, after, normal, strict=False)):
            if not a.shape == b.shape == r.shape:
                continue
            spread = r - r.mean() if r.numel() > 1 else r
            change, size = sums.get(index, (0.0, 0.0))
            change += float((a - b).square().sum())
            sums[index] = change, size + float(spread.square().sum())
    return sums


def relative_change(parts: Sequence[Sums]) -> float | None:
    """Return the change of the output in units of its spread, over all ranks' sums.

    The root mean square over output tensors; infinite where one is not finite; None where nothing
    could be compared.
    """
    ratios = []
    for index in sorted({index for part in parts for index in part}):
        found = [part[index] for part in parts if index in part]
        change, spread = (sum(values) for values in zip(*found, strict=True))
        if not math.isfinite(change) or not math.isfinite(spread):
            return math.inf
        if spread > 0:
            ratios.append(change / spread)
    return math.sqrt(sum(ratios) / len(ratios)) if ratios else None

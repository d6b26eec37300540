"""What a norm adds to a training step of the RetinaNet head."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from benchmarks.contenders import FPN_SIZES, TOY_SIZES, make_levels
from benchmarks.options import Options, missing
from benchmarks.result import Result
from benchmarks.timing import Step, alternate, spread

if TYPE_CHECKING:
    from benchmarks.retinanet_heads import HeadSize

_OURS, _OURS_4, _OURS_NONE = "ours, row 1", "ours, row 4", "ours, no norm"
_THEIRS, _NONE = "detectron2, BN", "detectron2, no norm"


def run(options: Options) -> Result:
    """Compare; see the module. Levels as R50-FPN has at 800 x 1344, batch 2.

    On a CPU batch 1, a quarter of the channels and few classes: a step of the full head takes it
    half a minute.
    """
    result = Result("head")
    reason = missing("detectron2")
    if reason:
        result.skip("everything", reason)
        return result
    with warnings.catch_warnings():
        # detectron2 uses what recent versions of torch deprecate
        warnings.filterwarnings("ignore", category=FutureWarning)
        from benchmarks.retinanet_heads import HeadSize

        size = options.pick(
            quick=HeadSize(8, 1, 2, 1), cpu=HeadSize(64, 4, 4, 9), cuda=HeadSize(256)
        )
        _compare(result, size, options)
    return result


def _compare(result: Result, size: HeadSize, options: Options) -> None:
    from benchmarks.head_check import check_heads, output_gradients
    from benchmarks.retinanet_heads import ConcatenatedHead, detectron2_head, head_step, our_head

    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES, cuda=FPN_SIZES)
    images = options.pick(quick=2, cpu=1, cuda=2)
    features = make_levels(sizes, size.channels, images=images, device=options.device).xs
    heads = {
        _NONE: detectron2_head(size),
        _OURS_NONE: our_head(size, None),
        _OURS: our_head(size, 1),
        _OURS_4: our_head(size, 4),
        _THEIRS: detectron2_head(size, "BN"),
    }
    for head in heads.values():
        head.to(options.device)
    one_image = [x[:1] for x in features]
    for name, other_name, other in (
        (_OURS_4, _THEIRS, heads[_THEIRS]),
        (_OURS, "levels concatenated", ConcatenatedHead(heads[_OURS])),
    ):
        pair = f"{name} = {other_name}"
        result.checks[pair] = check_heads(pair, heads[name], other, one_image)
    dys = output_gradients(heads[_NONE], features)

    def stepper(head: nn.Module) -> Step:
        return lambda: head_step(head, features, dys)

    steps = {name: stepper(head) for name, head in heads.items()}
    times = alternate(steps, options.device, options.plan(24.0))
    for name, without, case in (
        (_OURS, _OURS_NONE, "added by the norm, each head less itself without one"),
        (_OURS, _NONE, "added over detectron2's head without norm"),
        (_OURS_4, _OURS_NONE, "added by the norm, each head less itself without one"),
    ):
        added, beside = _difference(times, name, without), _difference(times, _THEIRS, _NONE)
        # A round's difference may be noise: no ratio unless both sides' are well above 0.
        typical = spread(beside)
        told = min(typical.low, spread(added).low) > 0
        paired = [value / typical.median for value in added] if told else []
        result.measure(case, (name, added), (_THEIRS, beside), paired=paired)
    for name in (_OURS, _OURS_4, _THEIRS, _OURS_NONE):
        result.measure("whole step", (name, times[name]), (_NONE, times[_NONE]))
    result.notes.append(
        f"head: {size}, features {[tuple(x.shape) for x in features]}; detectron2 runs level by "
        "level, ours layer by layer, which statistics over levels need: the step without norm "
        "shows what that alone costs"
    )


def _difference(times: dict[str, list[float]], name: str, without: str) -> list[float]:
    return [a - b for a, b in zip(times[name], times[without], strict=True)]

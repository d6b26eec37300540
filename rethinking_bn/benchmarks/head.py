"""What a norm adds to a training step of the RetinaNet head, in time and in memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .contenders import FPN_SIZES, TOY_SIZES, make_levels
from .equality import require_equal, require_equal_state, tolerance_of
from .optional import missing
from .options import Options
from .result import Result
from .targets import target
from .timing import Step, alternate, spread

if TYPE_CHECKING:
    from .retinanet_heads import HeadSize

_OURS, _OURS_4, _THEIRS, _NONE = "ours, row 1", "ours, row 4", "detectron2, BN", "no norm"


def run(options: Options) -> Result:
    """Compare; see the module. Levels as R50-FPN has at 800 x 1344, batch 2.

    A quarter of the channels and few classes on a CPU: a full head takes it half a minute a step.
    """
    result = Result("head")
    reason = missing("detectron2")
    if reason:
        result.skip("everything", reason)
        return result
    with warnings.catch_warnings():
        # detectron2 uses what recent versions of torch deprecate
        warnings.filterwarnings("ignore", category=FutureWarning)
        from .full_config import add_full_config
        from .head_memory import add_memory
        from .retinanet_heads import HeadSize

        size = options.pick(
            quick=HeadSize(8, 1, 2, 1), cpu=HeadSize(64, 4, 4, 9), cuda=HeadSize(256)
        )
        _compare(result, size, options)
        add_memory(result, size, options)
        add_full_config(result, options)
    return result


def _compare(result: Result, size: HeadSize, options: Options) -> None:
    from .retinanet_heads import ConcatenatedHead, detectron2_head, head_step, our_head

    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES, cuda=FPN_SIZES)
    features = make_levels(sizes, size.channels, device=options.device).xs
    heads = {
        _NONE: detectron2_head(size),
        _OURS: our_head(size, 1),
        _OURS_4: our_head(size, 4),
        _THEIRS: detectron2_head(size, "BN"),
    }
    for head in heads.values():
        head.to(options.device)
    generator = torch.Generator().manual_seed(2)
    dys = [
        torch.randn(y.shape, generator=generator).to(options.device)
        for y in _outputs(heads[_NONE], features)
    ]
    _check(result, _OURS_4, heads[_OURS_4], _THEIRS, heads[_THEIRS], features, dys)
    concatenated = ConcatenatedHead(heads[_OURS])
    _check(result, _OURS, heads[_OURS], "concatenated", concatenated, features, dys)

    def stepper(head: nn.Module) -> Step:
        return lambda: head_step(head, features, dys)

    steps = {name: stepper(head) for name, head in heads.items()}
    times = alternate(steps, options.device, options.plan(30.0))
    added = {
        name: [a - b for a, b in zip(times[name], times[_NONE], strict=True)]
        for name in (_OURS, _OURS_4, _THEIRS)
    }
    # A round's difference may be noise: no ratio is given unless the alternative's is well above 0.
    told = spread(added[_THEIRS]).low > 0
    other = spread(added[_THEIRS]).median
    goal = target("head norm / detectron2", options.device)
    for name in (_OURS, _OURS_4):
        ratios = [value / other for value in added[name]] if told else []
        pair = [(side, added[side]) for side in (name, _THEIRS)]
        result.measure("added by the norm", pair[0], pair[1], target=goal, paired=ratios)
        goal = None
    for name in (_OURS, _OURS_4, _THEIRS):
        pair = [(side, times[side]) for side in (name, _NONE)]
        result.measure("whole step", pair[0], pair[1])
    result.notes.append(f"head: {size}, features {[tuple(x.shape) for x in features]}")


def _outputs(head: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    from .retinanet_heads import head_forward

    with torch.no_grad():
        return head_forward(head, features)


def _check(
    result: Result,
    our_name: str,
    ours: nn.Module,
    other_name: str,
    other: nn.Module,
    features: Sequence[Tensor],
    dys: Sequence[Tensor],
) -> None:
    from .retinanet_heads import head_step

    tolerance = tolerance_of(torch.float32)
    steps = [head_step(head, features, dys) for head in (ours, other)]
    pair = f"{our_name} = {other_name}"
    errors = [
        require_equal(f"{pair}, outputs", steps[0][0], steps[1][0], tolerance),
        require_equal(f"{pair}, gradients", steps[0][1], steps[1][1], tolerance),
    ]
    theirs = {k.removeprefix("head."): v for k, v in other.state_dict().items()}
    errors.append(require_equal_state(f"{pair}, state", ours.state_dict(), theirs, tolerance))
    result.checks[pair] = max(errors)

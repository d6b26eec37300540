"""What a norm adds to a training step of the RetinaNet head."""

from __future__ import annotations

from functools import partial

from benchmarks.levels import FULL_SIZES, TOY_SIZES, make_levels
from benchmarks.result import Result
from benchmarks.timing import Options, alternate, missing, spread
from rethinking_bn.layers import compile_norms

_OURS, _OURS_4, _OURS_NONE = "ours, row 1", "ours, row 4", "ours, no norm"
_COMPILED = "ours, row 1 compiled"
_THEIRS, _NONE = "detectron2, BN", "detectron2, no norm"


def run(options: Options) -> Result:
    """Compare; see the module. Levels as R50-FPN has at 800 x 1344, batch 2.

    On a CPU batch 1, a quarter of the channels and few classes: a step of the full head takes it
    half a minute.
    """
    result = Result("head")
    if (reason := missing("detectron2")) is not None:
        result.skip("everything", reason)
        return result
    from benchmarks import heads as made

    small, full = made.HeadSize(64, 4, 4, 9), made.HeadSize(256)
    size = options.pick(quick=made.HeadSize(8, 1, 2, 1), cpu=small, cuda=full)
    sizes = options.pick(quick=TOY_SIZES, cpu=FULL_SIZES, cuda=FULL_SIZES)
    images = options.pick(quick=2, cpu=1, cuda=2)
    features = make_levels(sizes, size.channels, images=images, device=options.device).xs
    heads = {
        _NONE: made.detectron2_head(size),
        _OURS_NONE: made.our_head(size, None),
        _OURS: made.our_head(size, 1),
        _OURS_4: made.our_head(size, 4),
        _THEIRS: made.detectron2_head(size, "BN"),
    }
    for head in heads.values():
        head.to(options.device)
    one_image = [x[:1] for x in features]
    pair = f"{_OURS_4} = {_THEIRS}"
    result.checks[pair] = made.check_heads(pair, heads[_OURS_4], heads[_THEIRS], one_image)
    heads[_COMPILED] = made.our_head(size, 1).to(options.device)
    compile_norms(heads[_COMPILED])
    dys = made.output_gradients(heads[_NONE], features)
    steps = {name: partial(made.head_step, head, features, dys) for name, head in heads.items()}
    times = alternate(steps, options, 40.0)
    own = "added by the norm, each head less itself without one"
    pairs = [(name, _OURS_NONE, own) for name in (_OURS, _COMPILED, _OURS_4)]
    for name, without, case in (*pairs, (_OURS, _NONE, "added over detectron2's without norm")):
        added, beside = (
            [a - b for a, b in zip(times[side], times[plain], strict=True)]
            for side, plain in ((name, without), (_THEIRS, _NONE))
        )
        # A round's difference may be noise: no ratio unless both sides' are well above 0.
        typical = spread(beside)
        told = min(typical.low, spread(added).low) > 0
        paired = [value / typical.median for value in added] if told else []
        result.measure(case, (name, added), (_THEIRS, beside), paired=paired)
    for name in (_OURS, _COMPILED, _OURS_4, _THEIRS, _OURS_NONE):
        result.measure("whole step", (name, times[name]), (_NONE, times[_NONE]))
    result.notes.append(f"{size}, features {[tuple(x.shape) for x in features]}")
    result.notes.append("detectron2 runs level by level, ours layer by layer; see the last row")
    return result

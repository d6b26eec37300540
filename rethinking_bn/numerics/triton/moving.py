"""The kernels of MABN beside :func:`gradient_sums`: its moving averages, and affine passes."""

import triton
import triton.language as tl

from rethinking_bn.numerics.triton.merge_rows import sum_rows
from rethinking_bn.numerics.triton.tiles import block, pick, read_tile, wide

_FREE = ["R", "m"]


@triton.jit
def _push(value, ring, count, m, C, channel, SLOTS: tl.constexpr):
    """Write the newest of the last m values, or again the one before it where it is not finite;
    return the mean of the last m, or of the fewer there are."""
    keep = channel < C
    slot = (count % m).to(tl.int32)
    before = ((count + m - 1) % m).to(tl.int32)
    previous = tl.load(ring + before * C + channel, mask=keep, other=0.0)
    value = tl.where(tl.abs(value) < float("inf"), value, previous)
    i = tl.arange(0, SLOTS)
    # the slot's old value is not read: the mean does not depend on when the new one is written
    mask = ((i < m) & (i != slot))[:, None] & keep[None, :]
    others = tl.load(ring + i[:, None] * C + channel[None, :], mask=mask, other=0.0)
    mean = (tl.sum(others, 0) + value) / tl.minimum(count + 1, m).to(tl.float32)
    tl.store(ring + slot * C + channel, value, mask=keep)
    return mean


@triton.jit(do_not_specialize=_FREE)
def advance(
    rows, R, number, ring, counter, m, running, momentum, eps, r_max, first_moving,
    last_uncorrected, out, moving, C,
    SLOTS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One iteration: own mean square, S and r into ``out`` (3, C), ring and R moved.

    The counter is left to the next launch: programs of this one are still reading it.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keep = channel < C
    _, squares = sum_rows(rows, 0, R, C, channel, True, STEP)
    own = squares / number
    count = tl.load(counter)
    mean = _push(own, ring, count, m, C, channel, SLOTS)
    moves = count + 1 >= first_moving
    smoothed = tl.where(moves, mean, own)
    old = tl.load(running + channel, mask=keep, other=0.0)
    ratio = tl.sqrt_rn((smoothed + eps) / (old + eps))
    # comparisons, since a minimum may drop a NaN
    ratio = tl.where(ratio > r_max, r_max, tl.where(ratio < 1 / r_max, 1 / r_max, ratio))
    correction = tl.where(count + 1 > last_uncorrected, ratio, 1.0)
    moved = old + momentum * (smoothed - old)
    moved = tl.where(tl.abs(moved) < float("inf"), moved, old)
    tl.store(running + channel, moved, mask=keep)
    tl.store(out + channel, own, mask=keep)
    tl.store(out + C + channel, smoothed, mask=keep)
    tl.store(out + 2 * C + channel, correction, mask=keep)
    if tl.program_id(0) == 0:
        tl.store(moving, moves)


@triton.jit(do_not_specialize=_FREE)
def average(
    rows, R, number, ring, counter, m, smoothed, correction, moving, weight, grad_weight,
    grad_bias, out, eps, C,
    SLOTS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a backward: p and its ring, a and b of dx = a·dy + b·x into ``out`` (2, C), and the
    affine's gradients. The counter is left to the next launch."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keep = channel < C
    sum_dy, sum_dy_x = sum_rows(rows, 0, R, C, channel, True, STEP)
    r = tl.load(correction + channel, mask=keep, other=0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.load(smoothed + channel, mask=keep, other=1.0) + eps)
    sum_dy_z = sum_dy_x * inverse
    scale = r
    if weight is not None:
        scale *= tl.load(weight + channel, mask=keep, other=0.0).to(tl.float32)
    p = scale * sum_dy_z / number
    mean = _push(p, ring, tl.load(counter), m, C, channel, SLOTS)
    averaged = tl.where(tl.load(moving) != 0, mean, p)
    tl.store(out + channel, scale * inverse, mask=keep)
    tl.store(out + C + channel, -averaged * inverse * inverse, mask=keep)
    if grad_weight is not None:
        g = grad_weight + channel
        tl.store(g, (r * sum_dy_z).to(g.dtype.element_ty), mask=keep)
    if grad_bias is not None:
        g = grad_bias + channel
        tl.store(g, sum_dy.to(g.dtype.element_ty), mask=keep)


@triton.jit
def scale_and_shift(
    xs, ys, table, smoothed, correction, weight, bias, eps, counter, C,
    L: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write weight · r · x / sqrt(S + eps) + bias; count the iteration."""
    group, _, base, planes, positions, size, channel = read_tile(table, C, LAST, ALIGN, COLUMNS)
    keep = channel < C
    scale = tl.load(correction + channel, mask=keep, other=0.0)
    scale /= tl.sqrt_rn(tl.load(smoothed + channel, mask=keep, other=1.0) + eps)
    shift = scale * 0.0
    if weight is not None:
        scale *= tl.load(weight + channel, mask=keep, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32)
    x, y = pick(xs, group, L) + base, pick(ys, group, L) + base
    PLANES: tl.constexpr = 1 if LAST else ROWS
    POSITIONS: tl.constexpr = ROWS if LAST else COLUMNS
    for plane in range(0, planes, PLANES):
        for position in range(0, positions, POSITIONS):
            offset, mask, inside = block(
                plane, position, planes, positions, size, C, channel, LAST, ALIGN, ROWS, COLUMNS
            )
            v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
            out = v * wide(scale, LAST) + wide(shift, LAST)
            tl.store(y + offset, out.to(y.dtype.element_ty), mask=mask)
    if counter is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(counter, tl.load(counter) + 1)


@triton.jit
def combine(
    dys, xs, dxs, table, coefficients, counter, C,
    L: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dx = a·dy + b·x; count the backward."""
    group, _, base, planes, positions, size, channel = read_tile(table, C, LAST, ALIGN, COLUMNS)
    keep = channel < C
    a = tl.load(coefficients + channel, mask=keep, other=0.0)
    b = tl.load(coefficients + C + channel, mask=keep, other=0.0)
    x, dy, dx = pick(xs, group, L) + base, pick(dys, group, L) + base, pick(dxs, group, L) + base
    PLANES: tl.constexpr = 1 if LAST else ROWS
    POSITIONS: tl.constexpr = ROWS if LAST else COLUMNS
    for plane in range(0, planes, PLANES):
        for position in range(0, positions, POSITIONS):
            offset, mask, inside = block(
                plane, position, planes, positions, size, C, channel, LAST, ALIGN, ROWS, COLUMNS
            )
            g = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
            out = g * wide(a, LAST) + v * wide(b, LAST)
            tl.store(dx + offset, out.to(dx.dtype.element_ty), mask=mask)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(counter, tl.load(counter) + 1)

"""The kernels of a forward: moments, their merge, normalise with the EMA step."""

import triton
import triton.language as tl

from rethinking_bn.numerics.triton.merge_rows import merge_rows, row_span, split_mean, store_row
from rethinking_bn.numerics.triton.tiles import block, pick, read_tile, total, wide, zeros_like

_FREE = ["R", "K", "tiles"]  # a kernel serves all of their values


@triton.jit
def moments(
    xs, table, rows, C,
    L: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each tile's row of moments: Σ (x - s) and Σ (x - s)² about its first block's mean s."""
    group, _, base, planes, positions, size, channel = read_tile(table, C, LAST, ALIGN, COLUMNS)
    x = pick(xs, group, L) + base
    PLANES: tl.constexpr = 1 if LAST else ROWS
    POSITIONS: tl.constexpr = ROWS if LAST else COLUMNS
    offset, mask, number = block(
        0, 0, planes, positions, size, C, channel, LAST, ALIGN, ROWS, COLUMNS
    )
    v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    shift = total(v, LAST) / number.to(tl.float32)
    moved = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    for plane in range(0, planes, PLANES):
        for position in range(0, positions, POSITIONS):
            offset, mask, number = block(
                plane, position, planes, positions, size, C, channel, LAST, ALIGN, ROWS, COLUMNS
            )
            v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
            d = tl.where(mask, v - wide(shift, LAST), 0.0)
            moved += d
            square += d * d
    count = zeros_like(channel) + (planes * positions).to(tl.float32)
    count, mean, rest, m2 = split_mean(count, shift, total(moved, LAST), total(square, LAST))
    store_row(rows, tl.program_id(0), count, mean, rest, m2, C, channel)


@triton.jit(do_not_specialize=_FREE)
def merge(
    rows, table, tiles, R, K, out, C,
    ALL: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the tiles' rows into one row for each of the K parts: what ranks exchange."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, number, stride = row_span(table, tiles, R, K, part, ALL, True)
    count, mean, rest, m2 = merge_rows(rows, first, number, stride, C, channel, True, STEP)
    store_row(out, part, count, mean, rest, m2, C, channel)


@triton.jit(do_not_specialize=_FREE)
def normalize(
    xs, ys, table, tiles, rows, R, K, weights, biases, stats, means, variances, counters, momentum,
    eps, C,
    L: tl.constexpr, A: tl.constexpr, H: tl.constexpr, POOLED: tl.constexpr, ALL: tl.constexpr,
    FOLDED: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the moments of the tile's pool, normalise by them, then apply the affine.

    The first tile of a group writes its pool's (count, mean, rest, 1/σ) into ``stats`` (4, P, C);
    tiles of one pool write the same. The first program of all moves the running statistics.
    """
    group, first_of_group, base, planes, positions, size, channel = read_tile(
        table, C, LAST, ALIGN, COLUMNS
    )
    keep = channel < C
    first, number, stride = row_span(table, tiles, R, K, group, POOLED, FOLDED)
    count, mean, rest, m2 = merge_rows(rows, first, number, stride, C, channel, LAST, STEP)
    invstd = 1.0 / tl.sqrt_rn(m2 / tl.maximum(count, 1.0) + eps)
    if first_of_group:
        P = 1 if POOLED else K
        p = stats + (0 if POOLED else group) * C + channel
        tl.store(p, count, mask=keep)
        tl.store(p + P * C, mean, mask=keep)
        tl.store(p + 2 * P * C, rest, mask=keep)
        tl.store(p + 3 * P * C, invstd, mask=keep)
    scale, shift = invstd, zeros_like(channel)
    if weights is not None:
        w = tl.load(pick(weights, group, A) + channel, mask=keep, other=0.0)
        scale *= w.to(tl.float32)
    if biases is not None:
        b = tl.load(pick(biases, group, A) + channel, mask=keep, other=0.0)
        shift += b.to(tl.float32)
    x, y = pick(xs, group, L) + base, pick(ys, group, L) + base
    PLANES: tl.constexpr = 1 if LAST else ROWS
    POSITIONS: tl.constexpr = ROWS if LAST else COLUMNS
    for plane in range(0, planes, PLANES):
        for position in range(0, positions, POSITIONS):
            offset, mask, inside = block(
                plane, position, planes, positions, size, C, channel, LAST, ALIGN, ROWS, COLUMNS
            )
            v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
            centred = (v - wide(mean, LAST)) - wide(rest, LAST)
            out = centred * wide(scale, LAST) + wide(shift, LAST)
            tl.store(y + offset, out.to(y.dtype.element_ty), mask=mask)
    if H > 0:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            for holder in range(0, H):  # not unrolled: it would take half a minute to compile
                _update(
                    rows, table, tiles, R, K, pick(means, holder, H), pick(variances, holder, H),
                    pick(counters, holder, H), holder, 1 if H > 1 else K, momentum, C, ALL, FOLDED,
                    STEP,
                )  # fmt: skip


@triton.jit
def _update(
    rows, table, tiles, R, K, running_mean, running_var, counter, start, parts, momentum, C,
    ALL: tl.constexpr, FOLDED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Move one holder's buffers by an EMA step for each of its parts, one after the other.

    A part without a value is skipped, or for the variance one with a single value; and one whose
    moments are not finite in every channel. Momentum None is a cumulative average.
    """
    COLUMNS: tl.constexpr = 32
    infinity = float("inf")
    fine = tl.zeros((), tl.int64)  # a bit for each part
    for i in range(0, parts):
        first, number, stride = row_span(table, tiles, R, K, start + i, ALL, FOLDED)
        bad = tl.zeros((), tl.int32)
        for c in range(0, C, COLUMNS):
            channel = c + tl.arange(0, COLUMNS)
            count, mean, _, m2 = merge_rows(rows, first, number, stride, C, channel, True, STEP)
            finite = (tl.abs(mean) < infinity) & (m2 / tl.maximum(count - 1, 1.0) < infinity)
            bad += tl.sum(tl.where(finite | (channel >= C), 0, 1), 0)
        fine |= (bad == 0).to(tl.int64) << i
    counted = tl.load(counter)
    steps = tl.zeros([COLUMNS], tl.int64)
    for c in range(0, C, COLUMNS):
        channel = c + tl.arange(0, COLUMNS)
        keep = channel < C
        old_mean = tl.load(running_mean + channel, mask=keep, other=0.0).to(tl.float32)
        old_var = tl.load(running_var + channel, mask=keep, other=0.0).to(tl.float32)
        steps = tl.zeros([COLUMNS], tl.int64)
        for i in range(0, parts):
            first, number, stride = row_span(table, tiles, R, K, start + i, ALL, FOLDED)
            count, mean, _, m2 = merge_rows(rows, first, number, stride, C, channel, True, STEP)
            finite = ((fine >> i) & 1) == 1
            steps += (finite & (count > 0)).to(tl.int64)
            if momentum is None:
                rate = 1.0 / tl.maximum(counted + steps, 1).to(tl.float32)
            else:
                rate = momentum
            variance = m2 / tl.maximum(count - 1, 1.0)
            moved_mean = old_mean + rate * (mean - old_mean)
            moved_var = old_var + rate * (variance - old_var)
            old_mean = tl.where(finite & (count > 0), moved_mean, old_mean)
            old_var = tl.where(finite & (count > 1), moved_var, old_var)
        tl.store(running_mean + channel, old_mean.to(running_mean.dtype.element_ty), mask=keep)
        tl.store(running_var + channel, old_var.to(running_var.dtype.element_ty), mask=keep)
    # every count is that of its row: the last channels' tell, but for those beyond C
    tl.store(counter, counted + tl.max(steps, 0))

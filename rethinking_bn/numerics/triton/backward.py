"""The kernels of a backward: gradient sums, their merge, the gradient of the inputs."""

import triton
import triton.language as tl

from rethinking_bn.numerics.triton.merge_rows import sum_rows
from rethinking_bn.numerics.triton.tiles import block, pick, read_tile, total, wide, zeros_like

_FREE = ["R", "K", "tiles", "P"]


@triton.jit
def _read_stats(stats, P, pool, C, channel):
    keep = channel < C
    p = stats + pool * C + channel
    count = tl.load(p, mask=keep, other=1.0)
    mean = tl.load(p + P * C, mask=keep, other=0.0)
    rest = tl.load(p + 2 * P * C, mask=keep, other=0.0)
    return count, mean, rest, tl.load(p + 3 * P * C, mask=keep, other=0.0)


@triton.jit(do_not_specialize=_FREE)
def gradient_sums(
    dys, xs, table, stats, P, rows, C,
    L: tl.constexpr, POOLED: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each tile's row of Σ dy and Σ dy·x̂ into ``rows`` (T, 2, C)."""
    group, _, base, planes, positions, size, channel = read_tile(table, C, LAST, ALIGN, COLUMNS)
    count, mean, rest, invstd = _read_stats(stats, P, 0 if POOLED else group, C, channel)
    x, dy = pick(xs, group, L) + base, pick(dys, group, L) + base
    PLANES: tl.constexpr = 1 if LAST else ROWS
    POSITIONS: tl.constexpr = ROWS if LAST else COLUMNS
    a = tl.zeros([ROWS, COLUMNS], tl.float32)
    b = tl.zeros([ROWS, COLUMNS], tl.float32)
    for plane in range(0, planes, PLANES):
        for position in range(0, positions, POSITIONS):
            offset, mask, inside = block(
                plane, position, planes, positions, size, C, channel, LAST, ALIGN, ROWS, COLUMNS
            )
            g = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
            centred = (v - wide(mean, LAST)) - wide(rest, LAST)
            a += g
            b += tl.where(mask, g * centred, 0.0)
    p, keep = rows + tl.program_id(0) * (2 * C) + channel, channel < C
    tl.store(p, total(a, LAST), mask=keep)
    tl.store(p + C, total(b, LAST) * invstd, mask=keep)


@triton.jit
def _affine_gradients(
    rows, table, tiles, R, grad_weights, grad_biases, C, channel,
    A: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write Σ dy·x̂ and Σ dy of this rank: over everything, or a group for each of A affines."""
    keep = channel < C
    for i in tl.static_range(A):
        first, number = 0, R
        if A > 1:
            entry = table + tiles * 6 + i * 2
            first, number = tl.load(entry).to(tl.int32), tl.load(entry + 1).to(tl.int32)
        a, b = sum_rows(rows, first, number, C, channel, VECTOR, STEP)
        if grad_biases is not None:
            p = grad_biases[i] + channel
            tl.store(p, a.to(p.dtype.element_ty), mask=keep)
        if grad_weights is not None:
            p = grad_weights[i] + channel
            tl.store(p, b.to(p.dtype.element_ty), mask=keep)


@triton.jit
def _pool_sums(
    rows, table, tiles, R, K, weights, pool, C, channel,
    A: tl.constexpr, POOLED: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return a pool's Σ weight·dy and Σ weight·dy·x̂, by the tiles' rows."""
    keep = channel < C
    a, b = zeros_like(channel), zeros_like(channel)
    if POOLED and A == 1:
        a, b = sum_rows(rows, 0, R, C, channel, VECTOR, STEP)
        if weights is not None:
            w = tl.load(weights[0] + channel, mask=keep, other=0.0).to(tl.float32)
            a, b = a * w, b * w
    else:
        start, stop = pool, pool + 1
        if POOLED:
            start, stop = pool * 0, K
        for group in range(start, stop):
            entry = table + tiles * 6 + group * 2
            first, number = tl.load(entry).to(tl.int32), tl.load(entry + 1).to(tl.int32)
            s, t = sum_rows(rows, first, number, C, channel, VECTOR, STEP)
            if weights is not None:
                w = tl.load(pick(weights, group, A) + channel, mask=keep, other=0.0)
                s, t = s * w.to(tl.float32), t * w.to(tl.float32)
            a += s
            b += t
    return a, b


@triton.jit(do_not_specialize=_FREE)
def merge_sums(
    rows, table, tiles, R, K, weights, grad_weights, grad_biases, out, P, C,
    A: tl.constexpr, POOLED: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the pools' sums into ``out`` (2, P, C), what ranks add up; and the affine gradients."""
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    keep, pool = channel < C, tl.program_id(0)
    a, b = _pool_sums(rows, table, tiles, R, K, weights, pool, C, channel, A, POOLED, True, STEP)
    p = out + pool * C + channel
    tl.store(p, a, mask=keep)
    tl.store(p + P * C, b, mask=keep)
    if pool == 0:
        _affine_gradients(
            rows, table, tiles, R, grad_weights, grad_biases, C, channel, A, True, STEP
        )


@triton.jit(do_not_specialize=_FREE)
def input_gradient(
    dys, xs, dxs, table, tiles, rows, R, K, stats, P, weights, grad_weights, grad_biases, C,
    L: tl.constexpr, A: tl.constexpr, POOLED: tl.constexpr, FOLDED: tl.constexpr,
    STEP: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dx = (weight·dy - (Σ weight·dy + x̂ · Σ weight·dy·x̂) / n) / σ.

    ``rows`` are the pools' sums (2, P, C); or the tiles' (FOLDED), and then the first tile's
    programs write the affine's gradient.
    """
    group, _, base, planes, positions, size, channel = read_tile(table, C, LAST, ALIGN, COLUMNS)
    keep, pool = channel < C, 0 if POOLED else group
    if FOLDED:
        a, b = _pool_sums(
            rows, table, tiles, R, K, weights, group, C, channel, A, POOLED, LAST, STEP
        )
        if tl.program_id(0) == 0:
            _affine_gradients(
                rows, table, tiles, R, grad_weights, grad_biases, C, channel, A, LAST, STEP
            )
    else:
        p = rows + pool * C + channel
        a = tl.load(p, mask=keep, other=0.0)
        b = tl.load(p + P * C, mask=keep, other=0.0)
    count, mean, rest, invstd = _read_stats(stats, P, pool, C, channel)
    some = tl.maximum(count, 1.0)
    weight = zeros_like(channel) + 1.0
    if weights is not None:
        w = tl.load(pick(weights, group, A) + channel, mask=keep, other=0.0)
        weight = w.to(tl.float32)
    shift, slope = a / some, invstd * (b / some)
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
            centred = (v - wide(mean, LAST)) - wide(rest, LAST)
            out = g * wide(weight, LAST) - wide(shift, LAST) - centred * wide(slope, LAST)
            out *= wide(invstd, LAST)
            tl.store(dx + offset, out.to(dx.dtype.element_ty), mask=mask)

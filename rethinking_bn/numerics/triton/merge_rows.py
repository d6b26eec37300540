"""Device functions: merging rows of moments, or of gradient sums, in a fixed order.

Rows of moments (R, 4, C) are count, mean, rest and M2: the mean is kept as a sum of two float32
numbers, since x - mean would otherwise lose the digits that a large mean leaves in x. Whoever
merges the rows of tiles, of groups or of ranks does it here.
"""

import triton
import triton.language as tl

from rethinking_bn.numerics.triton.tiles import wide, zeros_like


@triton.jit
def row_span(table, tiles, R, K, part, ALL: tl.constexpr, FOLDED: tl.constexpr):
    """Return the rows of a part: first, number and distance.

    All R rows; or where they are tiles' (FOLDED) those of the table's group; or else, where each
    rank has K rows, one of each.
    """
    if ALL:
        first, number, stride = part * 0, R, 1
    elif FOLDED:
        entry = table + tiles * 6 + part * 2
        first, number, stride = tl.load(entry).to(tl.int32), tl.load(entry + 1).to(tl.int32), 1
    else:
        first, number, stride = part, R // K, K
    return first, number, stride


@triton.jit
def _rows(rows, FIELDS: tl.constexpr, first, number, stride, step, C, channel,
          VECTOR: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Return pointers to the first field of STEP rows, and their mask."""
    i = step + tl.arange(0, STEP)
    row = (first + i * stride) * (FIELDS * C)
    if VECTOR:
        mask = (i < number)[:, None] & (channel < C)[None, :]
        return rows + row[:, None] + channel[None, :], mask
    else:
        return rows + row + channel, i < number


@triton.jit
def _load_means(p, mask, C):
    n = tl.load(p, mask=mask, other=0.0)
    return n, tl.where(n > 0, tl.load(p + C, mask=mask, other=0.0), 0.0)


@triton.jit
def merge_rows(rows, first, number, stride, C, channel,
               VECTOR: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Return count, mean, rest and M2 over ``number`` rows of moments.

    In two passes over the rows: with s near the mean, mean = s + Σ n·(mean - s) / Σ n and
    M2 = Σ (M2 + n·(mean - s)²) - (Σ n·(mean - s))² / Σ n lose nothing to cancellation.
    """
    count, weighted = zeros_like(channel), zeros_like(channel)
    for step in range(0, number, STEP):
        p, mask = _rows(rows, 4, first, number, stride, step, C, channel, VECTOR, STEP)
        n, mean = _load_means(p, mask, C)
        count += tl.sum(n, 0)
        weighted += tl.sum(n * mean, 0)
    some = tl.maximum(count, 1.0)
    shift = weighted / some
    moved, square = zeros_like(channel), zeros_like(channel)
    for step in range(0, number, STEP):
        p, mask = _rows(rows, 4, first, number, stride, step, C, channel, VECTOR, STEP)
        n, mean = _load_means(p, mask, C)
        d = (mean - wide(shift, VECTOR)) + tl.load(p + 2 * C, mask=mask, other=0.0)
        d = tl.where(n > 0, d, 0.0)
        moved += tl.sum(n * d, 0)
        square += tl.sum(tl.load(p + 3 * C, mask=mask, other=0.0) + n * d * d, 0)
    return split_mean(count, shift, moved, square)


@triton.jit
def split_mean(count, shift, moved, square):
    """Return count, mean, rest, M2 from Σ (x - shift) and Σ (x - shift)²."""
    rest = moved / tl.maximum(count, 1.0)
    m2 = square - moved * rest
    mean = shift + rest
    # where, since a maximum may drop a NaN
    return count, mean, rest - (mean - shift), tl.where(m2 < 0, 0.0, m2)


@triton.jit
def store_row(rows, row, count, mean, rest, m2, C, channel):
    """Write one row of moments."""
    p, keep = rows + row * (4 * C) + channel, channel < C
    tl.store(p, count, mask=keep)
    tl.store(p + C, mean, mask=keep)
    tl.store(p + 2 * C, rest, mask=keep)
    tl.store(p + 3 * C, m2, mask=keep)


@triton.jit
def sum_rows(rows, first, number, C, channel, VECTOR: tl.constexpr, STEP: tl.constexpr):
    """Return the sums of two fields over ``number`` successive rows (R, 2, C)."""
    a, b = zeros_like(channel), zeros_like(channel)
    for step in range(0, number, STEP):
        p, mask = _rows(rows, 2, first, number, 1, step, C, channel, VECTOR, STEP)
        a += tl.sum(tl.load(p, mask=mask, other=0.0), 0)
        b += tl.sum(tl.load(p + C, mask=mask, other=0.0), 0)
    return a, b

"""Device functions: which part of the tensors a program works on.

A *tile* is what one program of a launch reads: of one channel a stretch of some planes (NCHW), or
of ``COLUMNS`` channels a stretch of positions (channels-last). The host lists the tiles in a table,
group after group, see :mod:`plan`. A *group* is what has statistics of its own before anything is
merged: one of the tensors, or some rows of the only one.

Device functions see a channel as a number in NCHW and as a vector in channels-last; ``LAST`` tells.
"""

# The code of kernels is Triton's, which knows no type annotations but constexpr.
import triton
import triton.language as tl


@triton.jit
def pick(values, index, LENGTH: tl.constexpr):
    """Return values[index] of a tuple, for an index that is only known here."""
    value = values[0]
    for i in tl.static_range(1, LENGTH):
        if index == i:
            value = values[i]
    return value


@triton.jit
def read_tile(table, C, LAST: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's tile: group, whether it is the group's first, offset of its first
    element, number of planes and of positions, size of a plane, and channel(s)."""
    row = table + tl.program_id(0) * 6
    group, first = tl.load(row).to(tl.int32), tl.load(row + 1) > 0
    planes, positions = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    base, size = tl.load(row + 4), tl.load(row + 5)
    if LAST:
        channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        base *= C
    else:
        channel = tl.program_id(1)
        # Divisors let loads be wide. The compiler takes such hints of results of arithmetic alone.
        base = tl.multiple_of(base + channel * size, ALIGN)
        positions = tl.multiple_of(positions, ALIGN)
    return group, first, base, planes, positions, size, channel


@triton.jit
def block(
    plane, position, planes, positions, size, C, channel,
    LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return a block (ROWS, COLUMNS) of a tile: offsets, mask, and values per channel in it."""
    if LAST:
        i = position + tl.arange(0, ROWS)
        mask = (i < positions)[:, None] & (channel < C)[None, :]
        offset = i[:, None] * C + channel[None, :]
        number = tl.minimum(positions - position, ROWS)
    else:
        n, i = plane + tl.arange(0, ROWS), position + tl.arange(0, COLUMNS)
        mask = (n < planes)[:, None] & (i < positions)[None, :]
        offset = n[:, None] * tl.multiple_of(C * size, ALIGN) + i[None, :]
        number = tl.minimum(planes - plane, ROWS) * tl.minimum(positions - position, COLUMNS)
    return offset, mask, number


@triton.jit
def total(values, LAST: tl.constexpr):
    """Sum a block per channel."""
    if LAST:
        return tl.sum(values, 0)
    else:
        return tl.sum(values)


@triton.jit
def wide(channels, VECTOR: tl.constexpr):
    """Give values per channel the shape that broadcasts over a block."""
    if VECTOR:
        return channels[None, :]
    else:
        return channels


@triton.jit
def zeros_like(channel):
    """Return float32 zeros, one per channel."""
    return (channel * 0).to(tl.float32)

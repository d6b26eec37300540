"""Formulas for more ranks than there are here: bytes per rank, and over a node's own link.

Ranks fill nodes of g. The slowest link is the one between nodes. A ring passes it once per node:
of an all_gather of n bytes a rank it carries (W - 1) · n, of an all_reduce of n bytes
2 · (W - 1) / W · n. An all_to_all of evenly permuted rows sends n · (W - 1) / W from every rank,
of which n · (W - g) / W leave the node, for each of the node's g ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.result import Table

Row = tuple[str | int | float, ...]

_MIB = 2**20


def shuffle_bytes(world: int, nbytes: float, ranks_per_node: int) -> dict[str, float]:
    """Return the bytes of a shuffle, its unshuffle and the backward of both.

    Args:
        world: W.
        nbytes: of one rank's rows, n.
        ranks_per_node: g.

    Returns:
        "ours" and "gathered": sent per rank; "ours, link" and "gathered, link": out of a node.
    """
    away = max(world - ranks_per_node, 0)
    # forward all_gathers of n, backward all_reduces of W · n, twice each
    gathered = 2.0 * (world - 1) * nbytes + 2 * 2.0 * (world - 1) * nbytes
    return {
        "ours": 4.0 * nbytes * (world - 1) / world,
        "gathered": gathered,
        "ours, link": 4.0 * nbytes * ranks_per_node * away / world,
        "gathered, link": gathered if away else 0.0,
    }


def shuffle_table(worlds: Sequence[int], nbytes: float, ranks_per_node: int) -> Table:
    """Tabulate :func:`shuffle_bytes` for growing numbers of ranks."""
    rows: list[Row] = []
    for world in worlds:
        b = {k: v / _MIB for k, v in shuffle_bytes(world, nbytes, ranks_per_node).items()}
        ratio = b["ours"] / b["gathered"]
        link = b["ours, link"] / b["gathered, link"] if b["gathered, link"] else ""
        rows.append(
            (world, b["ours"], b["gathered"], ratio, b["ours, link"], b["gathered, link"], link)
        )
    title = (
        f"On paper: MiB of shuffle + unshuffle + backward, {nbytes / _MIB:.1f} MiB of rows a rank, "
        f"{ranks_per_node} ranks a node"
    )
    columns = ("ranks", "sent per rank, ours", "padded all_gather", "ratio")
    link_columns = ("out of a node, ours", "padded all_gather", "ratio")
    return Table(title, (*columns, *link_columns), rows)


def norm_bytes(world: int, layers: int, levels: int, channels: int, *, shared: bool) -> float:
    """Return the bytes a rank sends in a step for synchronised BatchNorm, float32.

    The forward gathers a count, C means and C sums of squares per set of statistics; the backward
    reduces two sums for each channel of each. The same whether they travel together or apart.

    Args:
        shared: whether the levels share one set.
    """
    sets = 1 if shared else levels
    gathered = (world - 1) * sets * (1 + 2 * channels) * 4.0
    reduced = 2 * (world - 1) / world * sets * 2 * channels * 4.0
    return layers * (gathered + reduced)


def norm_table(
    worlds: Sequence[int],
    ranks_per_node: int,
    *,
    layers: int = 8,
    levels: int = 5,
    channels: int = 256,
    images: int = 2,
) -> Table:
    """Tabulate collectives, sequential messages and bytes of a step of the RetinaNet head.

    A ring takes W - 1 messages for an all_gather and 2 (W - 1) for an all_reduce, one after
    another: with payloads this small, they are what the time goes to.
    """
    rows: list[Row] = []
    for world in worlds:
        messages = 3 * (world - 1)
        shared, specific = (
            norm_bytes(world, layers, levels, channels, shared=s) / _MIB for s in (True, False)
        )
        across = specific if world > ranks_per_node else 0.0
        rows.append(
            (
                world,
                layers * messages,
                layers * levels * messages,
                shared,
                specific,
                across,
                world * images,
            )
        )
    title = (
        f"On paper: SyncBN in the RetinaNet head, {layers} layers, {levels} levels, {channels} "
        f"channels, {ranks_per_node} ranks a node"
    )
    columns = (
        "ranks",
        "messages in sequence, ours",
        "one collective per level",
        "MiB sent per rank, shared statistics",
        "domain-specific (either way)",
        "of those over a node's link",
        f"normalisation batch size at {images} images a rank",
    )
    return Table(title, columns, rows)

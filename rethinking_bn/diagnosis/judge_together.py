"""Findings that need more than one layer's numbers: blocks, another domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rethinking_bn.diagnosis.distance import compare_with_stored
from rethinking_bn.diagnosis.findings import Finding, make, severity_of
from rethinking_bn.diagnosis.judge_layer import DISTANCE
from rethinking_bn.diagnosis.layers import DiagnosedLayer
from rethinking_bn.diagnosis.record import Record

_LARGEST_BLOCK = 8  # norm layers


def mixed_blocks(layers: Sequence[DiagnosedLayer]) -> Iterator[Finding]:
    """Yield a finding per block that is frozen in part.

    The block of a layer is the smallest module that holds another norm layer too, if it is no
    more than two modules up and holds no more than eight.
    """
    by_prefix: dict[str, list[DiagnosedLayer]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for up in range(1, len(parts)):
            by_prefix.setdefault(".".join(parts[:-up]), []).append(layer)
    seen: set[str] = set()
    for layer in layers:
        parts = layer.name.split(".")
        prefixes = [".".join(parts[:-up]) for up in range(1, min(3, len(parts)))]
        block = next((p for p in prefixes if len(by_prefix[p]) > 1), None)
        if block is None or block in seen or len(by_prefix[block]) > _LARGEST_BLOCK:
            continue
        seen.add(block)
        frozen = [member.name for member in by_prefix[block] if member.frozen]
        thawed = [member.name for member in by_prefix[block] if not member.frozen]
        if frozen and thawed:
            what = (
                f"{len(frozen)} of {len(frozen) + len(thawed)} layers of the block {block} are "
                f"frozen ({', '.join(frozen)}): their statistics stay while those beside them move"
            )
            yield make(
                "mixed-modes", frozen[0], "note", what, len(frozen) / len(thawed),
                block=block, frozen=frozen, thawed=thawed,
            )  # fmt: skip


def domain_shift(layers: Sequence[DiagnosedLayer], targets: dict[str, Record]) -> Iterator[Finding]:
    """Yield for each layer how far the target's statistics are from the stored ones."""
    for layer in layers:
        record = targets[layer.name]
        if layer.stored is None or layer.by_batch or record.uses == 0:
            continue
        moving = not layer.frozen
        worst = max(compare_with_stored(layer, record, moving=moving), key=lambda v: v.effect)
        severity = severity_of(worst.effect, DISTANCE)
        what = (
            f"the target's statistics are {worst.effect:.2f} standard deviations from the stored "
            f"ones in {len(worst.channels)} of {layer.channels} channels (z {worst.z:.0f})"
        )
        if severity == "ok":
            what = f"stored statistics fit the target's (largest z {worst.z:.1f})"
        yield make(
            "domain-shift", layer.name, severity, what, worst.effect,
            distance=worst.effect, z=worst.z, channels=len(worst.channels), of=layer.channels,
            which=worst.channels[:16].tolist(),
        )  # fmt: skip

"""Running a subnet on all feature levels, one layer after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

from torch import Tensor, nn

from rethinking_bn.layers.cycle import CycleBatchNorm2d
from rethinking_bn.layers.mabn.layer import MABN2d
from rethinking_bn.layers.multi_domain import MultiDomainBatchNorm2d


def run_layer_by_layer(layers: Iterable[nn.Module], features: Sequence[Tensor]) -> list[Tensor]:
    """Run each layer on all levels before the next one, so that a norm layer sees them at once.

    Args:
        layers: MultiDomainBatchNorm2d and MABN2d get all levels in one call; every other layer is
            called level after level, a CycleBatchNorm2d within its ``cycle()``. An nn.Sequential
            stands for the layers in it.
        features: L tensors (N, C, H_l, W_l).

    Returns:
        L tensors.
    """
    outputs = list(features)
    for layer in layers:
        if isinstance(layer, (MultiDomainBatchNorm2d, MABN2d)):
            outputs = layer(outputs)
        elif isinstance(layer, nn.Sequential):
            outputs = run_layer_by_layer(layer, outputs)
        else:
            # a layer that counts its calls must know where a pass over the levels ends
            with layer.cycle() if isinstance(layer, CycleBatchNorm2d) else nullcontext():
                outputs = [layer(x) for x in outputs]
    return outputs

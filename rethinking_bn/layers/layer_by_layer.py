"""Running a subnet on all feature levels, one layer after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from rethinking_bn.layers.cycle import CycleBatchNorm2d
from rethinking_bn.layers.mabn import MABN2d
from rethinking_bn.layers.multi_domain import MultiDomainBatchNorm2d


def run_layer_by_layer(layers: Iterable[nn.Module], features: Sequence[Tensor]) -> list[Tensor]:
    """Run each layer on all levels, L tensors (N, C, H_l, W_l), before the next one.

    MultiDomainBatchNorm2d and MABN2d get all levels in one call; every other layer is called level
    after level, a CycleBatchNorm2d within its ``cycle()``. An nn.Sequential stands for its layers.
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


class LayerByLayer(nn.Sequential):
    """A subnet with nn.Sequential's keys, run on all levels by :func:`run_layer_by_layer`."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self.infer_levels(features)
        else:  # not compiled by TorchScript
            return run_layer_by_layer(self, features)

    def infer_levels(self, features: list[Tensor]) -> list[Tensor]:
        """Run at inference, as TorchScript can read it."""
        outputs = features
        for layer in self:
            if hasattr(layer, "infer_levels"):
                outputs = layer.infer_levels(outputs)  # type: ignore[operator]
            else:
                outputs = [layer(x) for x in outputs]
        return outputs


def layer_by_layer(subnet: nn.Sequential) -> LayerByLayer:
    """Return the subnet as a :class:`LayerByLayer` of the same modules, blocks within it, too."""
    layers = (layer_by_layer(m) if isinstance(m, nn.Sequential) else m for m in subnet)
    return LayerByLayer(*layers)

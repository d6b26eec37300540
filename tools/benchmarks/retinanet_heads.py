"""RetinaNet heads of one size with every kind of norm, and the reference for the shared one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from benchmarks.comparators.batch_norm import ConcatenatedBatchNorm2d
from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.layers.multi_domain import TABLE_5
from rethinking_bn.modeling import MultiDomainBNRetinaNetHead


@dataclass(frozen=True)
class HeadSize:
    """Channels C, convolutions per subnet, object classes and anchors per location."""

    channels: int
    num_convs: int = 4
    num_classes: int = 80
    num_anchors: int = 9

    def arguments(self) -> dict[str, object]:
        """Return a head's keyword arguments without the norm."""
        return {
            "input_shape": [
                ShapeSpec(channels=self.channels, stride=2**level) for level in range(3, 8)
            ],
            "num_classes": self.num_classes,
            "num_anchors": self.num_anchors,
            "conv_dims": [self.channels] * self.num_convs,
        }


def our_head(size: HeadSize, row: int | None, norm: str = "BN") -> nn.Module:
    """Return our head with the choices of a row of Table 5, or for None without a norm."""
    choices: dict[str, Any] = {} if row is None else dict(TABLE_5[row])
    norm = "" if row is None else norm
    torch.manual_seed(0)
    return MultiDomainBNRetinaNetHead(norm=norm, **choices, **size.arguments())


def detectron2_head(size: HeadSize, norm: str | Callable[[int], nn.Module] = "") -> nn.Module:
    """Return detectron2's head, with the same initial weights as ours."""
    torch.manual_seed(0)
    return RetinaNetHead(norm=norm, **size.arguments())


def per_level_head(size: HeadSize, bn_class: type[nn.Module]) -> nn.Module:
    """Return detectron2's head with a CycleBatchNormList of a BatchNorm class of one's choice."""

    def norm(channels: int) -> nn.Module:
        # detectron2 also makes one to look at its class, with other channels
        return CycleBatchNormList(5, bn_class=bn_class, num_features=channels)

    return detectron2_head(size, norm)


class ConcatenatedHead(nn.Module):
    """A copy of a head whose shared BatchNorms concatenate the levels: row 1, written plainly."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        own: Any = copy.deepcopy(head)
        self.head = own
        for subnet in (own.cls_subnet, own.bbox_subnet):
            for index, layer in enumerate(subnet):
                if isinstance(layer, MultiDomainBatchNorm2d):
                    plain = ConcatenatedBatchNorm2d(layer.num_features)
                    plain.load_state_dict(layer.state_dict())
                    subnet[index] = plain.to(next(layer.parameters()).device)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits and deltas, as a head does."""
        head: Any = self.head
        return (
            self._run([*head.cls_subnet, head.cls_score], features),
            self._run([*head.bbox_subnet, head.bbox_pred], features),
        )

    @staticmethod
    def _run(layers: Sequence[nn.Module], features: Sequence[Tensor]) -> list[Tensor]:
        xs = list(features)
        for layer in layers:
            whole = isinstance(layer, ConcatenatedBatchNorm2d)
            xs = layer(xs) if whole else [layer(x) for x in xs]
        return xs


def head_forward(head: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Return logits and deltas of all levels in one list."""
    logits, deltas = head(list(features))
    return [*logits, *deltas]


def head_step(
    head: nn.Module, features: Sequence[Tensor], dys: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run forward and backward; return outputs and gradients (features, then parameters)."""
    outputs = head_forward(head, features)
    inputs = [*features, *head.parameters()]
    return outputs, list(torch.autograd.grad(outputs, inputs, dys))

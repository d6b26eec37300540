"""RetinaNet heads of one size with every kind of norm, and whether two compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from benchmarks.equality import require_equal, require_equal_state, tolerance_of
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


def output_gradients(head: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Return seeded gradients for a head's outputs; the head's own state does not change."""
    with torch.no_grad():
        outputs = head_forward(copy.deepcopy(head), features)
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(y.shape, generator=generator).to(y) for y in outputs]


def check_heads(pair: str, ours: nn.Module, other: nn.Module, features: Sequence[Tensor]) -> float:
    """Compare outputs, all gradients and the state after one step of copies in float64.

    In float32 a rounding error now and then moves a value across a ReLU's zero, and the gradient
    there by its whole size.

    Returns:
        The largest relative error.

    Raises:
        ResultsDiffer: when anything differs.
    """
    xs = [x.detach().double().requires_grad_() for x in features]
    copies = [copy.deepcopy(head).double() for head in (ours, other)]
    dys = output_gradients(copies[0], xs)
    tolerance = tolerance_of(torch.float64)
    steps = [head_step(head, xs, dys) for head in copies]
    errors = [
        require_equal(f"{pair}, {what}", steps[0][index], steps[1][index], tolerance)
        for index, what in enumerate(("outputs", "gradients"))
    ]
    states = [head.state_dict() for head in copies]
    return max(*errors, require_equal_state(f"{pair}, state", states[0], states[1], tolerance))

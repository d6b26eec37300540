"""The small residual network of the classification studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rethinking_bn.layers import BatchNorm2d
from studies.data import NUM_CLASSES

NormFactory = Callable[[int], nn.Module]
WIDTHS = (16, 32, 64)  # channels of the stages; each but the first halves the map
BLOCKS = 2  # per stage


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, each with norm, as in ResNet-18.

    (N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: NormFactory, conv: type[nn.Conv2d]
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
            conv(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
        )
        self.shortcut = (
            nn.Sequential(conv(inputs, outputs, 1, stride=stride, bias=False), norm(outputs))
            if inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def make_net(
    norm: NormFactory = BatchNorm2d,
    *,
    conv: type[nn.Conv2d] = nn.Conv2d,
    widths: Sequence[int] = WIDTHS,
) -> nn.Sequential:
    """Return a classifier of (N, 1, 8, 8) images: a stem, three stages of two blocks, mean, linear.

    15 norm layers; the maps of the stages are 8x8, 4x4 and 2x2.
    """
    layers: list[nn.Module] = [
        conv(1, widths[0], 3, padding=1, bias=False),
        norm(widths[0]),
        nn.ReLU(),
    ]
    channels = widths[0]
    for width in widths:
        for _ in range(BLOCKS):
            layers.append(ResidualBlock(channels, width, width // channels, norm, conv))
            channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES)
    )

"""A small healthy network with data, and what a diagnosis must leave as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rethinking_bn.population import estimate_population_statistics

IMAGES, BATCHES = 64, 16


class Block(nn.Module):
    """conv-norm-relu-conv-norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class Net(nn.Module):
    """A stem and two blocks: five BN layers; (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.layer1, self.layer2 = Block(8, 12), Block(12, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.bn(self.stem(x)).relu()))
        return self.fc(x.mean((2, 3)))


def batches(count: int = BATCHES, images: int = IMAGES, seed: int = 0) -> list[Tensor]:
    """Batches (N, 3, 8, 8) of images whose contrast, brightness and pixels differ."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, 3, 8, 8, generator=g) * (0.5 + torch.rand(images, 1, 1, 1, generator=g))
        + torch.randn(images, 3, 1, 1, generator=g)
        for _ in range(count)
    ]


def healthy(seed: int = 0) -> Net:
    """A network whose stored statistics are those of such batches, in eval mode."""
    torch.manual_seed(seed)
    net = Net()
    data = batches(8, seed=100 + seed)
    estimate_population_statistics(net, data, len(data), progress=False)
    return net.eval()

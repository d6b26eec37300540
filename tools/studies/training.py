"""The small residual network of the classification studies: how it is trained and evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rethinking_bn.layers import BatchNorm2d, BatchStatNorm2d
from rethinking_bn.population import estimate_population_statistics
from studies.data import NUM_CLASSES, Split, shuffled_indices
from studies.study import Settings

MOMENTUM, WEIGHT_DECAY, WARMUP = 0.9, 1e-4, 0.05  # WARMUP: fraction of the steps
Schedule = Callable[[int, int, float], float]
SoftLoss = Callable[[Tensor, Tensor], Tensor]
_ROWS = 512  # images in one forward of an evaluation
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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(1.0, WARMUP * steps))
    return peak * warm * (1 + math.cos(math.pi * step / steps)) / 2


def constant_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up, then the peak to the end."""
    return peak * min(1.0, (step + 1) / max(1.0, WARMUP * steps))


def train(
    net: nn.Module,
    data: Split,
    batches: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    nbs: int | None = None,
    micro_batch: int | None = None,
    label: str | None = "training",
    schedule: Schedule = learning_rate,
    soft_loss: SoftLoss | None = None,
) -> Iterator[int]:
    """Train with SGD; yields the number of steps done after each, the network in training mode.

    Args:
        batches: indices into ``data``, at least ``steps`` batches of them.
        lr: peak learning rate.
        nbs: normalisation batch size: consecutive samples that BatchNorm normalises together;
            None: the whole batch.
        micro_batch: samples in one forward and backward, whose gradients add up to the batch's;
            None: the whole batch.
        label: what the progress bar says; None: no bar.
        schedule: (step, steps, lr) -> the rate of a step.
        soft_loss: (images, logits) -> what is added to the cross entropy.
    """
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad],
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    net.train()
    bar = tqdm(range(steps), desc=label, leave=False, mininterval=0.5, disable=label is None)
    for step, indices in zip(bar, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, lr)
        optimizer.zero_grad()
        for part in indices.split(micro_batch or len(indices)):
            images, labels = data.take(part)
            with normalised_in_groups(net, len(part), nbs):
                logits = net(images)
                loss = F.cross_entropy(logits, labels)
                if soft_loss is not None:
                    loss = loss + soft_loss(images, logits)
            (loss * (len(part) / len(indices))).backward()
        optimizer.step()
        yield step + 1


def train_to_the_end(*args: Any, **options: Any) -> None:
    """Run :func:`train` without looking in between."""
    for _ in train(*args, **options):
        pass


def trained(
    settings: Settings, data: Split, seed: int, *args: Any, make: Any = make_net, **options: Any
) -> nn.Module:
    """Return a new network after training in shuffled batches, as settings say.

    Args:
        settings: with batch_size, steps and lr.
        args: of ``make``.
        options: of :func:`train`, in place of those of the settings.
    """
    torch.manual_seed(seed)
    net: nn.Module = make(*args).to(data.images.device)
    batches = shuffled_indices(len(data.labels), settings["batch_size"], seed)
    own = {name: settings[name] for name in ("steps", "lr") if name not in options}
    train_to_the_end(net, data, batches, **own, **options)
    return net


@contextmanager
def normalised_in_groups(net: nn.Module, rows: int, nbs: int | None) -> Iterator[None]:
    """Let every BatchNorm normalise ``nbs`` consecutive samples apart, as GPUs of ``nbs`` would."""
    with ExitStack() as stack:
        if nbs is not None and nbs < rows:
            sizes = [nbs] * (rows // nbs) + ([rows % nbs] if rows % nbs else [])
            for module in net.modules():
                if isinstance(module, BatchNorm2d):
                    stack.enter_context(module.row_groups(sizes))
        yield


@torch.no_grad()
def error(net: nn.Module, data: Split) -> float:
    """Return the error in % by population statistics."""
    net.eval()
    wrong = [net(x).argmax(dim=1) != y for x, y in _chunks(data, _ROWS)]
    net.train()
    return 100 * float(torch.cat(wrong).float().mean())


@torch.no_grad()
def mini_batch_error(net: nn.Module, data: Split, nbs: int) -> float:
    """Return the error in % when every ``nbs`` consecutive samples are normalised by themselves."""
    own = make_net(BatchStatNorm2d).to(data.images.device)
    own.load_state_dict(net.state_dict())
    own.eval()
    wrong = []
    for x, y in _chunks(data, max(1, _ROWS // nbs) * nbs):
        with normalised_in_groups(own, len(x), nbs):
            wrong.append(own(x).argmax(dim=1) != y)
    return 100 * float(torch.cat(wrong).float().mean())


def _chunks(data: Split, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(data.images.split(rows), data.labels.split(rows), strict=True)


def precise(net: nn.Module, images: Tensor, batch_size: int) -> None:
    """Estimate the population statistics on ``images`` in batches, those that are full (PreciseBN).

    A single incomplete batch is taken as it is.
    """
    batches = images.split(batch_size)
    full = [b for b in batches if len(b) == batch_size] or list(batches)
    estimate_population_statistics(net.train(), full, len(full), labelled=True, progress=False)

"""How the classification studies train and evaluate their network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rethinking_bn.layers import BatchNorm2d, BatchStatNorm2d
from rethinking_bn.population import estimate_population_statistics
from studies.data import Split
from studies.network import make_net

MOMENTUM, WEIGHT_DECAY, WARMUP = 0.9, 1e-4, 0.05  # WARMUP: fraction of the steps
Schedule = Callable[[int, int, float], float]
SoftLoss = Callable[[Tensor, Tensor], Tensor]
_ROWS = 512  # images in one forward of an evaluation


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
    label: str | None = "",
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


def train_to_the_end(*args: object, **options: object) -> None:
    """Run :func:`train` without looking in between."""
    for _ in train(*args, **options):  # type: ignore[arg-type]
        pass


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

"""Handwritten digits for the classification studies: scikit-learn's bundled scans, no download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rethinking_bn.data.corruptions import corrupt
from rethinking_bn.randomness import derive_seed

NUM_CLASSES = 10
# conditions of the images, for load_digits: as different cameras may see them, and for a first look
CAMERAS = {"copies": 2, "contrast": 0.1, "brightness": 2.0}
QUICK_CAMERAS = {**CAMERAS, "copies": 1}
NUM_TRAIN = 1000  # of 1797 images; the rest is for testing
_SPLIT_SEED = 2021  # the same split in every study and for every seed


class Split(NamedTuple):
    """Images (N, 1, 8, 8) float32, as scanned in [0, 1], and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Split:
        """Return the samples at ``indices`` (n,)."""
        return Split(self.images[indices], self.labels[indices])


class Digits(NamedTuple):
    """Samples to train on and samples to test on."""

    train: Split
    test: Split


def load_digits(
    device: torch.device, seed: int = 0, conditions: Mapping[str, Any] | None = None
) -> Digits:
    """Return the 1797 digits of the UCI test set (8x8, 17 grey levels), split once and for all.

    Args:
        seed: of the training images' conditions; those of the test images are always the same.
        conditions: arguments of :func:`varied`; None: the scans as they are.

    Raises:
        ImportError: without scikit-learn.
    """
    from sklearn.datasets import load_digits as load  # only this needs it

    images, labels = load(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    x = torch.from_numpy(images[order] / 16).float().view(-1, 1, 8, 8).to(device)
    y = torch.from_numpy(labels[order]).long().to(device)
    train, test = Split(x[:NUM_TRAIN], y[:NUM_TRAIN]), Split(x[NUM_TRAIN:], y[NUM_TRAIN:])
    if conditions is not None:
        train = varied(train, **conditions, seed=derive_seed(_SPLIT_SEED, seed + 1))
        test = varied(test, **conditions, seed=_SPLIT_SEED)
    return Digits(train, test)


def corrupted(split: Split, name: str, severity: int, seed: int) -> Split:
    """Return the same scans with every image corrupted by :func:`rethinking_bn.data.corrupt`."""
    pixels = (split.images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    images = [
        corrupt(image, name, severity=severity, seed=(seed, number))
        for number, image in enumerate(pixels)
    ]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return Split(x.to(split.images.device), split.labels)


def varied(
    split: Split,
    *,
    copies: int = 1,
    contrast: float = 1.0,
    brightness: float = 0.0,
    noise: float = 0.0,
    seed: int,
) -> Split:
    """Return every image as ``copies`` cameras may have seen it: scale · image + offset + noise.

    The scans are all alike, photographs are not. What one image's features have to do with
    another's is what BatchNorm lives on.

    Args:
        copies: of each image, each with its own scale, offset and noise.
        contrast: the lowest scale; the highest is 1, and its logarithm is uniform.
        brightness: offsets are uniform in ±brightness, in units of the full range of grey.
        noise: standard deviation of the pixels' Gaussian noise, likewise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = split.images.repeat(copies, 1, 1, 1)
    each = (len(x), 1, 1, 1)
    scale = contrast ** torch.rand(each, generator=generator)
    offset = brightness * (2 * torch.rand(each, generator=generator) - 1)
    grain = noise * torch.randn(x.shape, generator=generator)
    x = x * scale.to(x) + offset.to(x) + grain.to(x)
    return Split(x, split.labels.repeat(copies))


def shuffled_indices(num_samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of indices (batch_size,) for ever, epoch after epoch, each newly shuffled.

    Samples that do not fill the last batch of an epoch are left out of that epoch.

    Raises:
        ValueError: when there are fewer samples than one batch needs.
    """
    if not 0 < batch_size <= num_samples:
        raise ValueError(f"batch_size must be 1 to {num_samples}, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_samples, generator=generator)
        yield from order[: num_samples - num_samples % batch_size].split(batch_size)


def patterned_indices(
    labels: Tensor, num_groups: int, classes: int, per_class: int, seed: int
) -> Iterator[Tensor]:
    """Yield batches of ``num_groups`` groups of a fixed pattern, for ever.

    A group is ``per_class`` samples of each of ``classes`` classes drawn at random, in an order
    drawn at random: what a class's pair partner is can be told from the group alone.
    """
    generator = torch.Generator().manual_seed(seed)
    of_class = [(labels.cpu() == c).nonzero()[:, 0] for c in range(NUM_CLASSES)]
    while True:
        groups = []
        for _ in range(num_groups):
            chosen = torch.randperm(NUM_CLASSES, generator=generator)[:classes].tolist()
            rows = [
                of_class[c][torch.randperm(len(of_class[c]), generator=generator)[:per_class]]
                for c in chosen
            ]
            group = torch.cat(rows)
            groups.append(group[torch.randperm(len(group), generator=generator)])
        yield torch.cat(groups)

"""Corrupt images: contrast, gaussian noise and JPEG, at the five severities of ImageNet-C.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), with its constants; results are rounded where theirs are truncated.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Severity 1 to 5. contrast: factor on the distance to the image's mean colour; gaussian_noise:
# standard deviation for pixels in [0, 1]; jpeg: quality setting of the encoder.
SEVERITIES: dict[str, tuple[float, ...]] = {
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "jpeg": (25, 18, 15, 10, 7),
}
CORRUPTIONS = tuple(SEVERITIES)


def corrupt(
    image: NDArray[np.uint8], name: str, *, severity: int = 3, seed: int | Sequence[int] = 0
) -> NDArray[np.uint8]:
    """Return a corrupted copy of an image; equal arguments give equal pixels.

    Args:
        image: (H, W, C) uint8 with C = 1 or 3.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: of the noise, one per image; non-negative. The other corruptions draw nothing.

    Returns:
        (H, W, C) uint8. JPEG pixels are those of the JPEG library that Pillow was built with.

    Raises:
        ValueError: for an unknown name, a severity out of range or an array of another kind.
    """
    if name not in SEVERITIES:
        raise ValueError(f"unknown corruption {name!r}; choose from {', '.join(CORRUPTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            "image must be a uint8 array of shape (H, W, 1) or (H, W, 3), "
            f"got {image.dtype} of shape {image.shape}"
        )
    constant = SEVERITIES[name][severity - 1]
    if name == "jpeg":  # with the encoder's own chroma subsampling
        buffer = io.BytesIO()
        plain = image[:, :, 0] if image.shape[2] == 1 else image  # a grey image has no channel axis
        Image.fromarray(plain).save(buffer, "JPEG", quality=int(constant))
        return np.asarray(Image.open(buffer)).reshape(image.shape)
    if name == "contrast":
        mean = image.sum(axis=(0, 1), dtype=np.int64) / (image.shape[0] * image.shape[1])
        values = (image - mean) * constant + mean
    else:
        noise = np.random.default_rng(seed).standard_normal(image.shape)
        values = image + 255 * constant * noise
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)

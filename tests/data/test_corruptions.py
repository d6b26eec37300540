"""Corruptions: their formulas written out, severities in order, the same pixels every time."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rethinking_bn.data import CORRUPTIONS, corrupt
from rethinking_bn.data.shapes import draw_sample


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return draw_sample("val", 0)[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_deterministic_and_out_of_place(name: str, image: NDArray[np.uint8]) -> None:
    before = image.copy()
    one, other = (corrupt(image, name, severity=4, seed=[3, 9]) for _ in range(2))
    assert one.dtype == np.uint8 and not np.shares_memory(one, image)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(image, before)
    assert one.shape == image.shape and not np.array_equal(one, image)


def test_contrast_pulls_every_channel_to_its_mean() -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[0], pixels[1] = (200, 100, 40), (0, 20, 40)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), start=1):
        result = corrupt(pixels, "contrast", severity=severity)
        assert result[0, 0].tolist() == [round(100 + factor * 100), round(60 + factor * 40), 40]
        assert result[1, 1].tolist() == [round(100 - factor * 100), round(60 - factor * 40), 40]


def test_gaussian_noise_has_the_deviation_of_its_severity() -> None:
    grey = np.full((300, 300, 3), 128, dtype=np.uint8)
    for severity, deviation in enumerate((0.08, 0.12, 0.18, 0.26, 0.38), start=1):
        noise = corrupt(grey, "gaussian_noise", severity=severity, seed=5).astype(float) - 128
        # Within one deviation nothing is clipped: the share there is that of a normal variable.
        limit = np.floor(255 * deviation) + 0.5
        expected = math.erf(limit / (255 * deviation) / math.sqrt(2))
        assert np.mean(np.abs(noise) < limit) == pytest.approx(expected, abs=0.005)
        assert noise.mean() == pytest.approx(0, abs=0.5)
    seeds = [corrupt(grey, "gaussian_noise", seed=seed) for seed in (1, 2)]
    assert not np.array_equal(*seeds)


def test_jpeg_is_an_encoding_of_its_quality(image: NDArray[np.uint8]) -> None:
    for severity, quality in enumerate((25, 18, 15, 10, 7), start=1):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        expected = np.array(Image.open(buffer))
        np.testing.assert_array_equal(corrupt(image, "jpeg", severity=severity), expected)


def test_bad_arguments(image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="'fog'.*contrast, gaussian_noise, jpeg"):
        corrupt(image, "fog")
    for severity in (0, 6, 2.5):
        with pytest.raises(ValueError, match=f"severity.*{severity}"):
            corrupt(image, "jpeg", severity=severity)  # type: ignore[arg-type]
    for pixels in (image / 255, image[:, :, 0], image[:, :, :2]):
        with pytest.raises(ValueError, match="uint8 array of shape"):
            corrupt(pixels, "jpeg")  # type: ignore[arg-type]

"""The drawing and its corruptions: reproducible, by their formulas, objects for every level."""

from __future__ import annotations

import hashlib
import io
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rethinking_bn.data import CORRUPTIONS, corrupt, shapes
from rethinking_bn.data.shapes import CLASSES, OBJECT_SIZES, Shape, draw_sample

DIGEST = "0e035e81db094b5df9cf925769117fed39b295470c8b0e86d12583b5be14d271"
Sample = tuple[NDArray[np.uint8], list[Shape]]


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return draw_sample("val", 0)[0]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [draw_sample("train", index) for index in range(120)]


def test_drawing_belongs_to_this_version() -> None:
    """A change of what is drawn shows here: raise VERSION with it, then this digest."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for index in range(3):
            image, objects = draw_sample(split, index)
            digest.update(image.tobytes())
            for shape in objects:
                vertices = np.rint(100 * shape.polygon).astype(np.int32)
                digest.update(bytes([shape.label]) + vertices.tobytes())
    assert (shapes.VERSION, digest.hexdigest()) == (1, DIGEST)


def test_sizes_are_log_uniform_and_reach_every_pyramid_level(samples: list[Sample]) -> None:
    boxes = np.array([shape.box for _, objects in samples for shape in objects])
    sizes = np.sort(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))
    low, high = OBJECT_SIZES
    assert sizes[0] > low - 0.1 and sizes[-1] < high + 0.1
    # Kolmogorov's distance from the log-uniform distribution (a large shape is more often left
    # out for want of room, and the sample is finite).
    uniform = np.log(sizes / low) / np.log(high / low)
    assert np.abs(uniform - (np.arange(len(sizes)) + 0.5) / len(sizes)).max() < 0.08
    # Anchors 10 * 2 ** level * 2 ** (0, 1/3, 2/3): levels meet half way between two sizes.
    bounds = [10 * 2**level * 2 ** (-1 / 6) for level in range(1, 5)]
    share = np.bincount(np.digitize(sizes, bounds), minlength=5) / len(sizes)
    assert (share[:4] > 0.15).all() and share[4] > 0.04


def test_shapes_are_what_their_class_says_and_lie_inside_the_image(samples: list[Sample]) -> None:
    for image, objects in samples:
        assert 1 <= len(objects) <= 9
        for shape in objects:
            x0, y0, x1, y1 = shape.box
            assert 0 <= x0 < x1 <= image.shape[1] and 0 <= y0 < y1 <= image.shape[0]
            vertices = shape.polygon
            sides = np.linalg.norm(np.roll(vertices, -1, axis=0) - vertices, axis=1)
            if CLASSES[shape.label] == "circle":
                centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
                radii = np.linalg.norm(vertices - centre, axis=1)
                assert len(vertices) == 32 and np.ptp(radii) < 0.03
                np.testing.assert_allclose(shape.area, np.pi * radii[0] ** 2, rtol=0.01)
            elif CLASSES[shape.label] == "square":
                diagonals = np.linalg.norm(vertices[2:] - vertices[:2], axis=1)
                assert len(vertices) == 4 and np.ptp(sides) < 0.05 and np.ptp(diagonals) < 0.05
                np.testing.assert_allclose(shape.area, sides[0] ** 2, rtol=0.01)
            else:
                a, b, c = sides
                heron = np.sqrt((s := sides.sum() / 2) * (s - a) * (s - b) * (s - c))
                assert len(vertices) == 3
                np.testing.assert_allclose(shape.area, heron, rtol=1e-9)


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

"""The drawing: reproducible, annotated where it paints, objects for every pyramid level."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from rethinking_bn.data import shapes
from rethinking_bn.data.shapes import CLASSES, OBJECT_SIZES, Shape, draw_sample

DIGEST = "0e035e81db094b5df9cf925769117fed39b295470c8b0e86d12583b5be14d271"
Sample = tuple[NDArray[np.uint8], list[Shape]]


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

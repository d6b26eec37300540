"""Draw the shapes data set: circles, squares and triangles over textured backgrounds.

One sample depends only on (seed, split, index), so a data set of fewer images is a prefix of a
larger one. The random numbers are uniform doubles and the pixels come from elementwise arithmetic
(no BLAS, no drawing library), so that the same pixels come out everywhere. A changed drawing needs
a new :data:`VERSION`. Coordinates are COCO's: continuous, x to the right and y down, pixel (row i,
column j) covers [j, j + 1] x [i, i + 1].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 1  # in the folder's name: data drawn by another version is never mixed in
SEED = 2021
CLASSES = ("circle", "square", "triangle")
SPLITS = {"train": 1000, "val": 200}  # number of images
IMAGE_SIZES = ((192, 224), (224, 192))  # (height, width) in pixels, each half of the images
OBJECTS = (3, 9)  # shapes tried per image, both inclusive
# Square root of the bounding box's area in pixels, log-uniform: an equal share per octave, so
# that each of five FPN levels gets its objects. Made for anchors of 10, 20, 40, 80 and 160 pixels
# on p3..p7 (the stock sizes times 5/16), whose levels meet at 18, 36, 71 and 142 pixels.
OBJECT_SIZES = (9.0, 176.0)
# Larger shapes are painted first; this share of a shape's pixels stays in sight.
MIN_VISIBLE = 0.7
_CIRCLE_VERTICES = 32  # a multiple of 4, so that the polygon touches its box on all sides
_TRIES = 20  # places tried per shape before it is left out


class Shape(NamedTuple):
    """One object; box and polygon are of the full shape, also where a later one hides it."""

    label: int  # index into CLASSES
    polygon: NDArray[np.float64]  # (V, 2) convex, in pixels, rounded to 0.01

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Return the extents (x0, y0, x1, y1) of the polygon in pixels."""
        (x0, y0), (x1, y1) = self.polygon.min(axis=0), self.polygon.max(axis=0)
        return float(x0), float(y0), float(x1), float(y1)

    @property
    def area(self) -> float:
        """Return the area of the polygon in square pixels (shoelace formula)."""
        x, y = self.polygon[:, 0], self.polygon[:, 1]
        return float(abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2)


def draw_sample(split: str, index: int) -> tuple[NDArray[np.uint8], list[Shape]]:
    """Draw one image and its objects, largest first (painted in that order).

    Args:
        split: a key of :data:`SPLITS`.
        index: number of the image within the split, from 0.

    Returns:
        image (H, W, 3) uint8 in RGB, and its shapes, at least one.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    rng = np.random.default_rng([SEED, VERSION, list(SPLITS).index(split), index])
    height, width = IMAGE_SIZES[int(rng.random() < 0.5)]
    texture = _texture(rng, height, width)
    canvas = 50 + 155 * rng.random(3) + texture
    owner = np.zeros((height, width), dtype=np.intp)  # 0 background, i the i-th shape
    visible = np.array([np.inf])  # pixels to be seen of each owner, and the fewest allowed
    allowed = np.array([0.0])

    count = OBJECTS[0] + int(rng.random() * (OBJECTS[1] - OBJECTS[0] + 1))
    low, high = np.log(OBJECT_SIZES)
    shapes: list[Shape] = []
    for size in np.sort(np.exp(low + (high - low) * rng.random(count)))[::-1]:
        label = int(rng.random() * len(CLASSES))
        outline = _outline(rng, label)
        extent = outline.max(axis=0)
        outline *= min(size / np.sqrt(extent.prod()), width / extent[0], height / extent[1])
        colours = 255 * rng.random((8, 3))
        room = np.array([width, height]) - outline.max(axis=0)
        for position in rng.random((_TRIES, 2)) * room:
            shape = Shape(label, np.round(outline + position, 2))
            window, coverage = _rasterise(shape)
            inside = coverage >= 0.5
            hidden = np.bincount(owner[window][inside], minlength=len(visible))
            if (visible - hidden >= allowed).all():
                break
        else:
            continue
        # The colour that stands out most from what it covers.
        under = canvas[window][inside].mean(axis=0)
        colour = colours[((colours - under) ** 2).sum(axis=1).argmax()]
        paint = colour + 0.5 * texture[::-1, ::-1][window]
        canvas[window] += coverage[..., None] * (paint - canvas[window])
        shapes.append(shape)
        owner[window][inside] = len(shapes)
        pixels = float(inside.sum())
        visible = np.append(visible - hidden, pixels)
        allowed = np.append(allowed, MIN_VISIBLE * pixels)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), shapes


def _outline(rng: np.random.Generator, label: int) -> NDArray[np.float64]:
    """Return a convex polygon (V, 2) of no particular size, its box's corner at the origin."""
    turn = 2 * np.pi * rng.random()
    jitter = rng.random(3) - 0.5
    if CLASSES[label] == "circle":
        angles = 2 * np.pi * np.arange(_CIRCLE_VERTICES) / _CIRCLE_VERTICES
    elif CLASSES[label] == "square":
        angles = turn + 2 * np.pi * np.arange(4) / 4
    else:
        angles = turn + 2 * np.pi * (np.arange(3) + 0.25 * jitter) / 3
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.asarray(outline - outline.min(axis=0))


def _rasterise(shape: Shape) -> tuple[tuple[slice, slice], NDArray[np.float64]]:
    """Return the window (rows, columns) around a convex polygon and each pixel's coverage.

    Coverage falls from 1 to 0 over the pixel that straddles an edge: 0.5 minus the pixel
    centre's signed distance to the nearest edge line, clipped.
    """
    x0, y0, x1, y1 = shape.box
    window = slice(int(y0), int(np.ceil(y1))), slice(int(x0), int(np.ceil(x1)))
    y = np.arange(window[0].start, window[0].stop)[:, None] + 0.5
    x = np.arange(window[1].start, window[1].stop)[None, :] + 0.5
    edges = np.roll(shape.polygon, -1, axis=0) - shape.polygon
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1)  # outwards: the angles increase
    normals /= np.sqrt((normals**2).sum(axis=1, keepdims=True))
    distance = np.full((y.size, x.size), -np.inf)
    for (a, b), (vx, vy) in zip(normals, shape.polygon, strict=True):
        np.maximum(distance, a * (x - vx) + b * (y - vy), out=distance)
    return window, np.clip(0.5 - distance, 0, 1)


def _texture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Return smooth colour noise (H, W, 3) around 0, bilinear value noise in cells of 32, 8 and 2.

    Each scale is added to the coarser ones on its own grid (a point per cell corner), so that
    only the last interpolation works on the full size. H and W are multiples of 32.
    """
    total = np.zeros((height // 32 + 1, width // 32 + 1, 3))
    for amplitude, factor in ((60.0, 4), (30.0, 4), (20.0, 2)):
        total += amplitude * (rng.random(total.shape) - 0.5)
        for axis in (0, 1):  # n * factor + 1 points along the axis from n + 1
            points = np.moveaxis(total, axis, 0)
            start, step = points[:-1, None], (points[1:] - points[:-1])[:, None]
            fraction = (np.arange(factor) / factor)[None, :, None, None]
            fine = (start + fraction * step).reshape(-1, *points.shape[1:])
            total = np.moveaxis(np.concatenate([fine, points[-1:]]), 0, axis)
    return total[:height, :width]

"""What box and mask heads with our norms share: norms by name, and batches of so many images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from detectron2.structures import Instances
from torch import Tensor, nn

from rethinking_bn.checkpoint import require_statistics
from rethinking_bn.layers import MABN2d, get_norm, norm_names
from rethinking_bn.layers.convert import centre_convolutions
from rethinking_bn.shuffle.layers import mixes_rows, pools_ranks

logger = logging.getLogger(__name__)

Norm = str | Callable[[int], nn.Module] | None


def norm_factory(norm: Norm, options: Mapping[str, Any], key: str) -> Any:
    """Return what detectron2's heads take as ``conv_norm``: channels -> layer, or "" for none.

    Args:
        norm: a name that :func:`rethinking_bn.layers.get_norm` knows, a callable from channels to
            a layer, or "" or None.
        options: further arguments of ``get_norm``, for a name.
        key: the config key that gives the norm, for the message.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if norm is None or norm == "":
        return ""
    if callable(norm):
        return norm
    if norm not in norm_names():
        raise ValueError(f"{key} must be one of {norm_names()} or a callable, got {norm!r}")
    return lambda channels: get_norm(norm, channels, **options)


class NormHead:
    """Mixin of detectron2's convolutional heads, nn.Sequential with ``conv_norm_relus``.

    Rows are RoIs, those of one image after those of another. With ``norm_images`` = k, a BN
    normalises the rows of k images at a time in training and in population training: the
    normalisation batch size (NBS) of sections 4 and 6 of arXiv 2105.07576. A layer that
    normalises by mini-batches at inference too (norm BatchStatBN) then takes each image by
    itself, however many are in the batch. Which rows belong to which image is told by
    :meth:`image_rows`, and forgotten when that ends (activation checkpointing must repeat it).
    """

    allow_missing_statistics = False
    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        conv_norm_relus: list[nn.Module]
        norm_images: int
        _image_rows: tuple[int, ...] | None
    _image_rows = None

    def init_norms(self, norm_images: int) -> None:
        """Finish the construction of a head: centre MABN's convolutions, take ``norm_images``.

        Raises:
            ValueError: if ``norm_images`` is negative, or positive with a norm whose batch it
                cannot divide.
        """
        norms = [norm for norm in map(_norm_of, self.conv_norm_relus) if norm is not None]
        if any(isinstance(norm, MABN2d) for norm in norms):
            assert isinstance(self, nn.Module)  # for the type checker
            centre_convolutions(self)
        if norm_images < 0:
            raise ValueError(f"norm_images (MODEL.ROI_HEADS.NORM_IMAGES) is {norm_images} < 0")
        for norm in norms if norm_images else ():
            pooled = pools_ranks(norm)
            if mixes_rows(norm) and (pooled or not hasattr(norm, "row_groups")):
                why = "pools all images of all ranks" if pooled else "takes all rows together"
                raise ValueError(
                    f"norm_images (MODEL.ROI_HEADS.NORM_IMAGES) is {norm_images}, but "
                    f"{type(norm).__name__} {why}: set it to 0, or the norm to BN or BatchStatBN"
                )
        self.norm_images = norm_images
        logger.info(
            "%s: %s, %s",
            type(self).__name__,
            " and ".join(sorted({type(norm).__name__ for norm in norms})) or "no norm",
            f"{norm_images} image(s) at a time" if norm_images else "all images together",
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load, unless the weights of this head lack the statistics of its norms."""
        error_msgs = kwargs["error_msgs"] if "error_msgs" in kwargs else args[-1]
        allowed = self.allow_missing_statistics
        assert isinstance(self, nn.Module)  # for the type checker
        require_statistics(self, state_dict, prefix, error_msgs, allow_missing=allowed)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> Any:
        # called by torch.jit.script
        if self.norm_images and any(
            getattr(norm, "batch_stats_at_inference", False) for norm in self.batch_norms()
        ):
            raise ValueError(
                f"{type(self).__name__} normalises each image by itself at inference (MODEL."
                "ROI_HEADS.NORM_IMAGES with BatchStatBN), which TorchScript cannot express: trace "
                "the model"
            )
        return self

    def batch_norms(self) -> list[nn.Module]:
        """Return the norm layers whose result for a row depends on the other rows."""
        norms = map(_norm_of, self.conv_norm_relus)
        return [norm for norm in norms if norm is not None and mixes_rows(norm)]

    def forward_unshuffled(self, x: Tensor) -> Tensor:
        """Run all layers one after the other, on all rows together; read by TorchScript."""
        for layer in self:  # type: ignore[attr-defined]
            x = layer(x)
        return x

    @contextmanager
    def image_rows(self, rows: Sequence[int]) -> Iterator[None]:
        """Say how many of the rows of a forward belong to each of the N images, in their order."""
        before = self._image_rows
        self._image_rows = tuple(rows)
        try:
            yield
        finally:
            self._image_rows = before

    @contextmanager
    def normalizing_images(self, num_rows: int, *, shuffled: bool = False) -> Iterator[None]:
        """Let the BN layers normalise the groups of rows that ``norm_images`` asks for.

        Args:
            num_rows: rows in the batch.
            shuffled: whether they came from a shuffle. They are then split into as many groups as
                the images on this rank would be, equal but for one row.

        Raises:
            ValueError: when nobody has said which rows belong to which image, what was said does
                not fit, or the number of images is no multiple of ``norm_images``.
        """
        with ExitStack() as stack:
            if self.norm_images:
                norms = self.batch_norms()
                training = any(norm.training for norm in norms)
                sizes = self._group_sizes(num_rows, training=training, shuffled=shuffled)
                for norm in norms:
                    stack.enter_context(norm.row_groups(sizes))  # type: ignore[operator]
            yield

    def _group_sizes(self, num_rows: int, *, training: bool, shuffled: bool) -> list[int] | None:
        rows, k = self._image_rows, self.norm_images
        if rows is None:
            raise ValueError(
                f"{type(self).__name__} normalises {k} images at a time (MODEL.ROI_HEADS."
                "NORM_IMAGES) and must be called within `with head.image_rows(...)`, as "
                "NormImagesROIHeads does"
            )
        if not shuffled and sum(rows) != num_rows:
            raise ValueError(f"images with {rows} rows do not sum up to the {num_rows} rows given")
        if not rows:
            return None
        if not training:
            return list(rows)
        if len(rows) % k:
            raise ValueError(
                f"MODEL.ROI_HEADS.NORM_IMAGES {k} does not divide the {len(rows)} images of a "
                "batch on this rank"
            )
        if not shuffled:
            return [sum(rows[i : i + k]) for i in range(0, len(rows), k)]
        groups = len(rows) // k
        ends = [group * num_rows // groups for group in range(groups + 1)]
        return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def rows_of_images(instances: Sequence[Instances]) -> list[int]:
    """Return how many instances each image has."""
    # not len(), which would make constants of what torch.jit.trace follows
    return [of_image.__len__() for of_image in instances]


def _norm_of(layer: nn.Module) -> nn.Module | None:
    norm = getattr(layer, "norm", None)
    return norm if isinstance(norm, nn.Module) else None

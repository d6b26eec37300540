"""What box and mask heads share: norms by name, images normalised together, shuffled RoIs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from rethinking_bn.checkpoint import require_statistics
from rethinking_bn.config import check_has_keys, images_per_pass
from rethinking_bn.layers import get_norm, norm_names
from rethinking_bn.layers.bn_like import communicates
from rethinking_bn.layers.convert import centre_convolutions
from rethinking_bn.shuffle.layers import ShuffledLayers, mixes_rows, mixes_rows_of_a_rank

Norm = str | Callable[[int], nn.Module] | None

#: the keys that :func:`norm_options` reads for a norm
NORM_OPTIONS = {"GN": "MODEL.GN", "MABN": "MODEL.MABN"}


def norm_options(cfg: CfgNode, norm: str) -> dict[str, Any]:
    """Return the options that the config has for ``get_norm(norm, channels, **options)``.

    MABN's ``batch_size`` is in images, for layers that see RoIs as well. It is None where
    MODEL.MABN.BATCH_SIZE is 0 and the images of a forward on the ranks now running do not fit: a
    model trained on other ranks can be evaluated, and a training stops at its first layer.

    Raises:
        ValueError: when MODEL.MABN.BATCH_SIZE does not divide MODEL.MABN.SIMULATED_BATCH_SIZE.
    """
    if norm == "GN":
        return {"num_groups": cfg.MODEL.GN.NUM_GROUPS}
    if norm != "MABN":
        return {}
    keys = cfg.MODEL.MABN
    simulated, batch_size = keys.SIMULATED_BATCH_SIZE, keys.BATCH_SIZE
    if batch_size and (batch_size < 0 or simulated < 1 or simulated % batch_size):
        raise ValueError(
            f"MODEL.MABN.SIMULATED_BATCH_SIZE {simulated} is not a multiple of "
            f"MODEL.MABN.BATCH_SIZE {batch_size}"
        )
    if not batch_size:
        with suppress(ValueError):
            batch_size = images_per_pass(cfg, comm.get_world_size())
        batch_size = batch_size if batch_size and simulated % batch_size == 0 else None
    return {
        "simulated_batch_size": simulated,
        "batch_size": batch_size,
        "momentum": keys.MOMENTUM,
        "warmup_iters": keys.WARMUP_ITERS,
        "r_max": keys.R_MAX,
    }


def check_norm(key: str, norm: Any) -> None:
    """Raise a ValueError unless the norm that a config key gives is a known one or a callable."""
    if not callable(norm) and (norm or "") not in norm_names():
        raise ValueError(f"{key} must be one of {norm_names()} or a callable, got {norm!r}")


class RequiresStatistics:
    """Mixin, before an nn.Module: it refuses weights that lack the statistics of its norms."""

    #: MODEL.ALLOW_MISSING_STATISTICS: the statistics then stay as they are
    allow_missing_statistics = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        module: Any = self
        allowed = self.allow_missing_statistics
        require_statistics(module, state_dict, prefix, args[-1], allow_missing=allowed)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class NormHead(RequiresStatistics):
    """Mixin of detectron2's convolutional heads, nn.Sequential with ``conv_norm_relus``.

    Rows are RoIs, those of one image after those of another. With ``norm_images`` = k, a BN
    normalises the rows of k images at a time in training and in population training: the
    normalisation batch size (NBS) of sections 4 and 6 of arXiv 2105.07576. A layer that
    normalises by mini-batches at inference too (norm BatchStatBN) then takes each image by
    itself. :meth:`image_rows` says which rows belong to which image, until it ends (activation
    checkpointing must repeat it).
    """

    reads = ("MODEL.ROI_HEADS.NORM_IMAGES", "MODEL.ALLOW_MISSING_STATISTICS")
    norm_keys: tuple[str, ...] = ()
    #: of the config, such as "ROI_BOX_HEAD"
    section = ""

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        conv_norm_relus: list[Any]
        norm_images: int
        _image_rows: tuple[int, ...] | None
    _image_rows = None

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_norm: Norm = "",
        norm_images: int = 0,
        norm_arguments: Mapping[str, Any] | None = None,
        allow_missing_statistics: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of a pooled RoI.
            conv_norm: "BN" (statistics of this rank), "SyncBN" (pooled over ranks), "BatchStatBN"
                (the mini-batch's at inference too), "GN", "LN", "MABN" (the convolutions then have
                centred filters), "" or None; or a callable from channels to a layer.
            norm_images: images whose RoIs are normalised together; 0: all.
            norm_arguments: further arguments of :func:`rethinking_bn.layers.get_norm`.
            allow_missing_statistics: whether weights without the statistics of a norm layer load;
                those then stay as they are.
            kwargs: of detectron2's head: ``conv_dims``, output channels of each 3x3 convolution,
                which norm and ReLU follow; ``fc_dims`` of the box head; ``num_classes``,
                ``loss_weight`` and ``vis_period`` of the mask head.

        Raises:
            ValueError: for an unknown norm, a negative ``norm_images``, or a positive one with a
                norm whose batch it cannot divide (SyncBN, MABN).
        """
        check_norm(f"MODEL.{self.section}.NORM", conv_norm)
        options = norm_arguments or {}
        norm = (lambda channels: get_norm(conv_norm, channels, **options)) if conv_norm else ""
        super().__init__(input_shape, conv_norm=norm, **kwargs)  # type: ignore[call-arg]
        module: Any = self
        centre_convolutions(module)  # before MABN
        self.allow_missing_statistics, self.norm_images = allow_missing_statistics, norm_images
        if norm_images < 0:
            raise ValueError(f"norm_images (MODEL.ROI_HEADS.NORM_IMAGES) is {norm_images} < 0")
        for layer in self.batch_norms() if norm_images else ():
            if communicates(layer) or not hasattr(layer, "row_groups"):
                raise ValueError(
                    f"norm_images (MODEL.ROI_HEADS.NORM_IMAGES) is {norm_images}, but "
                    f"{type(layer).__name__} takes the rows of all images together: set it to 0, "
                    "or the norm to BN or BatchStatBN"
                )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the keys of detectron2's head, MODEL.ROI_HEADS.NORM_IMAGES and the norm's own.

        Raises:
            ValueError: when ``cfg`` lacks this project's keys.
        """
        check_has_keys(cfg)
        return {
            **super().from_config(cfg, input_shape),  # type: ignore[misc]
            "norm_images": cfg.MODEL.ROI_HEADS.NORM_IMAGES,
            "norm_arguments": norm_options(cfg, cfg.MODEL[cls.section].NORM),
            "allow_missing_statistics": cfg.MODEL.ALLOW_MISSING_STATISTICS,
        }

    def __prepare_scriptable__(self) -> Any:
        # called by torch.jit.script
        norms = self.batch_norms() if self.norm_images else []
        if any(getattr(norm, "batch_stats_at_inference", False) for norm in norms):
            raise ValueError(
                f"{type(self).__name__} normalises each image by itself at inference (MODEL."
                "ROI_HEADS.NORM_IMAGES with BatchStatBN), which TorchScript cannot express: trace "
                "the model"
            )
        return self

    def batch_norms(self) -> list[Any]:
        """Return the norm layers whose result for a row depends on the other rows."""
        norms = [layer.norm for layer in self.conv_norm_relus]
        return [norm for norm in norms if norm is not None and mixes_rows(norm)]

    #: runs all layers one after the other, on all rows together
    forward_unshuffled = ShuffledLayers.forward_unshuffled

    def forward_images(self, x: Tensor) -> Tensor:
        """Run all layers, with the rows normalised that belong together."""
        with self.normalizing_images(len(x)):
            return self.forward_unshuffled(x)  # type: ignore[misc]

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

        Shuffled rows are split into as many groups as the images on this rank, equal but for one.

        Raises:
            ValueError: outside of :meth:`image_rows`, for rows that do not sum up, or a number of
                images that is no multiple of ``norm_images``.
        """
        with ExitStack() as stack:
            norms = self.batch_norms() if self.norm_images else []
            sizes = self._group_sizes(num_rows, norms, shuffled) if self.norm_images else None
            for norm in norms:
                stack.enter_context(norm.row_groups(sizes))
            yield

    def _group_sizes(self, num_rows: int, norms: list[Any], shuffled: bool) -> list[int] | None:
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
        if not any(norm.training for norm in norms):
            return list(rows)
        groups, remainder = divmod(len(rows), k)
        if remainder:
            raise ValueError(
                f"MODEL.ROI_HEADS.NORM_IMAGES {k} does not divide the {len(rows)} images of a "
                "batch on this rank"
            )
        if not shuffled:
            return [sum(rows[i : i + k]) for i in range(0, len(rows), k)]
        return [(i + 1) * num_rows // groups - i * num_rows // groups for i in range(groups)]


class ShuffleHead(ShuffledLayers, NormHead):
    """Mixin, before a NormHead: its BN layers see rows of all ranks, mixed at random.

    :class:`~rethinking_bn.shuffle.layers.ShuffledLayers` says what is shuffled, when, by which
    permutation, and what every rank must do (detectron2's losses do it). With ``norm_images`` = k,
    each rank splits its share into (images on the rank / k) equal normalisation batches: 8 ranks
    with two images each and k = 1 make the 16 batches of 16 ranks with one image each.

    Under a trainer that announces no iterations, they are those of detectron2's event storage.
    """

    def shuffled_norms(self) -> list[nn.Module]:
        """Return the norm layers whose result depends on which rows are on this rank."""
        return [norm for norm in self.batch_norms() if mixes_rows_of_a_rank(norm)]

    def unannounced_iteration(self) -> int:
        """Return the iteration of detectron2's event storage, 0 outside of one."""
        return get_event_storage().iter if has_event_storage() else 0

    def forward_images(self, x: Tensor) -> Tensor:
        """Run all layers on shuffled rows while a BN layer is in training mode."""
        return self.forward_shuffled(x) if self.communicates else super().forward_images(x)

    def run_on_shuffled(self, layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
        """Run layers on rows that came from a shuffle, normalised in equal batches."""
        with self.normalizing_images(len(rows), shuffled=True):
            return super().run_on_shuffled(layers, rows)

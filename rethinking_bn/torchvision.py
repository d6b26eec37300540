"""The package's heads for torchvision's detectors: what a batch is, without detectron2.

For RetinaNet, a BatchNorm over all feature levels with the three choices of Table 5 of
arXiv 2105.07576::

    head = MultiDomainBNRetinaNetHead(
        backbone.out_channels, anchor_generator.num_anchors_per_location()[0], num_classes,
        num_levels=5, train_stats="domain_specific", population_stats="domain_specific",
    )
    model = RetinaNet(backbone, num_classes, anchor_generator=anchor_generator, head=head)

For Mask R-CNN, BatchNorm heads whose RoIs are shuffled over all ranks in training (section 6)::

    model.roi_heads.box_head = ShuffleBNBoxHead((256, 7, 7), [256] * 4, [1024])
    model.roi_heads.mask_head = ShuffleBNMaskHead(256, [256] * 4, 1)

Population statistics are estimated on batches as torchvision's data loaders make them by::

    estimate_population_statistics(model, data_loader, 200, forward=run_detector)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.ops.misc import Conv2dNormActivation

from rethinking_bn.layers import MABN2d, MultiDomainBatchNorm2d, get_norm
from rethinking_bn.layers.layer_by_layer import layer_by_layer
from rethinking_bn.layers.multi_domain import TABLE_5
from rethinking_bn.shuffle.layers import ShuffledLayers, mixes_rows_of_a_rank

NormLayer = str | Callable[..., nn.Module] | None


def _factory(norm_layer: NormLayer, **options: Any) -> Callable[[int], nn.Module] | None:
    """Return channels -> layer for a name or callable, None for no norm."""
    if norm_layer is None or norm_layer == "":
        return None

    def build(channels: int) -> nn.Module:
        layer = get_norm(norm_layer, channels, **options)
        if layer is None or isinstance(layer, MABN2d):
            raise ValueError(
                f"norm_layer {norm_layer!r} does not fit torchvision's heads: it makes no layer, "
                "or MABN2d, which needs centred convolutions (CenConv2d) before it"
            )
        return layer

    return build


class _LayerByLayer:
    """Mixin, before a subnet of torchvision's RetinaNet head: it runs layer by layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # torchvision's
        self.conv: Any = layer_by_layer(self.conv)


def _flatten(maps: list[Tensor], width: int) -> Tensor:
    """Turn predictions (N, A * width, H_l, W_l) into (N, sum of H_l * W_l * A, width)."""
    each = [x.permute(0, 2, 3, 1).unflatten(3, (-1, width)).flatten(1, 3) for x in maps]
    return torch.cat(each, dim=1)


class MultiDomainBNClassificationHead(_LayerByLayer, RetinaNetClassificationHead):
    """torchvision's classification head, run layer by layer; the rest is torchvision's."""

    def forward(self, x: list[Tensor]) -> Tensor:
        """Return logits (N, sum of H_l * W_l * A, K) for L feature maps (N, C, H_l, W_l)."""
        return _flatten([self.cls_logits(y) for y in self.conv(x)], self.num_classes)


class MultiDomainBNRegressionHead(_LayerByLayer, RetinaNetRegressionHead):
    """torchvision's regression head, run layer by layer; the rest is torchvision's."""

    def forward(self, x: list[Tensor]) -> Tensor:
        """Return deltas (N, sum of H_l * W_l * A, 4) for L feature maps (N, C, H_l, W_l)."""
        return _flatten([self.bbox_reg(y) for y in self.conv(x)], 4)


class MultiDomainBNRetinaNetHead(RetinaNetHead):
    """torchvision's RetinaNet head with a BatchNorm over all feature levels, layer by layer.

    The ``head`` of torchvision's RetinaNet. Output, losses, initialisation (same draws from the
    same random state) and the keys of the state dict are torchvision's; for norms that know no
    levels, and for none, so are the values. Shared statistics and affines have the keys of
    ``norm_layer=nn.BatchNorm2d``, domain-specific ones one more index per level; a checkpoint of
    one layout loads into the other where it can be converted, as
    :class:`~rethinking_bn.layers.MultiDomainBatchNorm2d` says. torchvision's own head with
    ``nn.BatchNorm2d`` is row 3 of Table 5: train statistics per level, the rest shared.

    Args:
        in_channels: C of every level.
        num_anchors: anchors per location A.
        num_classes: K, the background included, as torchvision counts.
        norm_layer: "BN" (statistics of this rank) or "SyncBN" (pooled over ranks): layers over all
            levels. Any other name that :func:`rethinking_bn.layers.get_norm` knows but "MABN", or a
            callable from channels to a layer: layers that are called once per level. None or "": no
            norm.
        num_levels: L; the maps a backbone returns, 5 for p3 to p7.
        train_stats, population_stats, affine: "shared" (one set for all levels) or
            "domain_specific" (one per level); "" is "shared". Only for "BN" and "SyncBN".
        options: further arguments of the norm layers, such as eps and momentum.

    Raises:
        ValueError: for a norm or a choice that does not exist or fit; in the forward, for another
            number of levels.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        norm_layer: NormLayer = "BN",
        *,
        num_levels: int = 5,
        train_stats: str = "",
        population_stats: str = "",
        affine: str = "",
        **options: Any,
    ) -> None:
        super(RetinaNetHead, self).__init__()  # torchvision's would make its own two subnets
        given = {"train_stats": train_stats, "population_stats": population_stats, "affine": affine}
        chosen = {name: choice for name, choice in given.items() if choice}
        norm: Any
        if norm_layer in ("BN", "SyncBN"):
            options |= {**TABLE_5[1], **chosen, "sync": norm_layer == "SyncBN"}
            norm = partial(MultiDomainBatchNorm2d, num_domains=num_levels, **options)
        elif chosen:
            raise ValueError(
                f"{'{}={!r}'.format(*chosen.popitem())} needs norm_layer to be 'BN' or 'SyncBN', "
                f"got {norm_layer!r}"
            )
        else:
            norm = _factory(norm_layer, **options)
        self.classification_head = MultiDomainBNClassificationHead(
            in_channels, num_anchors, num_classes, norm_layer=norm
        )
        self.regression_head = MultiDomainBNRegressionHead(
            in_channels, num_anchors, norm_layer=norm
        )


class _ShuffledBlocks(ShuffledLayers):
    """Mixin of heads made of torchvision's blocks of convolution, norm and activation."""

    def shuffled_norms(self) -> list[nn.Module]:
        """Return the norm layers whose result depends on which rows are on this rank."""
        assert isinstance(self, nn.Sequential)  # for the type checker
        blocks = [b for b in self if isinstance(b, Conv2dNormActivation) and len(b) == 3]
        return [block[1] for block in blocks if mixes_rows_of_a_rank(block[1])]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the head makes of rows (R, C, H, W), one per RoI; R may be 0.

        A collective in training, which every rank must call.
        """
        if torch.jit.is_scripting():
            return self.forward_unshuffled(x)
        else:  # not compiled by TorchScript
            return self.forward_shuffled(x) if self.communicates else self.forward_unshuffled(x)


class ShuffleBNBoxHead(_ShuffledBlocks, FastRCNNConvFCHead):
    """torchvision's FastRCNNConvFCHead that normalises RoIs shuffled over all ranks.

    The ``box_head`` of torchvision's Mask R-CNN and Faster R-CNN. In training, each row travels
    to a rank as pooled: C·H·W numbers, 12,544 for 256x7x7. It returns where it is smallest after
    the last normalised layer: after the fully connected layers (1,024 numbers), or as the last
    feature map where there are none or they are wider. As many numbers travel in the backward.
    Rows that stay on their rank are not sent. At inference nothing is shuffled, and the state dict
    is the unshuffled head's.

    **Which permutation.** Call :func:`rethinking_bn.randomness.announce_iteration` (model, run
    seed, iteration) before each training step, and a resumed run draws the permutations it would
    have drawn. Otherwise they follow from the number of calls since the head was built, which a
    resumed run counts from zero again.

    **Every rank** must call the head equally often, and its loss must depend on the result, also
    when that has no rows. torchvision's mask loss does; its box loss of no RoI at all is NaN
    with every head (ground-truth boxes are proposals too, so that takes images without either).

    Args:
        input_size: (C, H, W) of a pooled RoI.
        conv_layers: output channels of each 3x3 convolution, which norm and ReLU follow.
        fc_layers: output channels of each fully connected layer.
        norm_layer: a name that :func:`rethinking_bn.layers.get_norm` knows but "MABN", a callable
            from channels to a layer, None or "". Only norms whose result depends on the rows of a
            rank, as BN's, are shuffled for.

    Returns (of the forward):
        (R, fc_layers[-1]), or (R, conv_layers[-1] * H * W) without fully connected layers.

    Raises:
        ValueError: for an unknown norm, or one that does not fit.
    """

    seed_of_head = 0

    def __init__(
        self,
        input_size: tuple[int, int, int],
        conv_layers: Sequence[int],
        fc_layers: Sequence[int],
        norm_layer: NormLayer = "BN",
    ) -> None:
        norm = _factory(norm_layer)
        super().__init__(input_size, [*conv_layers], [*fc_layers], norm_layer=norm)


class ShuffleBNMaskHead(_ShuffledBlocks, MaskRCNNHeads):
    """torchvision's MaskRCNNHeads that normalises RoIs shuffled over all ranks.

    The ``mask_head`` of torchvision's Mask R-CNN. In training, each row travels to a rank as
    pooled, 50,176 numbers for 256x14x14, and returns as the last feature map; as many numbers
    travel in the backward. All that is said of :class:`ShuffleBNBoxHead` holds here, too.

    Args:
        in_channels: C.
        layers: output channels of each 3x3 convolution, which norm and ReLU follow.
        dilation: of the convolutions.
        norm_layer: as for :class:`ShuffleBNBoxHead`.

    Raises:
        ValueError: for an unknown norm, or one that does not fit.
    """

    seed_of_head = 1

    def __init__(
        self, in_channels: int, layers: Sequence[int], dilation: int, norm_layer: NormLayer = "BN"
    ) -> None:
        super().__init__(in_channels, list(layers), dilation, norm_layer=_factory(norm_layer))


def run_detector(model: nn.Module, batch: Any) -> Any:
    """Run one of torchvision's detectors on a batch, moved to the device of its parameters.

    It is the ``forward`` argument of
    :func:`rethinking_bn.population.estimate_population_statistics`; batches without targets need
    its ``labelled=False``. It returns losses in training mode, else detections.

    Args:
        model: called as ``model(images, targets)`` in training mode, else as ``model(images)``.
        batch: a pair (images, targets), as ``tuple(zip(*samples))`` makes of N samples, or N
            images alone; each (3, H, W), each target a dict.

    Raises:
        ValueError: in training mode, for a batch without targets.
    """
    paired = len(batch) == 2 and not isinstance(batch[0], Tensor)
    images, targets = batch if paired else (batch, None)
    device = next(model.parameters()).device
    images = [image.to(device) for image in images]
    if not model.training:
        return model(images)
    if targets is None:
        raise ValueError("a batch without targets needs labelled=False, or the model in eval mode")
    targets = [
        {key: v.to(device) if isinstance(v, Tensor) else v for key, v in target.items()}
        for target in targets
    ]
    return model(images, targets)

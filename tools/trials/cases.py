"""Healthy models with data of their own, for planting defects in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from rethinking_bn.data import CLASSES, ShapesDataset
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.population.forwards import throwaway_event_storage
from rethinking_bn.torchvision import run_detector
from studies.data import load_digits, shuffled_indices
from studies.training import make_net, train_to_the_end

Sample = Any  # (image, label), (image, target) or detectron2's dict


@dataclass
class Case:
    """A healthy model and what it is diagnosed on.

    Attributes:
        model: in eval mode; its statistics fit ``samples``.
        samples: of the training set.
        target: samples of the same distribution, for the healthy twin's target domain.
        collate: makes a batch of samples.
        darken: (sample, strength) -> the sample as another domain shows it.
        size: images in a batch, enough for a healthy one.
        count, many: batches of a diagnosis, and of one for dependent samples.
        forward: as ``diagnose`` takes it.
    """

    model: nn.Module
    samples: Sequence[Sample]
    target: Sequence[Sample]
    collate: Callable[[Sequence[Sample]], Any]
    darken: Callable[[Sample, float], Sample]
    size: int
    count: int = 16
    many: int = 96
    forward: Callable[[Any, Any], Any] | None = None

    def batches(self, seed: int, count: int, size: int = 0) -> list[Any]:
        """Return ``count`` shuffled batches."""
        chosen = shuffled_indices(len(self.samples), size or self.size, seed)
        return [
            self.collate([self.samples[i] for i in indices.tolist()])
            for _, indices in zip(range(count), chosen, strict=False)
        ]

    def brightness(self, sample: Sample) -> float:
        """Return the mean of a sample's image."""
        image = sample["image"] if isinstance(sample, dict) else sample[0]
        return float(image.float().mean())


def others(case: Case) -> Case:
    """Return the case with its target's samples in place of the training set's."""
    return replace(case, samples=case.target)


def _pair(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)


def _darken(sample: Sample, strength: float) -> Sample:
    return sample[0] * (1 - 0.5 * strength) + 0.25 * strength, sample[1]


def classifier(seed: int, steps: int = 100) -> Case:
    """A residual classifier with 15 BN layers, trained on digits for ``steps`` batches of 64."""
    data = load_digits(torch.device("cpu"))
    torch.manual_seed(seed)
    net = make_net(nn.BatchNorm2d)
    order = shuffled_indices(len(data.train.images), 64, seed)
    train_to_the_end(net, data.train, order, steps=steps, lr=0.1, label=None)
    train, test = (list(zip(*split, strict=True)) for split in data)
    return Case(net.eval(), train, test, _pair, _darken, 64)


class _Backbone(nn.Module):
    """Five strided stages with BN, a pyramid over the last three: strides 8 to 32, 32 channels."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 16, 32, 32, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
            )
            for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.fpn = FeaturePyramidNetwork(list(widths[-3:]), self.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number >= 2:
                maps[str(number - 2)] = x
        return self.fpn(maps)


@cache
def _shapes(name: str, images: int) -> list[Sample]:
    first = ShapesDataset(name, num_images=images, masks=True, first_label=1)
    return [(image / 255, target) for image, target in (first[i] for i in range(len(first)))]


def _detector(seed: int, build: Callable[..., nn.Module], **options: Any) -> Case:
    torch.manual_seed(seed)
    sizes = dict(min_size=128, max_size=160, **options)
    classes = None if "box_predictor" in options else len(CLASSES) + 1
    model = build(_Backbone(), classes, **sizes)
    train, test = _shapes("shapes_train", 160), _shapes("shapes_val", 80)
    collate: Any = lambda samples: tuple(zip(*samples, strict=True))  # noqa: E731
    case = Case(model, train, test, collate, _darken, 16, 8, 16, run_detector)
    return _healthy(case, seed)


def _healthy(case: Case, seed: int, steps: int = 60) -> Case:
    """Train a little, and let the statistics fit: of random weights, a batch says too little."""
    model = case.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=1e-4)
    forward = case.forward or (lambda model, batch: model(batch))
    with throwaway_event_storage():
        for batch in case.batches(seed + 1, steps):
            optimizer.zero_grad()
            sum(forward(model, batch).values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
    batches = case.batches(seed, case.count)
    estimate_population_statistics(model, batches, case.count, forward=case.forward, progress=False)
    return case


def torchvision_retinanet(seed: int) -> Case:
    """torchvision's RetinaNet with BN in the backbone, in training mode, on shapes."""
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    return _detector(seed, RetinaNet, anchor_generator=anchors)


def torchvision_mask_rcnn(seed: int) -> Case:
    """torchvision's Mask R-CNN with BN in the backbone and small heads, in training mode."""
    torch.manual_seed(seed)
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    return _detector(
        seed,
        MaskRCNN,
        rpn_anchor_generator=anchors,
        box_batch_size_per_image=16,
        rpn_post_nms_top_n_train=50,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 4, 2),
        box_head=TwoMLPHead(_Backbone.out_channels * 16, 64),
        box_predictor=FastRCNNPredictor(64, len(CLASSES) + 1),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 8, 2),
        mask_head=MaskRCNNHeads(_Backbone.out_channels, (16,), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, len(CLASSES) + 1),
    )


def _detectron2(seed: int, config: str, *opts: Any) -> Case:
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper
    from detectron2.modeling import build_model

    from rethinking_bn import add_rethinking_bn_config, get_config_file
    from rethinking_bn.data import register  # noqa: F401  # makes the data sets known

    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    cfg.merge_from_file(get_config_file(config))
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MAX_SIZE_TRAIN", 112])
    cfg.merge_from_list(["INPUT.RANDOM_FLIP", "none", *opts])
    torch.manual_seed(seed)
    model = build_model(cfg)
    mapper = DatasetMapper(cfg, is_train=True)
    train = [mapper(record) for record in DatasetCatalog.get("shapes_train")[:160]]
    test = [mapper(record) for record in DatasetCatalog.get("shapes_val")[:80]]
    return _healthy(Case(model, train, test, list, _darken_dict, 16, 8, 16), seed)


def _darken_dict(sample: Sample, strength: float) -> Sample:
    return {**sample, "image": sample["image"] * (1 - 0.5 * strength) + 64 * strength}


_SMALL = (
    *("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 16),
    *("MODEL.FPN.OUT_CHANNELS", 32),
)


def detectron2_retinanet(seed: int) -> Case:
    """detectron2's RetinaNet with BN in the backbone, in training mode, on shapes."""
    return _detectron2(
        seed, "shapes/retinanet_no_norm.yaml", *_SMALL, "MODEL.RETINANET.NUM_CONVS", 1
    )


def detectron2_mask_rcnn(seed: int) -> Case:
    """detectron2's Mask R-CNN with BN in the backbone, in training mode, on shapes."""
    heads = (
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 64),
        *("MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    )
    return _detectron2(seed, "shapes/mask_rcnn_no_norm.yaml", *_SMALL, *heads)

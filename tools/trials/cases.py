"""Healthy models with data of their own, for planting defects in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from rethinking_bn.data import CLASSES, ShapesDataset
from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.population.forwards import throwaway_event_storage
from rethinking_bn.torchvision import MultiDomainBNRetinaNetHead, run_detector
from studies.data import load_digits, shuffled_indices
from studies.training import make_net, train_to_the_end

Sample = Any  # (image, label), (image, target), detectron2's dict or an image
S, D = "shared", "domain_specific"
ROWS = {1: (S, S, S), 4: (D, D, S), 6: (D, D, D)}


@dataclass
class Case:
    """A healthy model and what it is diagnosed on."""

    model: nn.Module  # its statistics fit the samples
    samples: Sequence[Sample]
    target: Sequence[Sample]  # of the same distribution; () for none
    collate: Callable[[list[Sample]], Any]
    size: int  # images in a batch
    count: int = 16  # batches of a diagnosis
    many: int = 96  # and of one for dependent samples
    forward: Callable[[Any, Any], Any] | None = None

    def batches(self, seed: int, count: int, size: int = 0) -> list[Any]:
        """Return ``count`` shuffled batches."""
        chosen = shuffled_indices(len(self.samples), size or self.size, seed)
        return [
            self.collate([self.samples[i] for i in indices.tolist()])
            for _, indices in zip(range(count), chosen, strict=False)
        ]


def image_of(sample: Sample) -> Tensor:
    """Return the image of a sample."""
    if isinstance(sample, Tensor):
        return sample
    return sample["image"] if isinstance(sample, dict) else sample[0]


def with_image(sample: Sample, image: Tensor) -> Sample:
    """Return the sample with another image."""
    if isinstance(sample, Tensor):
        return image
    return {**sample, "image": image} if isinstance(sample, dict) else (image, *sample[1:])


def classifier(seed: int, steps: int = 100) -> Case:
    """A residual classifier with 15 BN layers, trained on digits for ``steps`` batches of 64."""
    data = load_digits(torch.device("cpu"))
    torch.manual_seed(seed)
    net = make_net(nn.BatchNorm2d)
    order = shuffled_indices(len(data.train.images), 64, seed)
    train_to_the_end(net, data.train, order, steps=steps, lr=0.1, label=None)
    train, test = (list(zip(*split, strict=True)) for split in data)
    return Case(net.eval(), train, test, default_collate, 64)


class _Head(nn.Module):
    """Three convolutions over four levels of an image, a norm layer of row 1 behind each."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        widths = (3, channels, channels)
        self.convs = nn.ModuleList(nn.Conv2d(i, channels, 3, padding=1) for i in widths)
        self.norms = nn.ModuleList(MultiDomainBatchNorm2d(channels, 4) for _ in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        xs = [x, *(nn.functional.avg_pool2d(x, k) for k in (4, 8, 16))]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            xs = [y.relu() for y in norm([conv(x) for x in xs])]
        return xs


def head(seed: int) -> Case:
    """A head of row 1 with random weights, on four images that differ in their contrast most."""
    torch.manual_seed(seed)
    contrast = 0.2 + 3 * torch.rand(500, 1, 1, 1)
    images = torch.randn(500, 3, 32, 32) * contrast + 0.05 * torch.randn(500, 3, 1, 1) + 2
    case = Case(_Head().train(), list(images), list(images), default_collate, 4, 40, 40)
    estimate_population_statistics(case.model, case.batches(seed + 1, 40), progress=False)
    return case


def _backbone() -> BackboneWithFPN:
    """Return five strided stages with BN and a pyramid of strides 8 to 64, 32 channels each."""
    widths = (3, 16, 16, 32, 32, 32)
    stages = (
        nn.Sequential(
            nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
        )
        for i, o in itertools.pairwise(widths)
    )
    levels = {str(number): str(number) for number in (2, 3, 4)}
    return BackboneWithFPN(nn.Sequential(*stages), levels, [32] * 3, 32)


@cache
def _shapes(name: str, images: int) -> list[Sample]:
    data = ShapesDataset(name, num_images=images, first_label=1)
    return [(image / 255, target) for image, target in map(data.__getitem__, range(images))]


def _healthy(case: Case, seed: int, steps: int = 12) -> Case:
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
    batches = case.batches(seed + 2, case.count)
    estimate_population_statistics(model, batches, forward=case.forward, progress=False)
    return case


def torchvision_row(row: int, seed: int) -> Case:
    """torchvision's RetinaNet with a row of Table 5 in its head, in training mode, on shapes."""
    torch.manual_seed(seed)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    train_stats, population_stats, affine = ROWS[row]
    head = MultiDomainBNRetinaNetHead(
        32, 3, len(CLASSES) + 1, num_levels=4,
        train_stats=train_stats, population_stats=population_stats, affine=affine,
    )  # fmt: skip
    sizes: dict[str, Any] = {"min_size": 96, "max_size": 112}
    model = RetinaNet(_backbone(), len(CLASSES) + 1, anchor_generator=anchors, head=head, **sizes)
    train = _shapes("shapes_train", 160)
    case = Case(model, train, (), lambda s: tuple(zip(*s, strict=True)), 16, 8, 16, run_detector)
    return _healthy(case, seed)


def detectron2_row(row: int, seed: int) -> Case:
    """detectron2's RetinaNet, small, with a row of Table 5 in its head, on shapes."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper
    from detectron2.modeling import build_model

    from rethinking_bn import add_rethinking_bn_config, get_config_file
    from rethinking_bn.data import register  # noqa: F401  # makes the data sets known

    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    cfg.merge_from_file(get_config_file(f"shapes/retinanet_bn_row{row}.yaml"))
    opts = {
        "INPUT.MIN_SIZE_TRAIN": (96,), "INPUT.MAX_SIZE_TRAIN": 112, "INPUT.RANDOM_FLIP": "none",
        "MODEL.RESNETS.NORM": "BN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
        "MODEL.FPN.OUT_CHANNELS": 32, "MODEL.RETINANET.NUM_CONVS": 2,
    }  # fmt: skip
    cfg.merge_from_list([word for pair in opts.items() for word in pair])
    torch.manual_seed(seed)
    model = build_model(cfg)
    mapper = DatasetMapper(cfg, is_train=True)
    train = [mapper(record) for record in DatasetCatalog.get("shapes_train")[:160]]
    return _healthy(Case(model, train, (), list, 16, 8, 16), seed)


CASES: dict[str, Callable[[int], Case]] = {"classifier": classifier, "head": head}
CASES |= {f"torchvision_row{row}": partial(torchvision_row, row) for row in ROWS}
CASES |= {f"detectron2_row{row}": partial(detectron2_row, row) for row in ROWS}

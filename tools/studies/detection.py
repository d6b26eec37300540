"""The detector of the `rows` study: torchvision's RetinaNet, small, on the generated shapes."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from tqdm import tqdm

from rethinking_bn.data import CLASSES, ShapesDataset
from rethinking_bn.torchvision import MultiDomainBNRetinaNetHead, run_detector
from studies.data import shuffled_indices
from studies.study import Settings
from studies.training import learning_rate

LEVELS = 5
_SIZES = tuple((s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)) for s in (10, 20, 40, 80, 160))  # pixels
_RATIOS = ((0.5, 1.0, 2.0),) * LEVELS
_CHANNELS, _GROUPS = 32, 8  # of every map of the pyramid; of the backbone's GN
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Backbone(nn.Module):
    """Seven strided stages with GN, a pyramid over the last five: strides 8 to 128, 32 channels.

    From scratch, so no FrozenBN: GN leaves the head's BatchNorm the only one.
    """

    out_channels = _CHANNELS

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 16, 32, 64, 64, 64, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(_block(i, o, 2), *([_block(o, o, 1)] if o > 16 else []))
            for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.pyramid = FeaturePyramidNetwork(list(widths[-LEVELS:]), _CHANNELS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the five maps (N, 32, H_l, W_l), finest first."""
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number >= len(self.stages) - LEVELS:
                maps[str(number)] = x
        return self.pyramid(maps)


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(_GROUPS, outputs), nn.ReLU())


def make_detector(norm: Any, **choices: str) -> RetinaNet:
    """Return a RetinaNet with our head; arguments as MultiDomainBNRetinaNetHead's."""
    count = len(_SIZES[0]) * len(_RATIOS[0])  # per location
    head = MultiDomainBNRetinaNetHead(
        _CHANNELS, count, len(CLASSES), norm, num_levels=LEVELS, **choices
    )
    options: Any = {"anchor_generator": AnchorGenerator(_SIZES, _RATIOS), "head": head}
    model = RetinaNet(Backbone(), len(CLASSES), min_size=192, max_size=224, **options)
    return model.to(memory_format=torch.channels_last)


def batches(data: ShapesDataset, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield (images in [0, 1], targets) for ever, half of the images flipped."""
    generator = torch.Generator().manual_seed(seed)
    for indices in shuffled_indices(len(data), batch_size, seed):
        images, targets = [], []
        for index in indices.tolist():
            image, target = data[index]
            if torch.rand((), generator=generator) < 0.5:
                image = image.flip(2)
                boxes = target["boxes"]
                target["boxes"] = torch.stack(
                    [image.shape[2] - boxes[:, 2], boxes[:, 1],
                     image.shape[2] - boxes[:, 0], boxes[:, 3]], dim=1,
                )  # fmt: skip
            images.append(image / 255)
            targets.append(target)
        yield images, targets


def train_detector(model: nn.Module, data: ShapesDataset, settings: Settings, seed: int) -> None:
    """Train with SGD and clipped gradients; the schedule is the classifier's."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, settings["lr"], 0.9, weight_decay=1e-4, foreach=True)
    steps = tqdm(range(settings["steps"]), desc="training", leave=False, mininterval=0.5)
    for step, batch in zip(steps, batches(data, settings["batch_size"], seed), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings["steps"], settings["lr"])
        loss = sum(run_detector(model, batch).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()


@torch.no_grad()
def box_ap(model: nn.Module, data: ShapesDataset) -> float:
    """Return COCO's box AP in %, by pycocotools."""
    model.eval()
    found: list[dict[str, Any]] = []
    for index in range(len(data)):
        image, target = data[index]
        (result,) = run_detector(model, [image / 255])
        found += _as_coco(int(target["image_id"]), result)
    if not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data.json_file))
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def _as_coco(image_id: int, result: dict[str, Tensor]) -> list[dict[str, Any]]:
    boxes = result["boxes"].cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    each = zip(boxes.tolist(), result["labels"].tolist(), result["scores"].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": label + 1, "bbox": box, "score": score}
        for box, label, score in each
    ]

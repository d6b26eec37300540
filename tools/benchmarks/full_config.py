"""A training step of a whole config in channels_last and under bfloat16 autocast, and without."""

from __future__ import annotations

import copy
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from benchmarks.equality import require_equal
from benchmarks.options import Options
from benchmarks.result import Result, Table
from benchmarks.timing import Step, alternate, ratios, spread
from rethinking_bn.config import add_rethinking_bn_config
from rethinking_bn.config_files import get_config_file

# name: channels_last, bfloat16, how far the loss may be from float32's
_VARIANTS = {
    "float32": (False, False, 1e-6),
    "float32 channels_last": (True, False, 1e-3),
    "bfloat16": (False, True, 5e-2),
    "bfloat16 channels_last": (True, True, 5e-2),
}


def add_full_config(result: Result, options: Options) -> None:
    """Time row 1 of Table 5 as configured: on a CPU the laptop-sized twin of the config.

    Forward, backward and an SGD step, on noise images with boxes, from one set of weights.
    """
    name = options.pick(
        quick="shapes/retinanet_bn_row1.yaml",
        cpu="shapes/retinanet_bn_row1.yaml",
        cuda="retinanet_bn_row1.yaml",
    )
    height, width = options.pick(quick=(64, 64), cpu=(160, 192), cuda=(800, 1344))
    model = _build(get_config_file(name), options)
    batch = _batch(2, height, width, model.num_classes)
    steps, expected = {}, None
    for variant, (channels_last, half, tolerance) in _VARIANTS.items():
        step = _training_step(copy.deepcopy(model), batch, channels_last, half)
        loss = step()
        expected = loss if expected is None else expected
        what = f"{name}, loss in {variant}"
        result.checks[what] = require_equal(what, [loss], [expected], tolerance)
        steps[variant] = step
    times = alternate(steps, options.device, options.plan(12.0))
    rows: list[tuple[str | int | float, ...]] = [
        (variant, spread(times[variant]).median * 1e3, ratio.median, ratio.low, ratio.high)
        for variant in _VARIANTS
        for ratio in [spread(ratios(times[variant], times["float32"]))]
    ]
    title = f"Training step of {name}, random weights, 2 images of {height} x {width}"
    columns = ("variant", "ms", "ratio to float32", "lower quartile", "upper quartile")
    result.tables.append(Table(title, columns, rows))


def _build(path: str, options: Options) -> Any:
    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    cfg.merge_from_file(path)
    cfg.MODEL.DEVICE = str(options.device)
    cfg.MODEL.WEIGHTS = ""
    torch.manual_seed(0)
    return build_model(cfg).train()


def _batch(images: int, height: int, width: int, classes: int) -> list[dict[str, Any]]:
    """Return noise images with four boxes each."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corner = torch.rand(4, 2, generator=generator) * 0.6
        extent = torch.rand(4, 2, generator=generator) * 0.3 + 0.1
        boxes = torch.cat([corner, corner + extent], dim=1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
        instances.gt_classes = torch.randint(classes, (4,), generator=generator)
        image = torch.rand(3, height, width, generator=generator) * 255
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def _training_step(
    model: nn.Module, batch: list[dict[str, Any]], channels_last: bool, half: bool
) -> Step:
    if channels_last:
        model.to(memory_format=torch.channels_last)
    device = next(model.parameters()).device.type
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        with EventStorage(1), torch.autocast(device, torch.bfloat16, enabled=half):
            loss = torch.stack(list(model(batch).values())).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step

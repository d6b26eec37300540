"""Training steps of heads and of whole detectors, with detectron2."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import FPN_SIZES, TOY_SIZES, make_levels
from benchmarks.options import Options, missing
from benchmarks.result import Cell, Result, Table
from benchmarks.timing import Step, alternate, spread

_RETINANET = ["retinanet_no_norm", *(f"retinanet_bn_row{row}" for row in range(1, 7))]
_MASK_RCNN = ["mask_rcnn_no_norm", "mask_rcnn_bn_head", "mask_rcnn_shuffle_bn_head"]


def heads_in_training(result: Result, options: Options) -> Iterator[tuple[str, Step]]:
    """Yield a training step of every head; none, with a note, without detectron2."""
    reason = missing("detectron2")
    if reason:
        result.skip("heads", reason)
        return
    from detectron2.layers import ShapeSpec

    from benchmarks.retinanet_heads import HeadSize, head_forward, our_head
    from rethinking_bn.modeling.box_head import NormBoxHead, ShuffleBNBoxHead
    from rethinking_bn.modeling.mask_head import NormMaskHead, ShuffleBNMaskHead

    channels = options.pick(quick=8, cpu=256, cuda=256)
    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES, cuda=FPN_SIZES)
    features = make_levels(sizes, channels, device=options.device).xs
    for row in (1, 3, 4, 6):
        head = our_head(HeadSize(channels, 2, 4, 3), row).to(options.device)
        yield f"RetinaNet head, row {row}", _stepper(head, features, head_forward)
    rois = options.pick(quick=4, cpu=64, cuda=512)
    for kind in (NormBoxHead, ShuffleBNBoxHead):
        box: nn.Module = kind(
            ShapeSpec(channels=channels, height=7, width=7),
            conv_dims=[channels] * 4,
            fc_dims=[64],
            conv_norm="BN",
        ).to(options.device)
        x = torch.randn(rois, channels, 7, 7, device=options.device).requires_grad_()
        yield kind.__name__, _stepper(box, x, lambda m, x: [m(x)])
    for kind in (NormMaskHead, ShuffleBNMaskHead):
        mask: nn.Module = kind(
            ShapeSpec(channels=channels, height=14, width=14),
            num_classes=4,
            conv_dims=[channels] * 5,
            conv_norm="BN",
        ).to(options.device)
        x = torch.randn(rois // 4, channels, 14, 14, device=options.device).requires_grad_()
        yield kind.__name__, _stepper(mask, x, lambda m, x: [m.layers(x)])


def _stepper(module: nn.Module, inputs: Any, forward: Any) -> Step:
    def step() -> None:
        ys = forward(module, inputs)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])

    return step


def time_models(result: Result, options: Options) -> None:
    """Training steps of RetinaNet and Mask R-CNN beside the same without norm, random weights."""
    reason = missing("detectron2", "fvcore")
    if reason:
        return result.skip("RetinaNet and Mask R-CNN", reason)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        for names in (_RETINANET, _MASK_RCNN):
            _time_models(result, options, names[:2] if options.quick else names)


def _time_models(result: Result, options: Options, names: list[str]) -> None:
    rows: list[tuple[Cell, ...]] = []
    times: dict[str, list[float]] = {}
    for name in names:
        with result.attempt(f"training step, {name}"):
            step = _training_step(name, options)
            # one model at a time: eight of them would not share the memory of a small GPU
            times[name] = alternate({name: step}, options.device, options.plan(3.0))[name]
            del step
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    base = spread(times.get(names[0], [math.nan])).median
    for name, measured in times.items():
        median = spread(measured).median
        rows.append((name, median * 1e3, median / base))
    columns = ("config", "ms a step", "beside no norm")
    result.tables.append(Table("Training steps, 2 images", columns, rows))


def _training_step(name: str, options: Options) -> Step:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    from rethinking_bn import add_rethinking_bn_config, get_config_file

    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    cfg.merge_from_file(get_config_file(f"{'shapes/' if options.quick else ''}{name}.yaml"))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", str(options.device)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    height, width = options.pick(quick=(64, 64), cpu=(320, 320), cuda=(800, 1344))
    classes = 2 if options.quick else 80
    batch = []
    for _ in range(2):
        corner = torch.rand(8, 2) * torch.tensor([width, height]) / 2
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + min(height, width) / 4], 1))
        instances.gt_classes = torch.randint(classes, (8,))
        instances.gt_masks = BitMasks(torch.ones(8, height, width, dtype=torch.bool))
        image = (torch.rand(3, height, width) * 255).to(torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with EventStorage():
            sum(model(batch).values()).backward()

    return step

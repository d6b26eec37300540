"""A detector trained with MABN takes the steps that the paper's formulas take, pass by pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from rethinking_bn.engine import AccumulatingTrainer
from rethinking_bn.layers import MABN2d
from tests.engine.tiny import tiny_config
from tests.layers.mabn.reference import Reference

STEPS, PASSES, WARMUP, WINDOW = 8, 4, 12, 8  # the moving averages take over at pass 12 of 32


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: Reference) -> Tensor:
        ctx.layer = layer
        return layer.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return (*ctx.layer.backward(dy), None)


def write_out(model: nn.Module) -> list[Reference]:
    """Replace what every MABN layer computes by the formulas."""
    written = []
    for module in model.modules():
        if isinstance(module, MABN2d):
            reference = Reference(WINDOW, WARMUP)
            vars(module)["forward"] = _forward(module, reference)
            written.append(reference)
    return written


def _forward(module: MABN2d, reference: Reference) -> Any:
    def forward(xs: Any) -> Any:
        levels = [xs] if isinstance(xs, Tensor) else xs
        values = torch.cat([x.flatten(2) for x in levels], dim=2)[..., None]
        y = _Written.apply(values, module.weight, module.bias, reference)
        parts = y[..., 0].split([x[0, 0].numel() for x in levels], dim=2)
        ys = [part.reshape(x.shape).clone() for part, x in zip(parts, levels, strict=True)]
        return ys[0] if isinstance(xs, Tensor) else ys

    return forward


def batches() -> list[list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        samples = []
        for _ in range(PASSES):
            instances = Instances((64, 64))
            corners = torch.rand(2, 2, generator=generator) * 32
            instances.gt_boxes = Boxes(torch.cat([corners, corners + 24], dim=1))
            instances.gt_classes = torch.tensor([0, 1])
            image = torch.rand(3, 64, 64, generator=generator) * 255
            samples.append({"image": image, "instances": instances})
        found.append(samples)
    return found


def train(*, written_out: bool) -> tuple[list[float], nn.Module, list[Reference]]:
    cfg = tiny_config("", "", MODEL__RETINANET__NORM="MABN")
    cfg.MODEL.META_ARCHITECTURE = "ConfigurableHeadRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_mabn_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "MABN"
    cfg.MODEL.RETINANET.HEAD_NAME = "MultiDomainBNRetinaNetHead"
    cfg.MODEL.MABN.SIMULATED_BATCH_SIZE, cfg.MODEL.MABN.BATCH_SIZE = WINDOW, 1
    cfg.MODEL.MABN.WARMUP_ITERS = WARMUP
    torch.manual_seed(0)
    model = build_model(cfg).double()
    references = write_out(model) if written_out else []
    losses: list[float] = []
    model.register_forward_hook(
        lambda m, inputs, output: losses.append(sum(v.item() for v in output.values()))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer: SimpleTrainer = AccumulatingTrainer(
        model, batches(), optimizer, accumulation_steps=PASSES
    )
    trainer.train(0, STEPS)
    return losses, model, references


@pytest.mark.slow
def test_passes_of_a_detector() -> None:
    losses, model, _ = train(written_out=False)
    expected, _, references = train(written_out=True)
    assert len(losses) == STEPS * PASSES and len(references) > 60
    assert all(reference.visited >= {"own", "moving"} for reference in references)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    layers = [module for module in model.modules() if isinstance(module, MABN2d)]
    for layer, reference in zip(layers, references, strict=True):
        torch.testing.assert_close(layer.running_mean_square, reference.R, rtol=1e-4, atol=1e-6)

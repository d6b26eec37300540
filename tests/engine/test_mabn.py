"""Training with MABN throughout: the paper's formulas, what it needs, what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from torch import Tensor, nn

from rethinking_bn.engine import AccumulatingTrainer, Trainer
from rethinking_bn.layers import MABN2d
from tests.engine.test_accumulation import images
from tests.engine.tiny import register_data, tiny_config
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
        model, [images(i, PASSES) for i in range(STEPS)], optimizer, accumulation_steps=PASSES
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


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    return tiny_config(
        register_data(tmp_path),
        tmp_path / "out",
        MODEL__META_ARCHITECTURE="ConfigurableHeadRetinaNet",
        MODEL__BACKBONE__NAME="build_mabn_retinanet_resnet_fpn_backbone",
        MODEL__RETINANET__HEAD_NAME="MultiDomainBNRetinaNetHead",
        MODEL__RETINANET__NORM="MABN",
        SOLVER__IMS_PER_BATCH=2,
        SOLVER__MAX_ITER=3,
        TEST__EVAL_PERIOD=3,
    )


def test_trains_re_estimates_and_saves(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.TEST.PRECISE_BN.ENABLED = False
    moving = Trainer(cfg)
    moving.train()
    cfg.TEST.PRECISE_BN.ENABLED = True
    trainer = Trainer(cfg)
    trainer.train()
    layers = {name: m for name, m in trainer.model.named_modules() if isinstance(m, MABN2d)}
    assert len(layers) == 53 + 6 + 2
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)["model"]
    for name, layer in layers.items():
        other = moving.model.get_submodule(name)
        assert layer.iterations == other.iterations == 3
        assert torch.equal(layer.weight, other.weight)
        assert not torch.equal(layer.running_mean_square, other.running_mean_square)
        assert torch.equal(saved[f"{name}.running_mean_square"], layer.running_mean_square)


def test_fine_tuning_without_weights_is_refused(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.MODEL.MABN.REQUIRE_WEIGHTS = True
    trainer = Trainer(cfg)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty, .* trained with MABN"):
        trainer.resume_or_load(resume=True)
    torch.save({"model": trainer.model.state_dict()}, tmp_path / "mabn.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "mabn.pth")
    Trainer(cfg).resume_or_load(resume=True)

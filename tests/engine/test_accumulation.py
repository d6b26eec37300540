"""W ranks with k passes take the step of W·k ranks with one, and nothing else changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.modeling.meta_arch import retinanet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from rethinking_bn.config import images_per_pass
from rethinking_bn.engine import AccumulatingAMPTrainer, AccumulatingTrainer, Trainer
from rethinking_bn.engine.accumulation import CPUAutocastTrainer, split_batch
from rethinking_bn.engine.check_config import check_batch_size
from rethinking_bn.engine.rank_state import gather_rank_state, load_rank_state, wrap_data_parallel
from rethinking_bn.layers import get_norm
from tests.engine.test_rank_state import Detector
from tests.engine.tiny import register_data, tiny_config
from tests.helpers import run_distributed

STEPS = 2


def focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str
) -> Tensor:
    """The focal loss of RetinaNet's paper, in the type of its input (fvcore's is in float32)."""
    p = inputs.sigmoid()
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    assert reduction == "sum"
    return -(alpha_t * (1 - p_t) ** gamma * p_t.log()).sum()


class SmallBackbone(Backbone):
    """Two levels of convolution, norm, ReLU."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        options = {"simulated_batch_size": 2, "batch_size": 1} if norm == "MABN" else {}
        self.p3 = nn.Sequential(nn.Conv2d(3, 32, 5, 8, 2), get_norm(norm, 32, **options), nn.ReLU())
        self.p4 = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), get_norm(norm, 32, **options))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p3 = self.p3(x)
        return {"p3": p3, "p4": self.p4(p3)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{level}": ShapeSpec(channels=32, stride=2**level) for level in (3, 4)}


def build_small_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return SmallBackbone(cfg.MODEL.RETINANET.NORM)


if "build_small_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_small_backbone)


def detector(norm: str) -> Any:
    """A RetinaNet in float64 with the norm in backbone and head, the same at every call."""
    cfg = tiny_config("", "", MODEL__RETINANET__NORM=norm)
    cfg.MODEL.META_ARCHITECTURE = "ConfigurableHeadRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_small_backbone"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    cfg.MODEL.RETINANET.HEAD_NAME = "MultiDomainBNRetinaNetHead"
    cfg.MODEL.MABN.SIMULATED_BATCH_SIZE, cfg.MODEL.MABN.BATCH_SIZE = 2, 1
    torch.manual_seed(0)
    retinanet.sigmoid_focal_loss_jit = focal_loss  # in this process until the fixture's end
    return build_model(cfg).double().train()


@pytest.fixture(autouse=True)
def _own_focal_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", retinanet.sigmoid_focal_loss_jit)


def images(iteration: int, number: int) -> list[dict[str, Any]]:
    """The images of an iteration, the first with one object, the second with two, and so on."""
    generator = torch.Generator().manual_seed(iteration)
    samples = []
    for index in range(number):
        instances = Instances((64, 64))
        corners = torch.rand(index + 1, 2, generator=generator) * 32
        instances.gt_boxes = Boxes(torch.cat([corners, corners + 10 + 4 * index], dim=1))
        instances.gt_classes = torch.arange(index + 1) % 2
        image = torch.rand(3, 64, 64, generator=generator) * 255
        samples.append({"image": image, "instances": instances})
    return samples


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


Found = tuple[dict[str, Tensor], list[float]]  # parameters and gradients; loss normalisers


def result(model: nn.Module, normalizers: list[float]) -> Found:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name], found[f"{name}.grad"] = parameter.detach(), parameter.grad
    return found, normalizers


def train(norm: str, rank: int, world: int, passes: int) -> Found:
    """Train as rank r of W with k passes of one image each."""
    model = detector(norm)
    wrapped = wrap_data_parallel(model) if world > 1 else model
    own = slice(rank * passes, (rank + 1) * passes)
    loader = [images(iteration, world * passes)[own] for iteration in range(STEPS)]
    trainer = (
        SimpleTrainer(wrapped, loader, optimizer_of(model))
        if passes == 1
        else AccumulatingTrainer(wrapped, loader, optimizer_of(model), accumulation_steps=passes)
    )
    trainer.train(0, STEPS)
    if passes == 1:
        return result(model, [model.loss_normalizer])
    return result(model, gather_rank_state(wrapped)[rank]["normalizers"][""])


def train_written_out(norm: str, ranks: int) -> Found:
    """Each "rank" is a copy of the model with one image; the gradients are averaged by hand."""
    model = detector(norm)
    replicas = [copy.deepcopy(model) for _ in range(ranks)]
    optimizer = optimizer_of(model)
    for iteration in range(STEPS):
        gradients = []
        for replica, image in zip(replicas, images(iteration, ranks), strict=True):
            with torch.no_grad():
                for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
                    own.copy_(shared)
            with EventStorage():
                loss = sum(replica([image]).values())
            gradients.append(torch.autograd.grad(loss, list(replica.parameters())))
        for parameter, *each in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(each).mean(0)
        optimizer.step()
    return result(model, [replica.loss_normalizer for replica in replicas])


def check(found: Found, expected: Found) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert found[1] == pytest.approx(expected[1], rel=1e-12)


def on_rank(rank: int) -> dict[tuple[str, int], Found]:
    found = {(norm, 2): train(norm, rank, 2, 2) for norm in NORMS}
    return {**found, ("BN", 1): train("BN", rank, 2, 1)}


NORMS = ("BN", "GN", "MABN")


def test_passes_are_processes() -> None:
    """In float64, BN, GN and MABN in backbone and head: values, gradients, normalisers."""
    expected = {norm: train_written_out(norm, 4) for norm in NORMS}
    for norm in NORMS:
        assert len(set(expected[norm][1])) == 4  # one, two, three and four objects
        check(train(norm, 0, 1, 4), expected[norm])
    ranks = run_distributed(on_rank, 2, timeout=200)
    for found in ranks:
        for norm in NORMS:
            parameters, normalizers = expected[norm]
            own = normalizers[:2] if found is ranks[0] else normalizers[2:]
            check(found[norm, 2], (parameters, own))
    # what has been written out is what two processes of detectron2's own trainer do
    parameters, normalizers = train_written_out("BN", 2)
    check(ranks[1]["BN", 1], (parameters, normalizers[1:]))


class Counted(nn.Module):
    """A toy model that remembers the samples and the precision of its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.seen: list[tuple[int, torch.dtype]] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        self.seen.append((len(x), y.dtype))
        return {"loss": y.square().mean(), "other": y.abs().mean()}


def step(make: Callable[..., SimpleTrainer], **kwargs: Any) -> tuple[Counted, EventStorage]:
    torch.manual_seed(0)
    model = Counted()
    trainer = make(model, [torch.randn(8, 3)], torch.optim.SGD(model.parameters(), 0.1), **kwargs)
    trainer.iter = 0
    with EventStorage() as storage:
        trainer.run_step()
    return model, storage


def test_one_pass_is_simple_trainer_bit_for_bit_and_four_have_its_mean_loss() -> None:
    stock, stock_log = step(SimpleTrainer)
    for options in ({}, {"accumulation_steps": 1}, {"zero_grad_before_forward": True}):
        one, _ = step(AccumulatingTrainer, **options)
        assert torch.equal(one.linear.weight, stock.linear.weight)
    four, log = step(AccumulatingTrainer, accumulation_steps=4)
    assert [size for size, _ in four.seen] == [2] * 4
    torch.testing.assert_close(four.linear.weight, stock.linear.weight)
    for name in ("loss", "other", "total_loss"):
        assert log.latest()[name][0] == pytest.approx(stock_log.latest()[name][0], rel=1e-6)


def test_mixed_precision_without_a_gpu() -> None:
    one, _ = step(CPUAutocastTrainer)
    four, _ = step(CPUAutocastTrainer, accumulation_steps=4)
    assert four.seen == [(2, torch.bfloat16)] * 4 and one.seen == [(8, torch.bfloat16)]
    torch.testing.assert_close(four.linear.weight, one.linear.weight, rtol=0.01, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_amp_twin_has_amp_trainers_state_and_needs_cuda() -> None:
    model = Counted()
    parts = (model, [torch.randn(8, 3)], torch.optim.SGD(model.parameters(), 0.1))
    twin = AccumulatingAMPTrainer(*parts, accumulation_steps=2, precision=torch.bfloat16)
    assert twin.accumulation_steps == 2 and "grad_scaler" in twin.state_dict()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs CUDA"):
            twin.run_step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_amp_twin_takes_the_step_of_amp_trainer() -> None:
    from detectron2.engine import AMPTrainer

    weights = []
    for kind, options in ((AMPTrainer, {}), (AccumulatingAMPTrainer, {"accumulation_steps": 4})):
        torch.manual_seed(0)
        model = Counted().cuda()
        loader = [torch.randn(8, 3).cuda()]
        trainer = kind(model, loader, torch.optim.SGD(model.parameters(), 0.1), **options)
        trainer.iter = 0
        with EventStorage():
            trainer.run_step()
        assert all(dtype == torch.float16 for _, dtype in model.seen)
        weights.append(model.linear.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_split_is_said() -> None:
    assert split_batch([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    marker = object()
    assert split_batch(marker, 1) == [marker]
    with pytest.raises(ValueError, match="accumulation_steps 3 does not divide the 4 samples"):
        split_batch([1, 2, 3, 4], 3)
    with pytest.raises(ValueError, match="does not divide the 0 samples"):
        split_batch([], 2)
    with pytest.raises(ValueError, match="yields a dict"):
        split_batch({"image": 1}, 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        AccumulatingTrainer(None, None, None, accumulation_steps=0)
    model = Counted()
    trainer = AccumulatingTrainer(model, [], torch.optim.SGD(model.parameters(), 0.1))
    model.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        trainer.run_step()


def test_images_of_a_pass() -> None:
    cfg = tiny_config("", "")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = 12, 3
    assert images_per_pass(cfg, 2) == 2
    check_batch_size(cfg, 2)
    for passes in (0, 4):
        cfg.SOLVER.ACCUMULATION_STEPS = passes
        with pytest.raises(ValueError, match=f"ACCUMULATION_STEPS {passes} does not divide the 6"):
            check_batch_size(cfg, 2)
        with pytest.raises(ValueError, match="ACCUMULATION_STEPS"):
            Trainer(cfg) if passes == 0 else images_per_pass(cfg, 2)


def test_normalizers_of_another_number_of_passes_are_averaged_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def states(*ranks: Any) -> list[Any]:
        return [{"normalizers": {"": value}, "buffers": {}} for value in ranks]

    def resumed(state: list[Any], passes: int) -> Any:
        model = Detector()
        load_rank_state(model, state, passes)
        return gather_rank_state(model)[0]["normalizers"][""]

    assert resumed(states([2.0, 4.0]), 2) == [2.0, 4.0] and not caplog.text
    assert resumed(states([2.0, 4.0]), 1) == 3.0
    assert "saved with 2 pass(es) per iteration and is resumed with 1" in caplog.text
    assert resumed(states(5.0), 2) == [5.0, 5.0]
    assert resumed(states([2.0, 4.0], [4.0, 8.0]), 2) == [2.0, 4.0]  # of another number of ranks


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    cfg = tiny_config(register_data(tmp_path), tmp_path / "out", SOLVER__ACCUMULATION_STEPS=2)
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.DATASETS.TEST = 2, 0, ()
    return cfg


def test_the_trainer_counts_iterations_and_estimates_at_the_batch_of_a_pass(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.TEST.PRECISE_BN.ENABLED = True
    with caplog.at_level(logging.INFO, logger="rethinking_bn"):
        trainer = Trainer(cfg)
    assert "2 passes over 2 image(s) on each of 1 process(es)" in caplog.text
    assert isinstance(trainer._trainer, AccumulatingTrainer)
    iterations, sizes = [], []
    note = hooks.CallbackHook(after_step=lambda t: iterations.append(t.iter))
    trainer.register_hooks([note])
    trainer.model.register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0])))
    trainer.train()
    assert iterations == [0, 1] and sizes == [2] * (2 * 2 + 2)
    assert len(trainer.scheduler.get_last_lr()) > 0 and trainer.scheduler.last_epoch == 2
    assert len(trainer.state_dict()["rank_states"][0]["normalizers"][""]) == 2

"""Backbones with GN or MABN throughout, or as the keys say: built, frozen, loaded, evaluated."""

from __future__ import annotations

import logging
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, DeformConv, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from rethinking_bn.engine.check_config import check_batch_size
from rethinking_bn.layers import MABN2d, SyncBatchNorm2d, get_norm
from tests.engine.tiny import tiny_config
from tests.helpers import run_distributed

IMAGE = ShapeSpec(channels=3)
KINDS = ("resnet", "resnet_fpn", "retinanet_resnet_fpn")
NORMS: Any = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, nn.GroupNorm, MABN2d)
NORMS += (LayerNorm2d, nn.InstanceNorm2d)


def config(depth: int = 50, **overrides: Any) -> CfgNode:
    """Return a config of a narrow ResNet (of the full width where detectron2 insists on it)."""
    keys = {
        "MODEL__RESNETS__DEPTH": depth,
        "MODEL__RESNETS__NORM": "FrozenBN",
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 32 if depth >= 50 else 64,
        "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
        "MODEL__RESNETS__WIDTH_PER_GROUP": 32,
        "MODEL__FPN__OUT_CHANNELS": 32,
        "SOLVER__IMS_PER_BATCH": 2,
    }
    return tiny_config("no data", "no output", **{**keys, **overrides})


def build(kind: str, norm: str, cfg: CfgNode) -> Backbone:
    cfg = cfg.clone()
    cfg.freeze()
    return BACKBONE_REGISTRY.get(f"build_{norm}{kind}_backbone")(cfg, IMAGE)


def norms(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, NORMS)]


NAMES = ("BN", "SyncBN", "BatchStatBN", "FrozenBN", "GN", "LN", "IN", "MABN", "")


def small(resnets: str, fpn: str, **overrides: Any) -> CfgNode:
    keys = {"MODEL__RESNETS__NORM": resnets, "MODEL__FPN__NORM": fpn}
    return config(18, **{**keys, **overrides})


def kind_of(norm: str) -> type:
    return FrozenBatchNorm2d if norm == "FrozenBN" else type(get_norm(norm, 64))


def test_the_keys_of_mabn_reach_every_layer() -> None:
    cfg = config(
        MODEL__MABN__SIMULATED_BATCH_SIZE=12,
        MODEL__MABN__MOMENTUM=0.1,
        MODEL__MABN__WARMUP_ITERS=7,
        MODEL__MABN__R_MAX=2.0,
    )
    for batch_size, expected in ((0, 2), (3, 3)):
        cfg.MODEL.MABN.BATCH_SIZE = batch_size
        for layer in norms(build("resnet_fpn", "mabn_", cfg)):
            assert (layer.simulated_batch_size, layer.batch_size) == (12, expected)
            assert (layer.momentum, layer.warmup_iters, layer.r_max) == (0.1, 7, 2.0)


def test_a_batch_size_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="SIMULATED_BATCH_SIZE 32 .*MODEL.MABN.BATCH_SIZE 3$"):
        build("resnet", "mabn_", config(MODEL__MABN__BATCH_SIZE=3))
    # images per rank that only these ranks have: evaluation works, training does not start
    backbone = build("resnet", "mabn_", config(SOLVER__IMS_PER_BATCH=3))
    x = torch.randn(3, 3, 64, 64)
    backbone.eval()(x)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match="simulated batch size 32 .* batch size 3"):
        backbone.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prefix", "norm"), [("norm_", "FrozenBN"), ("norm_", "BN"), ("norm_", ""), ("gn_", "GN")]
)
def test_is_what_detectron2_builds_where_it_knows_the_norm(
    kind: str, prefix: str, norm: str
) -> None:
    models = []
    fpn = "BN" if norm == "FrozenBN" else norm
    for name in (prefix, ""):
        torch.manual_seed(1)
        cfg = small(norm, fpn, MODEL__BACKBONE__FREEZE_AT=2)
        models.append((build(kind, name, cfg), torch.get_rng_state()))
    (ours, state), (stock, expected_state) = models
    assert torch.equal(state, expected_state)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad, name
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        got, want = ours.double().train(mode)(x), stock.double().train(mode)(x)
        torch.testing.assert_close(got, want)


FROZEN = [
    *product(range(6), [("resnet", "gn_", "GN"), ("resnet_fpn", "mabn_", "MABN")]),
    *((2, ("resnet", "norm_", norm)) for norm in ("BN", "SyncBN", "BatchStatBN")),
]


@pytest.mark.parametrize(("freeze_at", "builder"), FROZEN)
def test_frozen_stages_stay_as_they_are(freeze_at: int, builder: tuple[str, str, str]) -> None:
    kind, prefix, norm = builder
    cfg = config(MODEL__BACKBONE__FREEZE_AT=freeze_at, MODEL__RESNETS__NORM=norm)
    backbone = build(kind, prefix, cfg).train()
    stages = ("stem.", "res2.", "res3.", "res4.", "res5.")[:freeze_at]
    frozen = tuple(("" if kind == "resnet" else "bottom_up.") + stage for stage in stages)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen or ("none",)), name
    trained = [p for p in backbone.parameters() if p.requires_grad]
    outputs = backbone(torch.randn(2, 3, 64, 64))
    if trained:
        sum(y.square().sum() for y in outputs.values()).backward()
        torch.optim.SGD(trained, 1e-3).step()
    for name, tensor in backbone.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        if name.startswith(frozen or ("none",)):
            assert not moved, name
        elif name.endswith(("running_mean", "running_mean_square", "count")):
            assert moved, name
    bottom_up: Any = backbone if kind == "resnet" else backbone.bottom_up
    if freeze_at:
        norm_layer = bottom_up.stem.conv1.norm
        assert (type(norm_layer) is FrozenBatchNorm2d) == (prefix == "norm_")
        assert norm != "MABN" or not norm_layer.training


@pytest.mark.parametrize(
    ("prefix", "norm"), [("gn_", "GN"), ("norm_", "BN"), ("norm_", "SyncBN"), ("mabn_", "MABN")]
)
def test_deformable_stages_get_the_norm(prefix: str, norm: str) -> None:
    stages = [False, True, True, True]
    cfg = config(MODEL__RESNETS__NORM=norm, MODEL__RESNETS__DEFORM_ON_PER_STAGE=stages)
    if norm == "MABN":
        with pytest.raises(ValueError, match=r"DEFORM_ON_PER_STAGE is \[False, True, True, True\]"):
            build("resnet", prefix, cfg)
        return
    with torch.device("meta"):
        backbone = build("resnet", prefix, cfg)
    deformable = [m for m in backbone.modules() if isinstance(m, DeformConv)]
    assert len(deformable) == 4 + 6 + 3 and len(norms(backbone)) == 53
    assert {type(m) for m in norms(backbone)} == {kind_of(norm)}


def said_by_us(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    ours = [r for r in caplog.records if r.name.startswith("rethinking_bn")]
    return [r.getMessage() for r in ours if r.levelno >= level]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["gn_", "mabn_"])
def test_a_plain_checkpoint_leaves_no_key_over_but_the_statistics(
    kind: str, norm: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(MODEL__RESNETS__NORM="BN", MODEL__FPN__NORM="BN")
    plain, model = (nn.ModuleDict({"backbone": build(kind, n, cfg)}) for n in ("", norm))
    with caplog.at_level(logging.WARNING):
        result = DetectionCheckpointer(model)._load_model({"model": plain.state_dict()})
    missing = [] if norm == "gn_" else ["running_mean_square"] * len(norms(model))
    assert [key.rpartition(".")[2] for key in result.missing_keys] == missing
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {key.rpartition(".")[2] for key in result.unexpected_keys} == statistics
    assert not result.incorrect_shapes
    loaded = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded[name], parameter), name
    assert ["backbone." in line for line in said_by_us(caplog)] == [True] * bool(missing)


def test_the_norm_keys_are_replaced_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(MODEL__RESNETS__NORM="SyncBN", MODEL__FPN__NORM="")
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        backbone = build("resnet_fpn", "mabn_", cfg)
    assert not any(isinstance(m, nn.SyncBatchNorm) or type(m) is Conv2d for m in backbone.modules())
    said = said_by_us(caplog, logging.INFO)
    assert len(said) == 2 and "MABN where MODEL.RESNETS.NORM says 'SyncBN'" in said[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        build("resnet", "mabn_", config(MODEL__RESNETS__NORM="MABN"))
    assert not said_by_us(caplog, logging.INFO)


@pytest.mark.parametrize(("index", "norm"), list(enumerate(NAMES)))
def test_every_norm_builds_trains_and_evaluates(index: int, norm: str) -> None:
    fpn = NAMES[index - 1]
    backbone = build("resnet_fpn", "norm_", small(norm, fpn))
    inner = norms(backbone.bottom_up)
    outer = [m for m in norms(backbone) if m not in inner]
    assert [type(m) for m in inner] == [kind_of(norm)] * (20 if norm else 0)
    assert [type(m) for m in outer] == [kind_of(fpn)] * (6 if fpn else 0)
    assert [m for m, _ in backbone.named_children()][-1] == "bottom_up"
    outputs = backbone(torch.randn(2, 3, 64, 64))
    sum(y.square().mean() for y in outputs.values()).backward()
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]
    with torch.no_grad():
        evaluated = backbone.eval()(torch.randn(1, 3, 64, 64))
    assert all(torch.isfinite(y).all() for y in evaluated.values())


def test_the_number_of_groups_is_a_key() -> None:
    backbone = build("resnet_fpn", "norm_", small("GN", "GN", MODEL__GN__NUM_GROUPS=4))
    assert {m.num_groups for m in norms(backbone)} == {4}
    preset = build("resnet_fpn", "gn_", small("BN", "", MODEL__GN__NUM_GROUPS=16))
    assert {m.num_groups for m in norms(preset)} == {16}
    with pytest.raises(ValueError, match="conv1.norm: GN has 48 groups.* 64 channels"):
        build("resnet", "norm_", small("GN", "", MODEL__GN__NUM_GROUPS=48))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__RESNETS__NORM": "nnSyncBN"}, r"MODEL.RESNETS.NORM must be one of .*'nnSyncBN'"),
        ({"MODEL__FPN__NORM": "gn"}, r"MODEL.FPN.NORM must be one of .*got 'gn'"),
        ({"MODEL__BACKBONE__NORM_IMAGES": -1}, "NORM_IMAGES is -1 < 0"),
        (
            {"MODEL__BACKBONE__NORM_IMAGES": 1, "MODEL__FPN__NORM": "SyncBN"},
            "NORM_IMAGES is 1, but SyncBatchNorm2d",
        ),
        (
            {"MODEL__BACKBONE__NORM_IMAGES": 1, "MODEL__RESNETS__NORM": "MABN"},
            "NORM_IMAGES is 1, but MABN2d",
        ),
        (
            {"MODEL__BACKBONE__NORM_IMAGES": 1, "MODEL__RESNETS__NORM": "GN"},
            "NORM_IMAGES is 1, but no norm",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("resnet_fpn", "norm_", small("BN", "", **overrides))


def test_images_that_leave_a_remainder_are_refused() -> None:
    cfg = small("BN", "", MODEL__BACKBONE__NORM_IMAGES=2, SOLVER__IMS_PER_BATCH=6)
    check_batch_size(cfg, 1)
    with pytest.raises(ValueError, match="MODEL.BACKBONE.NORM_IMAGES 2 does not divide the 3 im"):
        check_batch_size(cfg, 2)
    backbone = build("resnet", "norm_", cfg)
    with pytest.raises(ValueError, match="3 rows cannot be normalised 2 at a time"):
        backbone(torch.randn(3, 3, 64, 64))
    backbone.eval()(torch.randn(3, 3, 64, 64))  # population statistics: any number


def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=generator)


def gradients(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Return those of a loss that is a sum over the images of all ranks."""
    outputs = backbone(images).values()
    sum((y * y.detach().sin()).flatten(1).mean(1).sum() for y in outputs).backward()
    grads = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    for grad in grads.values() if dist.is_initialized() else ():
        dist.all_reduce(grad)
    return grads


def make(norm: str, **overrides: Any) -> Backbone:
    torch.manual_seed(0)
    return build("resnet_fpn", "norm_", small(norm, norm, **overrides)).double().train()


def on_a_rank(rank: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    results = {}
    for norm in ("BN", "SyncBN"):
        backbone = make(norm)
        grads = gradients(backbone, images()[2 * rank : 2 * rank + 2])
        results[norm] = grads, dict(backbone.named_buffers())
    return results


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """Return what two processes with two images each computed."""
    return run_distributed(on_a_rank, 2)


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-8, atol=1e-10, msg=name)


def test_two_of_four_images_on_one_process_equal_two_processes(ranks: list[Any]) -> None:
    (grads, first), (_, second) = (of_rank["BN"] for of_rank in ranks)
    backbone = make("BN", MODEL__BACKBONE__NORM_IMAGES=2)
    close(gradients(backbone, images()), grads)
    # two steps of the moving average, the first batch's and the second's, from mean 0, variance 1
    for name, value in backbone.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert value == 2
        else:
            expected = 0.9 * first[name] + second[name] - 0.9 * float(name.endswith("var"))
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)


def test_sync_bn_on_two_processes_equals_one(ranks: list[Any]) -> None:
    backbone = make("SyncBN")
    assert all(isinstance(m, SyncBatchNorm2d) for m in norms(backbone))
    grads = gradients(backbone, images())
    for of_rank in ranks:
        of_two, buffers = of_rank["SyncBN"]
        close(of_two, grads)
        close(buffers, dict(backbone.named_buffers()))


def test_mini_batch_statistics_at_inference_take_each_image_by_itself() -> None:
    backbone, x = make("BatchStatBN", MODEL__BACKBONE__NORM_IMAGES=2).eval(), images()[:3]
    with torch.no_grad():
        alone = [backbone(image[None]) for image in x]
        for name, y in backbone(x).items():
            torch.testing.assert_close(y, torch.cat([each[name] for each in alone]))

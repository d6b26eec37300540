"""Backbones whose norms are what MODEL.RESNETS.NORM and MODEL.FPN.NORM say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone, build_model
from torch import Tensor, nn

from rethinking_bn.engine.checks import check_batch_size
from rethinking_bn.layers import BatchNorm2d, BatchStatNorm2d, MABN2d, SyncBatchNorm2d, get_norm
from rethinking_bn.layers.convert import _replaced_by
from tests.helpers import run_distributed
from tests.modeling.test_backbone import build, config

KINDS = ("resnet", "resnet_fpn", "retinanet_resnet_fpn")
NAMES = ("BN", "SyncBN", "BatchStatBN", "FrozenBN", "GN", "LN", "IN", "MABN", "")


def small(resnets: str, fpn: str, **overrides: Any) -> CfgNode:
    keys = {"MODEL__RESNETS__NORM": resnets, "MODEL__FPN__NORM": fpn}
    return config(18, **{**keys, **overrides})


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, _replaced_by("GN"))]


def kind_of(norm: str) -> type:
    return FrozenBatchNorm2d if norm == "FrozenBN" else type(get_norm(norm, 64))


@pytest.mark.parametrize(("index", "norm"), list(enumerate(NAMES)))
def test_every_norm_builds_trains_and_evaluates(index: int, norm: str) -> None:
    fpn = NAMES[index - 1]
    backbone = build("resnet_fpn", "norm_", small(norm, fpn))
    inner = norms(backbone.bottom_up)
    outer = [m for m in norms(backbone) if m not in inner]
    assert [type(m) for m in inner] == [kind_of(norm)] * (20 if norm else 0)
    assert [type(m) for m in outer] == [kind_of(fpn)] * (6 if fpn else 0)
    assert [m for m, _ in backbone.named_children()][-1] == "bottom_up"
    x = torch.randn(2, 3, 64, 64)
    outputs = backbone(x)
    sum(y.square().mean() for y in outputs.values()).backward()
    missing = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert not missing
    backbone.eval()(x[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", ""])
def test_is_what_detectron2_builds_where_it_knows_the_norm(kind: str, norm: str) -> None:
    models = []
    for ours in ("norm_", ""):
        torch.manual_seed(1)
        cfg = small(norm, "BN" if norm else "", MODEL__BACKBONE__FREEZE_AT=2)
        models.append((build(kind, ours, cfg), torch.get_rng_state()))
    (ours, state), (stock, expected_state) = models
    assert torch.equal(state, expected_state)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad, name
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        got, want = ours.double().train(mode)(x), stock.double().train(mode)(x)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "BatchStatBN", "MABN", "GN"])
def test_freeze_at_freezes_the_first_stages(norm: str) -> None:
    backbone = build("resnet", "norm_", small(norm, "", MODEL__BACKBONE__FREEZE_AT=2)).train()
    frozen = [*norms(backbone.stem), *norms(backbone.res2)]
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    if norm not in ("MABN", "GN"):
        assert {type(m) for m in frozen} == {FrozenBatchNorm2d}
    sum(y.sum() for y in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    for name, p in backbone.named_parameters():
        assert (p.grad is None) == name.startswith(("stem", "res2")), name
    moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith(("stem", "res2")) for name in moved)
    assert bool(moved) == (norm != "GN")


def test_the_number_of_groups_is_a_key() -> None:
    backbone = build("resnet_fpn", "norm_", small("GN", "GN", MODEL__GN__NUM_GROUPS=4))
    assert {m.num_groups for m in norms(backbone)} == {4}
    preset = build("resnet_fpn", "gn_", small("BN", "", MODEL__GN__NUM_GROUPS=16))
    assert {m.num_groups for m in norms(preset)} == {16}
    with pytest.raises(ValueError, match="GN has 48 groups, which do not divide 64 channels"):
        build("resnet", "norm_", small("GN", "", MODEL__GN__NUM_GROUPS=48))


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN"])
def test_deformable_stages_get_the_norm(norm: str) -> None:
    cfg = config(50, MODEL__RESNETS__NORM=norm)
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, True]
    with torch.device("meta"):
        backbone = build("resnet", "norm_", cfg)
    assert {type(m) for m in norms(backbone)} == {kind_of(norm)} and len(norms(backbone)) == 53


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__RESNETS__NORM": "nnSyncBN"}, r"MODEL.RESNETS.NORM must be one of .*'nnSyncBN'"),
        ({"MODEL__FPN__NORM": "gn"}, r"MODEL.FPN.NORM must be one of .*got 'gn'"),
        ({"MODEL__BACKBONE__NORM_IMAGES": -1}, "NORM_IMAGES is -1 < 0"),
        (
            {"MODEL__BACKBONE__NORM_IMAGES": 1, "MODEL__FPN__NORM": "SyncBN"},
            "NORM_IMAGES is 1, but SyncBatchNorm2d pools all ranks",
        ),
        (
            {"MODEL__BACKBONE__NORM_IMAGES": 1, "MODEL__RESNETS__NORM": "MABN"},
            "NORM_IMAGES is 1, but MABN2d averages",
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


def loss_of(backbone: Backbone, x: Tensor) -> Tensor:
    """Return a loss that is a sum over images, so that gradients of ranks add up."""
    return sum((y * y.detach().sin()).flatten(1).mean(1).sum() for y in backbone(x).values())


def gradients(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    loss_of(backbone, images).backward()
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
            continue
        initial = 1.0 if name.endswith("var") else 0.0
        batch = [(buffers[name] - 0.9 * initial) / 0.1 for buffers in (first, second)]
        expected = 0.9 * (0.9 * initial + 0.1 * batch[0]) + 0.1 * batch[1]
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
    backbone = make("BatchStatBN", MODEL__BACKBONE__NORM_IMAGES=2).eval()
    assert all(isinstance(m, BatchStatNorm2d) for m in norms(backbone))
    x = images()[:3]
    with torch.no_grad():
        together = backbone(x)
        for i in range(3):
            alone = backbone(x[i : i + 1])
            for name, y in together.items():
                torch.testing.assert_close(y[i : i + 1], alone[name])


def test_a_detector_is_built_with_it() -> None:
    cfg = small("BN", "GN", MODEL__META_ARCHITECTURE="ConfigurableHeadRetinaNet")
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.BACKBONE.NAME = "build_norm_retinanet_resnet_fpn_backbone"
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(isinstance(m, BatchNorm2d) for m in model.modules()) == 20
    assert not any(isinstance(m, MABN2d) for m in model.modules())

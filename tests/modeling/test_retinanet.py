"""ConfigurableHeadRetinaNet: detectron2's RetinaNet but for the head, from cfg and LazyConfig."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from rethinking_bn.modeling import (
    ConfigurableHeadRetinaNet,
    DomainBNRetinaNetHead,
    SharedBNRetinaNetHead,
)
from tests.modeling.models import retinanet_config, training_batch


def build(cfg: CfgNode, seed: int = 3) -> tuple[nn.Module, Tensor]:
    """Return a model and the random state after building it."""
    torch.manual_seed(seed)
    return build_model(cfg), torch.get_rng_state()


def losses(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.train()
    with EventStorage():
        return model(batch)


@pytest.mark.parametrize("norm", ["", "GN", "BN", "SyncBN"])
def test_with_detectron2s_head_the_model_is_detectron2s(norm: str) -> None:
    ours = retinanet_config(MODEL__RETINANET__NORM=norm)
    stock = retinanet_config(MODEL__RETINANET__NORM=norm, MODEL__META_ARCHITECTURE="RetinaNet")
    (model, state), (expected, expected_state) = build(ours), build(stock)
    assert isinstance(model, ConfigurableHeadRetinaNet)
    assert type(model.head) is type(expected.head)
    assert torch.equal(state, expected_state)
    assert list(model.state_dict()) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    batch = training_batch()
    if norm != "SyncBN":  # torch's refuses the CPU in training
        got, want = losses(model, batch), losses(expected, batch)
        assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in want.items()}
    got, want = (m.eval()(batch)[0]["instances"].pred_boxes for m in (model, expected))
    assert torch.equal(got.tensor, want.tensor)


def test_with_another_head_everything_else_is_drawn_alike() -> None:
    cfg = retinanet_config(
        MODEL__RETINANET__HEAD_NAME="SharedBNRetinaNetHead", MODEL__RETINANET__NORM="SyncBN"
    )
    stock = retinanet_config(MODEL__META_ARCHITECTURE="RetinaNet", MODEL__RETINANET__NORM="BN")
    dump = cfg.dump()
    cfg.freeze()
    (model, state), (expected, expected_state) = build(cfg), build(stock)
    assert isinstance(model.head, SharedBNRetinaNetHead)
    assert torch.equal(state, expected_state)
    own = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(own[name], parameter), name
    assert cfg.dump() == dump


def test_choices_come_from_cfg() -> None:
    cfg = retinanet_config(
        MODEL__RETINANET__HEAD_NAME="MultiDomainBNRetinaNetHead",
        MODEL__RETINANET__NORM="BN",
        MODEL__RETINANET__BN__TRAIN_STATS="domain_specific",
        MODEL__RETINANET__BN__AFFINE="domain_specific",
    )
    norm = build(cfg)[0].head.cls_subnet[1]
    choices = (norm.train_stats, norm.population_stats, norm.affine, norm.sync)
    assert choices == ("domain_specific", "shared", "domain_specific", False)
    cfg.MODEL.RETINANET.HEAD_NAME = "DomainBNRetinaNetHead"
    cfg.MODEL.RETINANET.BN.POPULATION_STATS = "shared"
    with pytest.raises(ValueError, match="POPULATION_STATS"):
        build(cfg)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("HEAD_NAME", "SharedBNHead", "'SharedBNHead'.*MultiDomainBNRetinaNetHead"),
        ("BN__AFFINE", "shared", "BN.AFFINE is 'shared'.*MultiDomainBNRetinaNetHead"),
        ("NORM", "MABN", "NORM is 'MABN'.*MultiDomainBNRetinaNetHead"),
    ],
)
def test_what_the_named_head_does_not_know_is_refused(key: str, value: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(retinanet_config(**{f"MODEL__RETINANET__{key}": value}))


def test_lazy_config_of_detectron2_takes_our_head() -> None:
    lazy = model_zoo.get_config("common/models/retinanet.py").model
    lazy.backbone.bottom_up.stages.norm = "FrozenBN"
    lazy._target_ = ConfigurableHeadRetinaNet
    lazy.head._target_ = DomainBNRetinaNetHead
    lazy.head.norm = "SyncBN"
    model = instantiate(lazy)
    assert isinstance(model.head, DomainBNRetinaNetHead)
    sum(losses(model, training_batch(1)).values()).backward()

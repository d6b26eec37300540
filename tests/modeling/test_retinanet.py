"""ConfigurableHeadRetinaNet, and its heads: what they compute, how they start, what they refuse."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from rethinking_bn.layers import CenConv2d, CycleBatchNorm2d, MABN2d, SyncBatchNorm2d
from rethinking_bn.layers.multi_domain import TABLE_5
from rethinking_bn.modeling import (
    ConfigurableHeadRetinaNet,
    CycleBNRetinaNetHead,
    DomainBNRetinaNetHead,
    MultiDomainBNRetinaNetHead,
    SharedBNRetinaNetHead,
)
from tests.modeling.models import features, head_arguments, retinanet_config, training_batch
from tests.reference import run_levels


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


CHOICES = list(product(("shared", "domain_specific"), repeat=3))
NAMES = tuple(TABLE_5[1])
HEADS = (
    MultiDomainBNRetinaNetHead,
    SharedBNRetinaNetHead,
    CycleBNRetinaNetHead,
    DomainBNRetinaNetHead,
)


def randomize(head: nn.Module) -> None:
    """Make every parameter and statistic different, so that a mixed-up one shows."""
    for name, tensor in head.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith(("running_var", "weight")) else -0.5
            scale = 0.1 if tensor.dim() == 4 else 1.0
            tensor.copy_((torch.rand_like(tensor) + low) * scale)


@pytest.mark.parametrize("choices", CHOICES)
def test_all_eight_combinations_train_and_infer(choices: tuple[str, str, str]) -> None:
    given = dict(zip(NAMES, choices, strict=True))
    head = MultiDomainBNRetinaNetHead(**head_arguments(norm="BN", **given)).double()
    randomize(head)
    xs = features(dtype=torch.float64)
    logits, deltas = head(xs)
    layers = [*head.cls_subnet, head.cls_score]
    expected = run_levels(layers, xs, given["train_stats"], given["affine"])
    assert [d.shape[1] for d in deltas] == [12] * 5
    torch.testing.assert_close(logits, expected)
    norm = head.cls_subnet[1]
    assert ("0.running_mean" in norm.state_dict()) == (choices[1] == "domain_specific")
    head.eval()
    assert all(torch.isfinite(x).all() for x in head(xs)[0])


@pytest.mark.parametrize("cls", HEADS)
def test_initialisation_draws_and_keys_are_those_of_detectron2(cls: type[nn.Module]) -> None:
    torch.manual_seed(1)
    stock = RetinaNetHead(**head_arguments(norm="BN", prior_prob=0.02))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    head = cls(**head_arguments(norm="BN", prior_prob=0.02))
    assert torch.equal(torch.get_rng_state(), state)
    own = dict(head.named_parameters())
    convolutions = [name for name, p in stock.named_parameters() if p.dim() == 4]
    for name in (*convolutions, "cls_score.bias", "bbox_pred.bias", "cls_subnet.0.bias"):
        assert torch.equal(own[name], stock.get_parameter(name)), name
    if cls is CycleBNRetinaNetHead:
        assert set(head.state_dict()) == set(stock.state_dict())


@pytest.mark.parametrize(
    ("cls", "choices"), [(CycleBNRetinaNetHead, {}), (MultiDomainBNRetinaNetHead, TABLE_5[4])]
)
def test_row_4_equals_detectron2s_cycling_head(cls: Any, choices: dict[str, Any]) -> None:
    stock = RetinaNetHead(**head_arguments(norm="BN")).double()
    randomize(stock)
    head = cls(**head_arguments(norm="BN", **choices)).double()
    head.load_state_dict(stock.state_dict())
    for training in (True, True, False):
        results = []
        xs = features(dtype=torch.float64)
        for model in (stock, head):
            model.train(training).zero_grad()
            inputs = [x.clone().requires_grad_() for x in xs]
            outputs = [y for group in model(inputs) for y in group]
            sum((y * y.detach().cos()).sum() for y in outputs).backward()
            gradients = [x.grad for x in inputs] + [p.grad for p in model.parameters()]
            results.append(outputs + gradients)
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(dict(head.state_dict()), dict(stock.state_dict()))


def test_an_interrupted_pass_shifts_no_statistics() -> None:
    head = CycleBNRetinaNetHead(**head_arguments(norm="BN"))
    norm = head.cls_subnet[1]
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        head(features())
    handle.remove()
    norm.reset_running_stats()
    xs = features()
    head(xs)
    for level, x in enumerate(xs):
        expected = 0.1 * head.cls_subnet[0](x).mean((0, 2, 3))
        torch.testing.assert_close(norm.get_buffer(f"{level}.running_mean"), expected)


@pytest.mark.parametrize("norm", ["", "GN", lambda channels: nn.GroupNorm(4, channels)])
def test_other_norms_compute_what_detectron2s_head_computes(norm: Any) -> None:
    torch.manual_seed(1)
    stock = RetinaNetHead(**head_arguments(norm=norm))
    torch.manual_seed(1)
    head = MultiDomainBNRetinaNetHead(**head_arguments(norm=norm))
    xs = features()
    torch.testing.assert_close(head(xs), stock(xs))


def test_mabn_pools_the_levels_of_a_pass_into_one_iteration(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"simulated_batch_size": 8, "batch_size": 2, "momentum": 1.0}
    arguments = head_arguments(norm="MABN", norm_arguments=options)
    torch.manual_seed(1)
    head = MultiDomainBNRetinaNetHead(**arguments).double()
    torch.manual_seed(1)
    stock = RetinaNetHead(**head_arguments(norm="GN"))
    for name, p in head.named_parameters():
        if p.dim() == 4:  # the same draws, the same names
            assert torch.equal(p, stock.get_parameter(name).double()), name
    xs = features(dtype=torch.float64)
    logits, _ = head(xs)
    for index in range(0, len(head.cls_subnet), 3):
        convolution, norm, _ = head.cls_subnet[index : index + 3]
        assert type(convolution) is CenConv2d and convolution.bias is None
        assert type(norm) is MABN2d and norm.iterations == 1
        weight = convolution.weight - convolution.weight.mean((1, 2, 3), keepdim=True)
        xs = [nn.functional.conv2d(x, weight, padding=1) for x in xs]
        s = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1).square().mean(1)
        torch.testing.assert_close(norm.running_mean_square, s)
        xs = [(x / (s.view(1, -1, 1, 1) + norm.eps).sqrt()).relu() for x in xs]
    assert type(head.cls_score) is nn.Conv2d and head.cls_score.bias is not None
    torch.testing.assert_close(logits, [head.cls_score(x) for x in xs])
    ours = [record for record in caplog.records if record.name.startswith("rethinking_bn")]
    assert not [record for record in ours if record.levelname != "INFO"]
    eval_logits = head.eval()(features(dtype=torch.float64))[0]
    assert all(torch.isfinite(x).all() for x in eval_logits)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("trained_with", ["", "GN"])
def test_weights_without_statistics_load_on_purpose_only(cls: type, trained_with: str) -> None:
    """Defect 20, with the key that says so."""
    weights = RetinaNetHead(**head_arguments(norm=trained_with)).state_dict()
    with pytest.raises(RuntimeError, match="MODEL.ALLOW_MISSING_STATISTICS True"):
        cls(**head_arguments(norm="BN")).load_state_dict(weights, strict=False)
    head = cls(**head_arguments(norm="BN"), allow_missing_statistics=True)
    fresh = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(weights, strict=False)
    own_affine = isinstance(head, DomainBNRetinaNetHead)
    for name, value in head.state_dict().items():
        if "running" in name:
            assert torch.equal(value, fresh[name]), name
        elif name in weights and not own_affine:
            assert torch.equal(value, weights[name]), name


def test_callables_may_make_mabn_count_their_calls_or_pool_ranks() -> None:
    head = MultiDomainBNRetinaNetHead(**head_arguments(norm=MABN2d))
    assert sum(type(m) is CenConv2d for m in head.modules()) == 4
    for norm in (lambda c: CycleBatchNorm2d(c, 5), SyncBatchNorm2d):
        head = MultiDomainBNRetinaNetHead(**head_arguments(norm=norm))
        assert len(head(features())[0]) == 5
        head.eval()  # would raise in mid-cycle


@pytest.mark.parametrize(
    ("cls", "arguments", "words"),
    [
        (SharedBNRetinaNetHead, {"train_stats": "domain_specific"}, ["TRAIN_STATS", "'shared'"]),
        (DomainBNRetinaNetHead, {"affine": "shared"}, ["AFFINE", "'domain_specific'"]),
        (CycleBNRetinaNetHead, {"population_stats": "shared"}, ["POPULATION_STATS"]),
        (MultiDomainBNRetinaNetHead, {"train_stats": "each"}, ["'each'", "'shared'"]),
        (SharedBNRetinaNetHead, {"norm": "GN"}, ["'GN'", "BN, SyncBN"]),
        (SharedBNRetinaNetHead, {"norm": ""}, ["BN, SyncBN"]),
        (MultiDomainBNRetinaNetHead, {"norm": "GN", "affine": "shared"}, ["affine", "'GN'"]),
        (MultiDomainBNRetinaNetHead, {"norm": "SynBN"}, ["'SynBN'", "SyncBN"]),
        (MultiDomainBNRetinaNetHead, {"conv_dims": []}, ["NUM_CONVS"]),
    ],
)
def test_typos_and_contradictions_say_what_is_allowed(
    cls: type[nn.Module], arguments: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        cls(**head_arguments(**{"norm": "BN", **arguments}))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("cls", HEADS)
def test_wrong_number_of_levels(cls: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="5 feature levels, got 4"):
        cls(**head_arguments())(features()[:4])


@pytest.mark.parametrize("cls", HEADS)
def test_empty_batch_leaves_the_statistics_alone(cls: type[nn.Module]) -> None:
    head = cls(**head_arguments(norm="BN"))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    logits, deltas = head(features(images=0))
    assert [x.shape[0] for x in (*logits, *deltas)] == [0] * 10
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name]), name

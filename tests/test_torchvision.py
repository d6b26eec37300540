"""torchvision's RetinaNet with a head over MultiDomainBatchNorm2d."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead

from rethinking_bn.layers import MABN2d, MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.torchvision import MultiDomainBNRetinaNetHead, run_detector
from tests import reference
from tests.helpers import run_distributed
from tests.torchvision_cases import (
    ANCHORS,
    CHANNELS,
    CHOICES,
    CLASSES,
    LEVELS,
    ROW1,
    ROW6,
    batch,
    features,
    make_head,
    retinanet,
)

Outputs = dict[str, Tensor]


def torchvisions(norm_layer: Any = None, seed: int = 0) -> RetinaNetHead:
    torch.manual_seed(seed)
    return RetinaNetHead(CHANNELS, ANCHORS, CLASSES, norm_layer=norm_layer)


def backward(head: nn.Module, xs: list[Tensor]) -> tuple[Outputs, dict[str, Tensor], list[Any]]:
    """Return the outputs and the gradients of parameters and inputs of a loss unlike any other."""
    xs = [x.clone().requires_grad_() for x in xs]
    outputs = head(xs)
    sum((out * out.sin()).sum() for out in outputs.values()).backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    return outputs, gradients, [x.grad for x in xs]


def statistics(head: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in head.named_buffers()}


@pytest.mark.parametrize(
    ("name", "norm_layer"),
    [
        ("", None),
        (None, None),
        ("GN", partial(nn.GroupNorm, 32)),
        (partial(nn.GroupNorm, 4), partial(nn.GroupNorm, 4)),
        (nn.BatchNorm2d, nn.BatchNorm2d),
    ],
)
def test_without_levels_in_the_norm_it_is_torchvisions_head(name: Any, norm_layer: Any) -> None:
    channels = 32 if name == "GN" else CHANNELS
    torch.manual_seed(3)
    ours = MultiDomainBNRetinaNetHead(channels, ANCHORS, CLASSES, name).double()
    ours_next = torch.rand(1)
    torch.manual_seed(3)
    theirs = RetinaNetHead(channels, ANCHORS, CLASSES, norm_layer=norm_layer).double()
    assert torch.equal(ours_next, torch.rand(1))  # the same draws
    mine, others = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(others) and all(torch.equal(mine[k], others[k]) for k in mine)
    xs = [x.repeat(1, channels // CHANNELS, 1, 1) for x in features()]
    torch.testing.assert_close(backward(ours, xs), backward(theirs, xs), rtol=0, atol=0)
    torch.testing.assert_close(statistics(ours), statistics(theirs), rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(xs), theirs.eval()(xs), rtol=0, atol=0)


def test_row_3_is_torchvisions_head_with_batch_norm() -> None:
    ours = make_head(train_stats="domain_specific").double()
    theirs = torchvisions(nn.BatchNorm2d).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):
        torch.testing.assert_close(backward(ours, features()), backward(theirs, features()))
    torch.testing.assert_close(statistics(ours), statistics(theirs))
    torch.testing.assert_close(ours.eval()(features()), theirs.eval()(features()))


def written_out(head: Any, xs: list[Tensor], shared: bool) -> Outputs:
    """Row 1 (shared) or row 6 in training, position by position, anchor by anchor."""
    outputs, choice = {}, CHOICES[not shared]
    for subnet, key, last, width in (
        (head.classification_head, "cls_logits", "cls_logits", CLASSES),
        (head.regression_head, "bbox_regression", "bbox_reg", 4),
    ):
        layers = [layer for block in subnet.conv for layer in block]
        maps = reference.run_levels([*layers, getattr(subnet, last)], xs, choice, choice)
        rows = [
            x[:, anchor * width : (anchor + 1) * width, i, j]
            for x in maps
            for i in range(x.shape[2])
            for j in range(x.shape[3])
            for anchor in range(ANCHORS)
        ]
        outputs[key] = torch.stack(rows, dim=1)
    return outputs


@pytest.mark.parametrize("choices", [ROW1, ROW6])
def test_equals_a_written_out_head(choices: dict[str, str]) -> None:
    head = make_head(**choices).double()
    for parameter in head.parameters():
        if parameter.dim() == 1:  # affines that differ from level to level
            nn.init.uniform_(parameter, 0.5, 1.5)
    twin = copy.deepcopy(head)
    outputs = written_out(twin, features(), choices is ROW1)
    sum((out * out.sin()).sum() for out in outputs.values()).backward()
    ours, gradients, _ = backward(head, features())
    torch.testing.assert_close(ours, outputs)
    torch.testing.assert_close(gradients, {n: p.grad for n, p in twin.named_parameters()})


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
@pytest.mark.parametrize("values", list(product(CHOICES, repeat=3)))
def test_all_eight_choices_train(values: tuple[str, ...], norm: str) -> None:
    choices = dict(zip(ROW1, values, strict=True))
    model = retinanet(make_head(norm, **choices))
    before = statistics(model.head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = model(*batch())
    assert set(losses) == {"classification", "bbox_regression"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    after = statistics(model.head)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert len(after) == 8 * 3 * (1 if choices["population_stats"] == "shared" else LEVELS)
    norms = [m for m in model.modules() if isinstance(m, MultiDomainBatchNorm2d)]
    assert [(m.sync, m.train_stats, m.population_stats, m.affine) for m in norms] == [
        (norm == "SyncBN", *values)
    ] * 8
    detections = model.eval()(batch()[0])
    assert all(len(d["boxes"]) and d["scores"].isfinite().all() for d in detections)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_population_training_on_torchvisions_batches(shared: bool, labelled: bool) -> None:
    model = retinanet(make_head(**(ROW1 if shared else ROW6)))
    batches = [batch(seed) for seed in range(3)]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    conv, norm = model.head.classification_head.conv[0][:2]
    seen: list[Tensor] = []
    conv.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    report = estimate_population_statistics(
        model,
        batches if labelled else [list(images) for images, _ in batches],
        3,
        labelled=None if labelled else False,
        forward=run_detector,
        progress=False,
    )
    assert report.labelled == labelled and model.training and not report.unreached
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    groups = [seen] if shared else [seen[level::LEVELS] for level in range(LEVELS)]
    holders = [norm] if shared else [norm.get_submodule(str(level)) for level in range(LEVELS)]
    for holder, values in zip(holders, map(reference.values_per_channel, groups), strict=True):
        torch.testing.assert_close(holder.running_mean, values.mean(1))
        torch.testing.assert_close(holder.running_var, values.var(1))


def test_batches_are_pairs_or_images_alone() -> None:
    model = retinanet(make_head())
    images, targets = batch()
    assert set(run_detector(model, [images, targets])) == set(model(images, targets))
    with pytest.raises(ValueError, match="labelled=False"):
        run_detector(model, list(images))
    model.eval()
    for alone in (images, list(images), (images, targets), (images, None)):
        assert len(run_detector(model, alone)) == 2


def test_state_dict_round_trip_and_from_row_1_to_row_6() -> None:
    row1, xs = make_head(**ROW1), [x.float() for x in features(9)]
    row1([x.float() for x in features()])
    row1.eval()
    again = make_head(seed=5, **ROW1).eval()
    again.load_state_dict(row1.state_dict())
    torch.testing.assert_close(again(xs), row1(xs), rtol=0, atol=0)
    row6 = make_head(seed=5, **ROW6).eval()
    assert not set(row6.state_dict()) & {k for k in row1.state_dict() if "running_mean" in k}
    row6.load_state_dict(row1.state_dict())
    torch.testing.assert_close(row6(xs), row1(xs), rtol=0, atol=0)
    # per-level affines that have grown apart cannot become one
    with pytest.raises(RuntimeError, match="affine"):
        make_head(**ROW1).load_state_dict(row6.state_dict())


def test_torchvisions_checkpoints() -> None:
    theirs, xs = torchvisions(nn.BatchNorm2d), features()
    theirs.double()(xs)
    theirs.eval()
    for choices in (ROW1, ROW6, {"train_stats": CHOICES[1]}):
        ours = make_head(seed=5, **choices).double().eval()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(xs), theirs(xs))
    theirs.load_state_dict(make_head(**ROW1).state_dict())
    with pytest.raises(RuntimeError, match="running_mean"):  # weights without statistics
        make_head(**ROW6).load_state_dict(torchvisions().state_dict())
    # torchvision's first layout, without norms
    first = {}
    for key, value in torchvisions(seed=7).state_dict().items():
        head, _, rest = key.partition(".conv.")
        if rest:
            block, _, kind = rest.split(".")
            key = f"{head}.conv.{2 * int(block)}.{kind}"
        first[key] = value
    loaded = make_head("")
    loaded.load_state_dict(first)
    expected = torchvisions(seed=7).state_dict()
    torch.testing.assert_close(loaded.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("bn", {}, "'bn'"),
        ("BN", {"affine": "each"}, "affine .*'each'"),
        ("GN", {"train_stats": "shared"}, "train_stats='shared' .*'GN'"),
        (None, {"affine": "domain_specific"}, "affine='domain_specific' .* None"),
        ("MABN", {}, "centred"),
        (MABN2d, {}, "centred"),
        ("GN", {}, "32 groups"),
    ],
)
def test_what_does_not_fit_is_an_error(norm: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(norm, **options)
    with pytest.raises(ValueError, match=f"{LEVELS} tensors, got 2"):
        make_head()([x.float() for x in features()[:2]])


def _synchronised(rank: int, images: list[slice]) -> Any:
    results = []
    for choices in (ROW1, ROW6):
        head = make_head("SyncBN", **choices).double()
        xs = [x[images[rank]] for x in features(images=3)]
        outputs, gradients, of_inputs = backward(head, xs)
        outputs = {name: out.detach() for name, out in outputs.items()}
        results.append((outputs, gradients, of_inputs, statistics(head)))
    return results


@pytest.mark.parametrize("images", [[slice(0, 2), slice(2, 3)], [slice(0, 0), slice(0, 3)]])
def test_synchronised_over_two_processes(images: list[slice]) -> None:
    """Equals one process with the images of both, also where one has none."""
    ranks = run_distributed(_synchronised, 2, images)
    for number, choices in enumerate((ROW1, ROW6)):
        head = make_head("BN", **choices).double()
        outputs, gradients, of_inputs = backward(head, features(images=3))
        first, second = (rank[number] for rank in ranks)
        for name, out in outputs.items():
            torch.testing.assert_close(torch.cat([first[0][name], second[0][name]]), out)
        for name, gradient in gradients.items():
            torch.testing.assert_close(first[1][name] + second[1][name], gradient)
        for level, gradient in enumerate(of_inputs):
            torch.testing.assert_close(torch.cat([first[2][level], second[2][level]]), gradient)
        for rank in (first, second):
            torch.testing.assert_close(rank[3], statistics(head))

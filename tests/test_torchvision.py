"""torchvision's RetinaNet with a BatchNorm over levels, and its Mask R-CNN with shuffled RoIs."""

from __future__ import annotations

import copy
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from rethinking_bn.layers import BatchNorm2d, MABN2d, MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.randomness import announce_iteration
from rethinking_bn.torchvision import (
    MultiDomainBNRetinaNetHead,
    ShuffleBNBoxHead,
    ShuffleBNMaskHead,
    run_detector,
)
from tests import reference, rois
from tests.helpers import run_distributed

Outputs = dict[str, Tensor]
SIZE, CHANNELS, LEVELS, ANCHORS, CLASSES = 64, 8, 3, 2, 4
CHOICES = ("shared", "domain_specific")
ROW1, ROW6 = (dict.fromkeys(("train_stats", "population_stats", "affine"), c) for c in CHOICES)


class TinyBackbone(nn.Module):
    """Three strided convolutions and an FPN over them: maps of 16, 8 and 4 pixels."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1) for _ in range(LEVELS)
        )
        self.fpn = FeaturePyramidNetwork([CHANNELS] * LEVELS, CHANNELS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x), {}
        for level, stage in enumerate(self.stages):
            maps[str(level)] = x = stage(x.relu())
        return self.fpn(maps)


def make_head(norm_layer: Any = "BN", seed: int = 0, **options: Any) -> MultiDomainBNRetinaNetHead:
    """Return a head for :class:`TinyBackbone` with initial weights drawn from a seed."""
    torch.manual_seed(seed)
    return MultiDomainBNRetinaNetHead(
        CHANNELS, ANCHORS, CLASSES, norm_layer, num_levels=LEVELS, **options
    )


def retinanet(head: nn.Module) -> RetinaNet:
    """Return a tiny RetinaNet around a head."""
    torch.manual_seed(1)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0),) * LEVELS)
    return RetinaNet(
        TinyBackbone(),
        CLASSES,
        anchor_generator=anchors,
        head=head,
        min_size=SIZE,
        max_size=SIZE,
        score_thresh=0.0,
    )


def mask_rcnn(norm_layer: Any = "BN") -> MaskRCNN:
    """Return a tiny Mask R-CNN with the shuffling heads."""
    torch.manual_seed(1)
    names = [str(level) for level in range(LEVELS)]
    return MaskRCNN(
        TinyBackbone(),
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * LEVELS),
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=10,
        box_batch_size_per_image=16,
        box_roi_pool=MultiScaleRoIAlign(names, 4, 2),
        box_head=ShuffleBNBoxHead((CHANNELS, 4, 4), [8, 8], [16], norm_layer),
        box_predictor=FastRCNNPredictor(16, CLASSES),
        box_score_thresh=0.0,
        mask_roi_pool=MultiScaleRoIAlign(names, 6, 2),
        mask_head=ShuffleBNMaskHead(CHANNELS, [8, 8], 1, norm_layer),
        mask_predictor=MaskRCNNPredictor(8, 8, CLASSES),
    )


def batch(seed: int = 0, images: int = 2) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return (images, targets) as torchvision's collate function makes them."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(images):
        corner = torch.rand(3, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 10 + corner.flip(1) / 2], dim=1)
        masks = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": masks}
        samples.append((torch.rand(3, SIZE, SIZE, generator=generator), target))
    return tuple(zip(*samples, strict=True))  # type: ignore[return-value]


def features(seed: int = 0, images: int = 2) -> list[Tensor]:
    """Return feature maps whose statistics differ from level to level; float64."""
    return reference.levels(seed, images, [(6, 6), (4, 4), (2, 2)], CHANNELS)


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


RUN_SEED, ITERATION = 5, 8
kinds = pytest.mark.parametrize("kind", ["box", "mask"])


def make_roi_head(
    kind: str, norm_layer: Any = "BN", *, shuffled: bool = True, **options: Any
) -> Any:
    """Return a small head with random affines; float64, training mode, always the same weights."""
    torch.manual_seed(2)
    if kind == "box":
        box = ShuffleBNBoxHead if shuffled else FastRCNNConvFCHead
        fc_layers = options.get("fc_layers", [6])
        head = box((rois.CHANNELS, rois.SIDE, rois.SIDE), [4, 8], fc_layers, norm_layer=norm_layer)
    else:
        mask = ShuffleBNMaskHead if shuffled else MaskRCNNHeads
        head = mask(rois.CHANNELS, [4, 8], options.get("dilation", 1), norm_layer=norm_layer)
    for parameter in head.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return head.double()


@kinds
def test_permuted_in_one_process_it_is_torchvisions_head(kind: str) -> None:
    """The statistics of permuted rows are those of the rows."""
    ours, theirs = make_roi_head(kind), make_roi_head(kind, nn.BatchNorm2d, shuffled=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours[0][0].weight, theirs[0][0].weight)
    orders = rois.record_orders(ours)
    x, y = (rois.rois(9).requires_grad_() for _ in range(2))
    out, expected = ours(x), theirs(y)
    assert not torch.equal(orders[0], x[:, 0, 0, 0])
    assert torch.equal(orders[0].sort().values, x[:, 0, 0, 0].sort().values)
    torch.testing.assert_close(out, expected)
    (rois.loss(out) + rois.loss(expected)).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(rois.gradients(ours), rois.gradients(theirs))
    torch.testing.assert_close(rois.running(ours), rois.running(theirs))


@kinds
def test_at_inference_it_is_the_unshuffled_head_with_the_same_checkpoint(kind: str) -> None:
    ours, theirs = make_roi_head(kind), make_roi_head(kind, BatchNorm2d, shuffled=False)
    ours(rois.rois(7))
    theirs.load_state_dict(ours.state_dict())
    orders, x = rois.record_orders(ours), rois.rois(5, seed=3)
    for rows in (x, x[:0]):
        assert torch.equal(ours.eval()(rows), theirs.eval()(rows))
        assert torch.equal(orders.pop(), rows[:, 0, 0, 0])
    ours.load_state_dict(make_roi_head(kind, nn.BatchNorm2d, shuffled=False).state_dict())


@kinds
@pytest.mark.parametrize("norm", ["bn", "MABN"])
def test_a_norm_that_does_not_fit_is_an_error(norm: str, kind: str) -> None:
    with pytest.raises(ValueError, match=norm):
        make_roi_head(kind, norm)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("box", {}),
    ("box", {"fc_layers": []}),
    ("box", {"fc_layers": [100, 5]}),
    ("mask", {}),
    ("mask", {"dilation": 2}),
]
CASES = [(*kind, rows) for kind in KINDS for rows in [(4, 5), (0, 3), (0, 0), (6, 1)]]


def _run_cases(rank: int) -> list[dict[str, Any]]:
    results = []
    for kind, options, rows in CASES:
        head = make_roi_head(kind, **options)
        announce_iteration(head, RUN_SEED, ITERATION)
        results.append(rois.on_rank(head, head, rows, rank))
    return results


@cache
def two_processes() -> list[list[dict[str, Any]]]:
    return run_distributed(_run_cases, 2)


def roi_head_written_out(head: Any, x: Tensor, sizes: Any) -> Tensor:
    x, _ = rois.written_out(head, x, sizes)
    if isinstance(head, FastRCNNConvFCHead):
        x = x.flatten(1)
        for layer in head:
            x = layer(x).relu() if isinstance(layer, nn.Linear) else x
    return x


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_equal_one_that_normalises_the_same_shares(number: int) -> None:
    kind, options, rows = CASES[number]
    head, total = make_roi_head(kind, nn.BatchNorm2d, shuffled=False, **options), sum(rows)
    order = rois.permutation(make_roi_head(kind), total, RUN_SEED, ITERATION)
    ranks = [of_rank[number] for of_rank in two_processes()]
    groups = [[share] for share in rois.shares(total, 2)]
    rois.assert_equals_one_process(ranks, head, partial(roi_head_written_out, head), order, groups)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "", partial(nn.GroupNorm, 4)])
def test_in_torchvisions_mask_rcnn(norm: Any) -> None:
    model = mask_rcnn(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for iteration in range(2):
        announce_iteration(model, 0, iteration)
        optimizer.zero_grad()
        losses = model(*batch(iteration))
        sum(losses.values()).backward()
        assert "loss_mask" in losses and all(v.isfinite() for v in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    detections = model.eval()(batch(3)[0])
    assert all(len(d["masks"]) and d["masks"].isfinite().all() for d in detections)

"""One row's checkpoint in another row's model, and files that are complete or absent."""

from __future__ import annotations

import logging
import operator
import runpy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from rethinking_bn.checkpoint import copy_to_levels, read_weights, select_domain
from rethinking_bn.engine import Checkpointer
from rethinking_bn.layers import SplitBatchNorm2d
from rethinking_bn.modeling import (
    CycleBNRetinaNetHead,
    MultiDomainBNRetinaNetHead,
    SharedBNRetinaNetHead,
)
from tests.modeling.models import features, head_arguments, retinanet_config, training_batch

SHARED, SEPARATE = "shared", "domain_specific"
ROWS = {
    1: (SHARED, SHARED, SHARED),
    2: (SHARED, SEPARATE, SHARED),
    3: (SEPARATE, SHARED, SHARED),
    4: (SEPARATE, SEPARATE, SHARED),
    5: (SEPARATE, SHARED, SEPARATE),
    6: (SEPARATE, SEPARATE, SEPARATE),
}
NORM = "head.cls_subnet.1."
TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"


class Model(nn.Module):
    """A head where detectron2's models have it, beside something from ImageNet."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 1)
        self.head = head


def row_model(row: int) -> Model:
    choices = dict(zip(("train_stats", "population_stats", "affine"), ROWS[row], strict=True))
    return trained(MultiDomainBNRetinaNetHead(**head_arguments(norm="SyncBN"), **choices))


def trained(head: nn.Module) -> Model:
    """Give every parameter and statistic a value of its own, as training would."""
    for tensor in head.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return Model(head)


def load_file(model: nn.Module, state_dict: dict[str, Any], folder: Path) -> None:
    """Load by way of detectron2's checkpointer, which drops keys of other shapes."""
    torch.save({"model": state_dict}, folder / "model.pth")
    DetectionCheckpointer(model).load(str(folder / "model.pth"))


@pytest.mark.parametrize(("source", "target"), list(product(ROWS, ROWS)))
def test_every_row_into_every_row(
    source: int, target: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpointer drops no key before a layer converts it."""
    state = row_model(source).state_dict()
    model, direct = row_model(target), row_model(target)
    if ROWS[source][2] == SEPARATE and ROWS[target][2] == SHARED:
        with pytest.raises(RuntimeError, match=r"head\.cls_subnet\.1\.weight"):
            load_file(model, state, tmp_path)
        return
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        load_file(model, state, tmp_path)
    converted = ROWS[source][1] != ROWS[target][1]
    assert ("population training is due" in caplog.text) == converted
    assert (NORM.rstrip(".") in caplog.text) == (ROWS[source][1:] != ROWS[target][1:])
    direct.load_state_dict(state)
    torch.testing.assert_close(model.state_dict(), direct.state_dict(), rtol=0, atol=0)


# detectron2's cycling head, and the upstream shared one: plain BatchNorm applied to all levels
@pytest.mark.parametrize(("norm", "row"), [("BN", 4), ("BN", 6), ("BN", None), (nn.BatchNorm2d, 1)])
def test_checkpoints_of_detectron2s_heads_load(norm: Any, row: int | None, tmp_path: Path) -> None:
    stock = trained(RetinaNetHead(**head_arguments(norm=norm))).eval()
    model = Model(CycleBNRetinaNetHead(**head_arguments())) if row is None else row_model(row)
    load_file(model, stock.state_dict(), tmp_path)
    xs = features()
    torch.testing.assert_close(model.eval().head(xs), stock.head(xs))


@pytest.mark.parametrize("norm", ["", "GN", lambda c: nn.BatchNorm2d(c, track_running_stats=False)])
@pytest.mark.parametrize("row", [1, 4])
def test_a_head_trained_without_statistics_is_refused(norm: Any, row: int, tmp_path: Path) -> None:
    stock = Model(RetinaNetHead(**head_arguments(norm=norm)))
    with pytest.raises(RuntimeError, match=r"head\.cls_subnet\.1\.(0\.)?running_mean"):
        load_file(row_model(row), stock.state_dict(), tmp_path)


def test_statistics_of_other_channels_are_refused(tmp_path: Path) -> None:
    narrow = Model(SharedBNRetinaNetHead(**head_arguments(conv_dims=[16, 16])))
    with pytest.raises(RuntimeError, match="running_mean"):
        load_file(row_model(1), narrow.state_dict(), tmp_path)


def test_a_backbone_checkpoint_without_a_head_loads(tmp_path: Path) -> None:
    model, source = row_model(1), row_model(1)
    before = {key: value.clone() for key, value in model.head.state_dict().items()}
    state = {k: v for k, v in source.state_dict().items() if k.startswith("backbone.")}
    load_file(model, state, tmp_path)
    assert torch.equal(model.backbone.weight, source.backbone.weight)
    for key, value in model.head.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    "content",
    [
        {"model": "resnet50", "state_dict": {"a": torch.ones(1)}},
        {"model": [torch.ones(1)]},
        {"model": torch.ones(3)},
        {"model": {"a": 1.0}},
        {"model": {1: torch.ones(1)}},
        [1],
        {},
    ],
    ids=str,
)
def test_files_of_other_content_are_one_line(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth cannot be read as a checkpoint \(it holds"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"text")
    with pytest.raises(ValueError, match="w.pth cannot be read as a checkpoint"):
        read_weights(tmp_path / "w.pth")


def detector(head: str, norm: str, **choices: str) -> nn.Module:
    """Return a RetinaNet whose every parameter and statistic differs, in eval mode."""
    keys = {f"MODEL__RETINANET__BN__{name}": choice for name, choice in choices.items()}
    return build_model(
        retinanet_config(MODEL__RETINANET__HEAD_NAME=head, MODEL__RETINANET__NORM=norm, **keys)
    ).eval()


@pytest.mark.parametrize("row", ROWS)
def test_stock_detectron2_computes_what_the_row_does(
    row: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defect 46: the converted weights give detectron2's own head the row's outputs."""
    names = ("TRAIN_STATS", "POPULATION_STATS", "AFFINE")
    choices = dict(zip(names, ROWS[row], strict=True))
    ours = detector("MultiDomainBNRetinaNetHead", "SyncBN", **choices)
    for tensor in ours.head.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(torch.rand_like(tensor) + 0.5).add_(0.02 * torch.rand_like(tensor))
    source, target = tmp_path / "source.pth", tmp_path / "target.pth"
    torch.save({"model": ours.state_dict(), "iteration": 3}, source)
    convert = runpy.run_path(str(TOOL))["main"]
    # levels are no domains, whatever the row
    assert convert([str(source), str(target), "--domain", "0"]) == 1
    refusal = capsys.readouterr().err
    assert ("feature levels" in refusal) == (ROWS[row][1:] != (SHARED, SHARED))
    assert convert([str(source), str(target), "--levels", "5"]) == (1 if row > 4 else 0)
    said = capsys.readouterr()
    if row > 4:
        assert "rows 5 and 6" in said.err and not target.exists()
        return
    assert ("rows 2 and 4" in said.out) == (row in (2, 4))
    stock = detector("RetinaNetHead", "BN")
    report = DetectionCheckpointer(stock)._load_model(torch.load(target))
    assert not (report.missing_keys or report.unexpected_keys or report.incorrect_shapes)
    if row in (2, 4):  # as they are
        assert not any(stock.load_state_dict(ours.state_dict()))
    image = training_batch()
    for found, expected in zip(stock(image), ours(image), strict=True):
        found, expected = found["instances"], expected["instances"]
        assert len(found) and torch.equal(found.pred_classes, expected.pred_classes)
        for name in ("pred_boxes.tensor", "scores"):
            got, want = (operator.attrgetter(name)(x) for x in (found, expected))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # equal but for rounding, and so in float64 as well
    xs = features(dtype=torch.float64)
    got, want = (model.double().head(xs) for model in (stock, ours))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "levels", "words"),
    [("GN", 5, ["running_var"]), ("BN", 4, ["5 levels", "not 4"]), ("", 5, ["running_var"])],
)
def test_heads_that_stock_detectron2_does_not_take_are_refused(
    norm: str, levels: int, words: list[str]
) -> None:
    head = RetinaNetHead(**head_arguments(norm=norm)).state_dict()
    with pytest.raises(ValueError) as error:
        copy_to_levels({f"head.{key}": value for key, value in head.items()}, levels)
    assert all(word in str(error.value) for word in words)


def test_layers_with_and_without_levels_become_alike(tmp_path: Path) -> None:
    per_level, shared = (
        {f"head.{k}": v for k, v in RetinaNetHead(**head_arguments(norm=n)).state_dict().items()}
        for n in ("BN", nn.BatchNorm2d)
    )
    mixed = {k: v for k, v in per_level.items() if "cls" in k}
    mixed |= {k: v for k, v in shared.items() if "bbox" in k}
    assert copy_to_levels(mixed, 5).keys() == per_level.keys()
    words = [str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--domain", "0", "--levels", "-3"]
    with pytest.raises(SystemExit):  # range(-3) would drop the statistics
        runpy.run_path(str(TOOL))["main"](words)


def test_a_head_alone_may_have_domains() -> None:
    """Its two sets cannot be the five levels of the pyramid."""
    pyramid = [f"backbone.fpn_output{i}.weight" for i in (3, 4, 5)]
    pyramid += [f"backbone.top_block.p{i}.weight" for i in (6, 7)]
    head = nn.ModuleDict({"head": nn.Sequential(nn.Conv2d(2, 2, 1), SplitBatchNorm2d(2, 2))})
    state = {**{key: torch.ones(1) for key in pyramid}, **head.state_dict()}
    assert "head.1.running_mean" in select_domain(state, 1)
    with pytest.raises(ValueError, match="feature levels"):
        select_domain(head.state_dict(), 1)


class Unsaveable:
    """Fails when torch.save is half way through the file."""

    def __reduce__(self) -> Any:
        raise RuntimeError("disk full")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_checkpoint_loads_and_is_the_last_one(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    Checkpointer(model, str(tmp_path)).save("model_0000004", iteration=4)
    other = nn.Linear(2, 3)
    rest = Checkpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 4
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    assert sorted(contents(tmp_path)) == ["last_checkpoint", "model_0000004.pth"]


def test_an_untagged_checkpoint_leaves_last_checkpoint_alone(tmp_path: Path) -> None:
    """Defect 17."""
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save_untagged("model_population")
    assert sorted(contents(tmp_path)) == ["model_population.pth"]
    checkpointer.save("model_final")
    checkpointer.save_untagged("model_population")
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="disk full"):
        checkpointer.save("model_final", payload=[torch.zeros(1000), Unsaveable()])
    with pytest.raises(RuntimeError, match="disk full"):
        checkpointer.save("model_0000009", payload=[torch.zeros(1000), Unsaveable()])
    assert contents(tmp_path) == before


def test_a_name_with_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sub/model"):
        Checkpointer(nn.Linear(2, 3), str(tmp_path)).save("sub/model")


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path), save_to_disk=False)
    checkpointer.save("model_final")
    checkpointer.save_untagged("model_population")
    assert contents(tmp_path) == {}

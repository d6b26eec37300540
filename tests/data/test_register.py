"""detectron2's catalogs: the shapes, generated on demand, and data sets of one's own, by config."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from torch import nn

from rethinking_bn.data import CLASSES, SHAPES_DATASETS, ShapesDataset, shapes
from rethinking_bn.data.register import (
    ShapesMetadata,
    read_classes,
    register_coco_format,
    register_shapes,
)
from rethinking_bn.engine import load_config
from rethinking_bn.engine.check_config import check_data_sets
from tests.engine.tiny import tiny_config, write_data
from tests.tools.runs import TOOL, environment

ENTRY = ("mine", "tiny/tiny.json", "tiny")
NAN = float("nan")
IMAGE = {"id": 1, "file_name": "1.png", "height": 1, "width": 1}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "tiny").mkdir()
    write_data(tmp_path / "tiny", images=4)
    yield tmp_path
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("mine", None)


def config(*entries: Any, **overrides: Any) -> CfgNode:
    cfg = tiny_config("mine", "", **overrides)
    cfg.DATASETS.COCO_FORMAT = entries
    return cfg


def test_a_yaml_names_data_of_ones_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = json.dumps([ENTRY, ["elsewhere", str(root / "tiny/tiny.json"), str(root)]])
    (root / "a.yaml").write_text(f"DATASETS: {{COCO_FORMAT: {entries}, TRAIN: [mine]}}")
    for _ in range(2):
        cfg = load_config(str(root / "a.yaml"), ["DATASETS.TEST", "('mine',)"])
    check_data_sets(cfg)
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    assert read_classes("mine") == ["odd", "even"]
    records = DatasetCatalog.get("mine")
    assert [Path(r["file_name"]) for r in records] == [root / f"tiny/{i}.png" for i in range(4)]
    assert MetadataCatalog.get("elsewhere").json_file == str(root / "tiny/tiny.json")
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("elsewhere")
    register_coco_format(get_cfg())  # of another project, without the key
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "moved"))
    register_coco_format(cfg)
    assert MetadataCatalog.get("mine").image_root == str(root / "moved/tiny")


@pytest.mark.parametrize("entry", ["mine", ("mine", "tiny.json"), ("mine", "tiny.json", 3)])
def test_entries_of_another_form(root: Path, entry: Any) -> None:
    with pytest.raises(ValueError, match=r"COCO_FORMAT.*mine.*name, annotations.json, folder"):
        register_coco_format(config(entry))


def test_a_name_stands_for_one_thing(root: Path) -> None:
    register_coco_format(config(ENTRY))
    for name, there in (("mine", "tiny/tiny.json"), ("coco_2017_val", "coco")):
        with pytest.raises(ValueError, match=f"'{name}' is registered.*{there}"):
            register_coco_format(config((name, "other.json", "tiny")))


def _annotation(number: int, **changed: Any) -> Any:
    return lambda content: content["annotations"][number].update(changed)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("no 'images'", lambda content: content.pop("images")),
        ("annotation 1 has no valid", _annotation(0, category_id=9)),
        ("annotation 2 has no valid", _annotation(1, bbox=[1, 2, 3, -4])),
        ("annotation 2 has no valid", _annotation(1, bbox=[1, NAN, 3, 4])),
        ("1 annotations or images have ids of others", _annotation(1, id=1)),
        ("1 annotations or images have", lambda content: content["images"].append(IMAGE)),
        ("no 'area'", lambda content: content["annotations"][0].pop("area")),
        ("no 'height'", lambda content: content["images"][0].pop("height")),
        ("no COCO annotation file", lambda content: content["images"][0].update(file_name=3)),
        ("no categories", lambda content: content.update(categories=[], annotations=[])),
        ("no image .*9.png", lambda content: content["images"][2].update(file_name="9.png")),
    ],
)
def test_annotations_that_do_not_fit_are_refused(root: Path, what: str, change: Any) -> None:
    path, cfg = changed(root, change)
    with pytest.raises((ValueError, FileNotFoundError), match=f"'mine'.*{path}.*{what}"):
        check_data_sets(cfg)


def changed(root: Path, change: Any) -> tuple[Path, CfgNode]:
    path = root / "tiny/tiny.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    register_coco_format(cfg := config(ENTRY))
    return path, cfg


def test_an_annotation_that_the_evaluation_never_finds(root: Path, caplog: Any) -> None:
    check_data_sets(changed(root, _annotation(0, id=0))[1])
    assert "annotation 0" in caplog.text


def test_files_that_are_none(root: Path) -> None:
    register_coco_format(cfg := config(ENTRY))
    (root / "tiny/tiny.json").write_text("[]")
    with pytest.raises(ValueError, match="'mine'.*tiny.json is no COCO annotation file"):
        check_data_sets(cfg)
    (root / "tiny/tiny.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"'mine'.*tiny.json.*DETECTRON2_DATASETS"):
        check_data_sets(cfg)


def test_a_module_that_cannot_be_imported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / "broken_data.py").write_text("raise RuntimeError('no\\n cells')")
    for module, said in (("no_such", "ModuleNotFoundError"), ("broken_data", "no cells")):
        with pytest.raises(ValueError, match=f"--import {module}: .*{said}"):
            load_config(imports=[module])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("torchrun", [False, True])
def test_every_process_imports_and_registers(root: Path, torchrun: bool) -> None:
    cfg = config(ENTRY, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), SEED=1)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.HEAD_NAME = "ConfigurableHeadRetinaNet", "Mine"
    cfg.OUTPUT_DIR = str(root / "out")
    (root / "run.yaml").write_text(cfg.dump())
    (root / "own_parts.py").write_text(
        "import os\n"
        "from rethinking_bn.modeling import RETINANET_HEAD, SharedBNRetinaNetHead\n"
        "@RETINANET_HEAD.register()\n"
        "class Mine(SharedBNRetinaNetHead):\n"
        "    pass\n"
        "open(f'imported.{os.getpid()}', 'w').close()\n"
    )
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*start, TOOL] if torchrun else [TOOL, "--num-gpus", "2"]
    options = ["--import", "own_parts", "--config-file", "run.yaml"]
    done = subprocess.run(
        [sys.executable, *command, *options],
        cwd=root, env=environment(root), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and (root / "out/model_final.pth").is_file(), done.stderr
    assert len(list(root.glob("imported.*"))) == (2 if torchrun else 3)  # the launcher, too


COUNT = 6


@pytest.fixture
def shapes_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_shapes()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(shapes.SPLITS, "train", COUNT)
    monkeypatch.setitem(shapes.SPLITS, "val", COUNT)
    return tmp_path


def test_registration_generates_nothing_and_may_be_repeated(shapes_root: Path) -> None:
    before = [DatasetCatalog[name] for name in SHAPES_DATASETS]
    register_shapes()
    assert [DatasetCatalog[name] for name in SHAPES_DATASETS] == before
    for name in SHAPES_DATASETS:
        metadata = MetadataCatalog.get(name)
        assert metadata.name == name and metadata.evaluator_type == "coco"
        assert metadata.thing_classes == list(CLASSES)
    assert os.listdir(shapes_root) == []


class _Oracle(nn.Module):
    """Predicts the annotations of the images it is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.targets = [*ShapesDataset(name, masks=True)]

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        outputs = []
        for sample in inputs:
            image, target = self.targets[sample["image_id"] - 1]
            assert torch.equal(sample["image"], image.flip(0))  # detectron2 reads BGR
            instances = Instances(
                (sample["height"], sample["width"]),
                pred_boxes=Boxes(target["boxes"]),
                pred_classes=target["labels"],
                scores=torch.linspace(1, 0.5, len(target["labels"])),
                pred_masks=target["masks"].bool(),
            )
            outputs.append({"instances": instances})
        return outputs


class _Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def test_default_trainer_evaluates_the_truth_as_perfect(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("shapes_val_jpeg",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = 0  # as stored
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    # The model is made by a generation of its own: the test itself starts from nothing.
    with monkeypatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path / "model"))
        oracle = _Oracle("shapes_val_jpeg")
    assert not (shapes_root / "shapes").exists()
    results = _Trainer.test(cfg, oracle)
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100)
        for name in CLASSES:
            assert results[task][f"AP-{name}"] == pytest.approx(100)


def test_names_of_other_projects_are_left_to_them(caplog: pytest.LogCaptureFixture) -> None:
    name = "shapes_val_jpeg"
    saved = DatasetCatalog[name], MetadataCatalog[name]
    try:
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)
        DatasetCatalog.register(name, theirs := lambda: [])
        MetadataCatalog.get(name).thing_classes = ["hexagon"]
        with caplog.at_level(logging.WARNING):
            register_shapes()
        assert "'shapes_val_jpeg' is already registered" in caplog.text
        assert DatasetCatalog[name] is theirs
        assert not isinstance(MetadataCatalog.get(name), ShapesMetadata)
        assert MetadataCatalog.get(name).thing_classes == ["hexagon"]
    finally:
        DatasetCatalog[name], MetadataCatalog[name] = saved

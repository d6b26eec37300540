"""Config files are data: bases and overrides work, tags never run (defect 18), errors are clear."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2 import model_zoo

from rethinking_bn.engine import load_config


def write(folder: Path, **files: str) -> str:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / "run.yaml")


def test_bases_and_overrides_merge_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        base="SOLVER: {BASE_LR: 0.5, MAX_ITER: 10, GAMMA: 0.3}",
        run="_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.25, MAX_ITER: 20}",
    )
    cfg = load_config(path, ["SOLVER.MAX_ITER", "30", "MODEL.RETINANET.BN.AFFINE", "shared"])
    assert (cfg.SOLVER.GAMMA, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.3, 0.25, 30)
    assert cfg.MODEL.RETINANET.BN.AFFINE == "shared"
    assert not cfg.is_frozen()


@pytest.mark.parametrize("place", ["run", "base"])
def test_tags_are_refused_and_not_executed(tmp_path: Path, place: str) -> None:
    """detectron2's Base-RetinaNet.yaml holds such a tag."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()"
    tagged = f'OUTPUT_DIR: !!python/object/apply:eval ["{code}"]\n'
    files = {"run": "_BASE_: base.yaml\n", "base": "SEED: 1\n"}
    files[place] += tagged
    path = write(tmp_path, **files)
    with pytest.raises(ValueError, match=f"{place}.yaml.*python/object/apply:eval.*execute"):
        load_config(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {BASE_LRR: 1.0}", r"unknown config key 'SOLVER.BASE_LRR'.*SOLVER.BASE_LR"),
        ("SOLVER: {BASE_LR: fast}", r"float.*str.*SOLVER.BASE_LR"),
        ("SOLVER: [", "flow"),
        ("", "not a mapping"),
        ("- 1", "not a mapping"),
        ("VERSION: 99", "v99"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml.*does not exist"),
        ("_BASE_: run.yaml", "_BASE_"),
    ],
)
def test_a_bad_file_gives_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_config(str(tmp_path / "none.yaml"))
    path = write(tmp_path, run=text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_config(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LR"], "KEY VALUE"),
        (["SOLVER.BASELR", "1"], r"unknown config key 'SOLVER.BASELR'.*SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR.X", "1"], "unknown config key"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR fast"),
        (["SOLVER", "1"], "SOLVER 1"),
    ],
)
def test_bad_overrides_are_named(opts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config("", opts)
    assert "\n" not in str(caught.value)


def test_detectron2s_retinanet_is_refused_by_its_line() -> None:
    """Defect 18: its base holds a tag that executes code."""
    name = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    with pytest.raises(ValueError, match="Base-RetinaNet.yaml, line 8, .SIZES: .*apply:eval"):
        load_config(name)

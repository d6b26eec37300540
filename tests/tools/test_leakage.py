"""The demonstration of leakage: four rows from two trainings of the same seed."""

from __future__ import annotations

import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch

from rethinking_bn.engine import launch
from tests.modeling.roi_cases import mask_config, register_masks

TOOL = Path(__file__).parents[2] / "tools" / "leakage.py"


@pytest.mark.slow
@pytest.mark.ci
def test_it_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = mask_config(
        register_masks(tmp_path),
        tmp_path / "out",
        MODEL__ROI_HEADS__NORM_IMAGES=1,
        SOLVER__MAX_ITER=2,
        TEST__PRECISE_BN__ENABLED=True,
        TEST__PRECISE_BN__NUM_ITER=1,
    )
    (tmp_path / "run.yaml").write_text(cfg.dump())
    tool = runpy.run_path(str(TOOL), run_name="leakage")
    argv = [*tool["DEFAULT"], "--config-file", str(tmp_path / "run.yaml")]
    launch.run(tool["main"], "a test", argv)
    table = (tmp_path / "out" / "leakage.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[:3] for row in rows[2:6]] == [
        ["BN", "population", "7"],
        ["BN", "mini-batch", "7"],
        ["BN + shuffle", "population", "7"],
        ["BN + shuffle", "mini-batch", "7"],
    ]
    assert all(0 <= float(cell) <= 100 for row in rows[2:6] for cell in row[3:])
    assert "2 iterations of 4 images on 1 process(es), NORM_IMAGES 1" in table
    saved = [
        torch.load(tmp_path / "out" / head / "model_final.pth", weights_only=False)["model"]
        for head in ("NormBoxHead", "ShuffleBNBoxHead")
    ]
    name = "roi_heads.box_head.conv1.weight"
    assert list(saved[0]) == list(saved[1]) and not torch.equal(saved[0][name], saved[1][name])
    # a run that has trained already: nothing but the evaluation is done again
    times = [path.stat().st_mtime_ns for path in tmp_path.glob("out/*/model_final.pth")]
    launch.run(tool["main"], "a test", [*argv[:2], "--resume", *argv[2:]])
    assert (tmp_path / "out" / "leakage.md").read_text() == table
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("out/*/model_final.pth")] == times


def test_a_model_without_masks_has_box_ap_alone() -> None:
    cells = runpy.run_path(str(TOOL), run_name="leakage")["cells"]
    assert cells({"bbox": {"AP": 12.34}}) == ("12.3", "")
    assert cells({"bbox": {"AP": 12.34}, "segm": {"AP": 0.0}}) == ("12.3", "0.0")


def test_eval_only_is_refused() -> None:
    with (
        mock.patch("sys.argv", ["leakage.py", "--eval-only"]),
        pytest.raises(SystemExit, match="error: --eval-only"),
    ):
        runpy.run_path(str(TOOL), run_name="__main__")

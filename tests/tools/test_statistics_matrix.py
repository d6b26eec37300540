"""The matrix of statistics: one set of weights, every row restored before the next."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from rethinking_bn.engine import Checkpointer, Trainer, launch, run_population_training
from tests.engine.tiny import register_data, tiny_config, write_data

TOOL = Path(__file__).parents[2] / "tools" / "statistics_matrix.py"


@pytest.mark.slow
@pytest.mark.ci
def test_rows_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, images=4)
    a, b = (register_data(tmp_path / name) for name in ("a", "b"))
    cfg = tiny_config(a, tmp_path / "out")
    cfg.DATASETS.TEST = (a, b)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    torch.save(model.state_dict(), cfg.MODEL.WEIGHTS)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    tool = runpy.run_path(str(TOOL), run_name="statistics_matrix")
    argv = ["--eval-only", "--config-file", str(tmp_path / "run.yaml")]
    table = launch.run(tool["main"], "a test", argv)

    titles = ["as stored", "mini-batch", f"population of {a}", f"population of {b}"]
    assert list(table) == titles
    assert all(list(row) == [f"{a} bbox", f"{b} bbox"] for row in table.values())
    written = json.loads((tmp_path / "out" / "statistics_matrix.json").read_text())
    assert written == {"weights": cfg.MODEL.WEIGHTS, "statistics": table}
    assert all(
        list(aps) == ["AP", "AP50", "AP75"] for row in table.values() for aps in row.values()
    )
    assert tool["as_text"](table) in capsys.readouterr().out
    # the last checkpoint in place of the weights
    Checkpointer(model, cfg.OUTPUT_DIR).save("model_last")
    missing = ["MODEL.WEIGHTS", "", "DATASETS.TEST", f"('{a}',)"]
    rows = ({"as stored": [*tool["rows"](cfg)[0][1]]}).items()
    tool["main"].__globals__["rows"] = lambda cfg: rows
    resumed = launch.run(tool["main"], "a test", [*argv, "--resume", *missing])
    assert resumed["as stored"] == {f"{a} bbox": table["as stored"][f"{a} bbox"]}
    written = json.loads((tmp_path / "out" / "statistics_matrix.json").read_text())
    assert written["weights"].endswith("out/model_last.pth")
    # every row begins with the weights as they are: what each means, one by one
    cfg.TEST.PRECISE_BN.DATASETS = (b,)
    run_population_training(cfg, model)
    expected = tool["columns"](cfg, Trainer.test(cfg, model))
    for column, aps in table[f"population of {b}"].items():
        assert aps == pytest.approx(expected[column])
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS))
    cfg.TEST.STATISTICS = "batch"
    expected = tool["columns"](cfg, Trainer.test(cfg, model))
    for column, aps in table["mini-batch"].items():
        assert aps == pytest.approx(expected[column])

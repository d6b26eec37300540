"""The diagnosis of a detectron2 run: the hook's scalars, config keys in remedies, the tool."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from rethinking_bn.diagnosis import Diagnosis, Finding
from rethinking_bn.engine import DiagnoseBN, Trainer, run_diagnosis, with_rethinking_bn
from rethinking_bn.engine.diagnose_bn import with_config_keys
from tests.engine.tiny import register_data, tiny_config

TOOL = Path(__file__).parents[2] / "tools" / "diagnose.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    return register_data(folder)


def test_a_run_records_its_diagnosis(data: str, tmp_path: Path) -> None:
    cfg = tiny_config(
        data, tmp_path, TEST__DIAGNOSE__PERIOD=2, SOLVER__MAX_ITER=2, TEST__EVAL_PERIOD=0
    )
    trainer = Trainer(cfg)
    (hook,) = (h for h in trainer._hooks if isinstance(h, DiagnoseBN))
    trainer.train()
    assert hook.last is not None and hook.last.batches == 2
    lines = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    (found,) = (line for line in lines if "diagnose/severe" in line)
    assert found["diagnose/severe"] == len(hook.last.severe)
    assert found["diagnose/small_batch"] > 0 and found["diagnose/stale_statistics"] >= 0
    assert trainer.model.training


def test_remedies_run_as_config_keys(data: str, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    found = [
        ("stale-statistics", "head.cls_subnet.1", {}),
        ("repeated-use", "head.cls_subnet.1", {}),
        ("small-batch", "head.cls_subnet.1", {}),
        ("identity-statistics", "backbone.bottom_up.stem.conv1.norm", {"constant": True}),
        ("mixed-modes", "backbone.bottom_up.stem.conv1.norm", {"constant": True}),
        ("mixed-modes", "backbone.bottom_up.stem.conv1.norm", {"cause": "block"}),
        ("domain-shift", "head.cls_subnet.1", {}),
        ("non-finite", "head.cls_subnet.1", {"batches": 2}),
    ]
    findings = tuple(Finding(kind, layer, "severe", e, "so") for kind, layer, e in found)
    diagnosis = with_config_keys(Diagnosis(findings, (), 2, 1, 0.0), cfg, target=data)
    for finding in diagnosis.findings:
        ways = re.findall("`([^`]*)`", finding.remedy)
        assert ways, finding
        for way in ways:
            other = cfg.clone()
            other.defrost()
            other.merge_from_list(shlex.split(way))
            assert other != cfg
            model = Trainer.build_model(other)
            if "THAW" not in way:  # that is for --eval-only
                with_rethinking_bn([], other, model)


def test_a_detectors_output_is_that_of_its_heads(data: str, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    model = Trainer.build_model(cfg).eval()
    whole = run_diagnosis(cfg, model, 2).of("output-effect", "")
    assert not any(module.training for module in model.modules())
    assert whole and 0 < whole[0].evidence["stored_to_exact"] < float("inf")


def call_tool(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["diagnose.py", *argv])
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.ci
def test_the_tool_prints_and_writes(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config(data, tmp_path / "out")
    (tmp_path / "run.yaml").write_text(cfg.dump())
    config = ("--config-file", str(tmp_path / "run.yaml"))
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, tmp_path / "w.pth")
    weights = ("MODEL.WEIGHTS", str(tmp_path / "w.pth"))
    assert call_tool(monkeypatch, *config, "--batches", "2", *weights) == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"config.yaml", "log.txt", "diagnosis.json", "diagnosis.png"}, "no lock"
    out = capsys.readouterr().out
    assert out.index("severe") < out.index("identity-statistics") and "do: load the" in out
    written = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert written["findings"][0]["severity"] == "severe" and written["batches"] == 2
    assert call_tool(monkeypatch, *config, "--batches", "2", "--strict", *weights) == 1
    assert call_tool(monkeypatch, *config, "--plan") == 0
    assert "pooled over" in capsys.readouterr().out
    assert call_tool(monkeypatch, *config, "--plan", "--strict", *weights) == 1
    assert call_tool(monkeypatch, *config, "--batches", "1") == 1
    assert "--batches must be at least 2, got 1" in capsys.readouterr().err
    assert call_tool(monkeypatch, *config, "--target", "nowhere", *weights) == 1
    assert "no data set is registered as 'nowhere'" in capsys.readouterr().err

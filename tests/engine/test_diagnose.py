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
from rethinking_bn.engine.launch import argument_parser, check_arguments
from tests.engine.tiny import register_data, tiny_config, write_data

TOOL = Path(__file__).parents[2] / "tools" / "diagnose.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
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


@pytest.mark.parametrize("row", [1, 3, 4, 6])
def test_row_3_is_told_by_name_and_remedy(row: int, data: str, tmp_path: Path) -> None:
    choices = {1: "SSS", 3: "DSS", 4: "DDS", 6: "DDD"}[row]
    words = [{"S": "shared", "D": "domain_specific"}[c] for c in choices]
    cfg = tiny_config(
        data,
        tmp_path,
        SOLVER__MAX_ITER=2,
        TEST__EVAL_PERIOD=0,
        MODEL__META_ARCHITECTURE="ConfigurableHeadRetinaNet",
        MODEL__RETINANET__HEAD_NAME="MultiDomainBNRetinaNetHead",
        MODEL__RETINANET__BN__TRAIN_STATS=words[0],
        MODEL__RETINANET__BN__POPULATION_STATS=words[1],
        MODEL__RETINANET__BN__AFFINE=words[2],
        TEST__PRECISE_BN__ENABLED=True,
        TEST__PRECISE_BN__NUM_ITER=8,
    )
    trainer = Trainer(cfg)
    trainer.train()
    repeated = run_diagnosis(cfg, trainer.model, 8).of("repeated-use")
    assert [f.layer for f in sorted(repeated, key=lambda f: f.layer)] == [
        "head.bbox_subnet.1",
        "head.cls_subnet.1",
    ]
    assert all(f.evidence["apart"] > 0.15 for f in repeated)
    for finding in repeated:
        if row == 3:
            assert finding.severity in ("warning", "severe")
            assert "rows 1, 4 or 6" in finding.remedy and "HEAD_NAME" in finding.remedy
            assert finding.what.startswith("row 3 of") and "5 times a forward" in finding.what
        else:
            assert finding.severity == "ok" and finding.remedy == ""


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (("TEST.DIAGNOSE.PERIOD", "-1"), "TEST.DIAGNOSE.PERIOD must be at least 0, got -1"),
        (("TEST.PRECISE_BN.NUM_ITER", "1"), "needs at least 2 batches"),
        (("TEST.PRECISE_BN.DATASETS", "('nowhere',)"), "registered as 'nowhere'"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused_before_the_run(
    opts: tuple[str, ...], said: str, data: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(tiny_config(data, tmp_path, TEST__DIAGNOSE__PERIOD=5).dump())
    parser = argument_parser("")
    check_arguments(parser.parse_args(["--config-file", str(tmp_path / "run.yaml")]))
    with pytest.raises(ValueError, match=said):
        check_arguments(parser.parse_args(["--config-file", str(tmp_path / "run.yaml"), *opts]))


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

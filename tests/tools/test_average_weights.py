"""tools/average_weights.py: the mean of checkpoints, with statistics of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model

import average_weights
from rethinking_bn.engine import run_population_training
from tests.engine.tiny import register_data, tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Return (config, its path, paths of two checkpoints)."""
    cfg = tiny_config(register_data(tmp_path), tmp_path)
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        torch.save({"model": build_model(cfg).state_dict(), "iteration": seed}, path)
    return cfg, tmp_path / "tiny.yaml", paths


def command(run: Any, *extra: str, output: str = "c.pth") -> list[str]:
    cfg, config, paths = run
    out = str(config.parent / output)
    return [*map(str, paths), "--config-file", str(config), "--output", out, *extra]


def test_the_mean_with_its_own_statistics(run: Any) -> None:
    cfg, config, paths = run
    assert average_weights.main(command(run, "TEST.PRECISE_BN.NUM_ITER", "1")) == 0
    saved = torch.load(config.parent / "c.pth", weights_only=True)
    assert set(saved) == {"model"}
    states = [torch.load(path)["model"] for path in paths]
    expected = build_model(cfg)
    names = {name for name, _ in expected.named_parameters()}
    expected.load_state_dict(
        {k: (states[0][k].double() + v.double()) / 2 if k in names else v
         for k, v in states[1].items()}
    )  # fmt: skip
    cfg.TEST.PRECISE_BN.NUM_ITER = 1
    run_population_training(cfg, expected)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(saved["model"][name], value, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_line(run: Any, capsys: Any) -> None:
    cfg, config, (first, second) = run
    state = torch.load(second)["model"]
    kept = dict(state)
    name = "head.cls_score.bias"
    cases = [
        ({k: v for k, v in kept.items() if k != name}, f"missing: {name}"),
        ({**kept, "extra": torch.zeros(1)}, "added: extra"),
        ({**kept, name: torch.zeros(99)}, f"of another shape: {name}"),
    ]
    for content, said in cases:
        torch.save({"model": content}, second)
        assert average_weights.main(command(run)) == 1
        error = capsys.readouterr().err
        assert str(second) in error and said in error and error.count("\n") == 1
    second.write_text("no checkpoint")
    assert (
        average_weights.main(command(run)) == 1
        and "b.pth cannot be read" in capsys.readouterr().err
    )
    second.unlink()
    assert average_weights.main(command(run)) == 1 and str(second) in capsys.readouterr().err
    assert average_weights.main(command((cfg, config, [first]))) == 1
    assert "two or more" in capsys.readouterr().err
    torch.save({"model": kept}, second)
    for extra, said in (("MODEL.RETINANET.NUM_CONVS", "not of this config"), ("A.B", "A.B")):
        assert average_weights.main(command(run, extra, "2")) == 1
        assert said in capsys.readouterr().err
        assert average_weights.main(command(run, extra, "2", output="new/c.pth")) == 1
    assert not (config.parent / "c.pth").exists() and not (config.parent / "new").exists()

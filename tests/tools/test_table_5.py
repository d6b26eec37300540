"""tools/table_5.py: which weights, by which statistics, and the table over seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2")

from rethinking_bn.engine import load_config  # noqa: E402
from tests.engine.tiny import write_data  # noqa: E402

TOOLS = Path(__file__).parents[2] / "tools"
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate("abc", 1)]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "bccd/images").mkdir(parents=True)
    write_data(tmp_path / "bccd/images", images=2, categories=CATEGORIES)
    for split in ("train", "test"):
        text = (tmp_path / "bccd/images/tiny.json").read_text()
        (tmp_path / f"bccd/{split}.json").write_text(text)
    import table_5

    return table_5


def test_rows_share_weights_and_seeds_are_averaged(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "runs"
    for head, seeds in (("bn_row1", (0, 1)), ("bn_row3", (0,)), ("gn", (0,))):
        cfg = load_config(str(TOOLS.parent / f"configs/bccd/retinanet_{head}.yaml"))
        model = tool.Trainer.build_model(cfg)
        for seed in seeds:
            model.head.cls_score.bias.data.fill_(seed)
            (folder / f"retinanet_{head}_{seed}").mkdir(parents=True)
            torch.save({"model": model.state_dict()}, folder / f"retinanet_{head}_{seed}/last.pth")
    seen = []

    def measure(cfg: Any, model: Any, rows: Any) -> Any:
        """Stand for minutes of evaluation: AP 10 * seed, +1 by a population, +2 by the batch."""
        seed = model.head.cls_score.bias[0].item()
        seen.append((Path(cfg.MODEL.WEIGHTS).parent.name, cfg.MODEL.RETINANET.BN.POPULATION_STATS))
        aps = {title: 10 * seed + (True in keys) + 2 * ("batch" in keys) for title, keys in rows}
        assert all("bccd_train" in str(keys) for _, keys in rows if True in keys)
        return {title: {"bccd_test bbox": {"AP": ap}} for title, ap in aps.items()}

    monkeypatch.setattr(tool, "measure", measure)
    command = [str(folder), "--checkpoint", "last.pth"]
    assert tool.main(command) == 0
    assert seen == [
        *(("retinanet_bn_row1_0", "shared"), ("retinanet_bn_row1_1", "shared")),
        *(("retinanet_bn_row1_0", "domain_specific"), ("retinanet_bn_row1_1", "domain_specific")),
        *(("retinanet_bn_row3_0", "domain_specific"), ("retinanet_bn_row3_0", "shared")),
        ("retinanet_gn_0", ""),
    ]
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        "| 1 | 5.0 ± 7.1 | 6.0 ± 7.1 | 7.0 ± 7.1 | 0, 1 | 39.1 |",
        "| 2 |  | 6.0 ± 7.1 |  | 0, 1 | 2.1 |",
        "| 3 | 0.0 | 1.0 | 2.0 | 0 | 34.1 |",
        "| 4 |  | 1.0 |  | 0 | 39.1 |",
        "| GN | 0.0 |  |  | 0 | 39.5 |",
    ]
    assert (folder / "table_5.md").read_text() == "\n".join(lines) + "\n"
    assert (folder / "table_5.png").stat().st_size > 10_000
    # a second run measures what is new, and keeps what was measured of other checkpoints
    (folder / "retinanet_gn_1").mkdir()
    (folder / "retinanet_gn_0/last.pth").rename(folder / "retinanet_gn_1/last.pth")
    (folder / "retinanet_bn_row3_0/last.pth").rename(folder / "retinanet_bn_row3_0/early.pth")
    assert tool.main(command) == 0 and tool.main([str(folder), "--checkpoint", "early.pth"]) == 0
    assert len(seen) == 7 + 1 + 2
    assert set(json.loads((folder / "table_5.json").read_text())) == {"last.pth", "early.pth"}


def test_nothing_to_measure_is_one_line(tool: Any, tmp_path: Path, capsys: Any) -> None:
    assert tool.main([str(tmp_path)]) == 1
    assert "there is no" in capsys.readouterr().err and "table_5" in sys.modules

"""tools/visualize.py: a picture per image, predictions beside ground truth, and a sheet of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")
cv2 = pytest.importorskip("cv2", reason="needs opencv-python, which is not installed")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

import visualize  # noqa: E402
from rethinking_bn import get_config_file  # noqa: E402
from tests.engine.tiny import register_data, write_data  # noqa: E402


def found_in(sample: dict[str, Any], boxes: list[list[float]]) -> Instances:
    found = Instances((sample["height"], sample["width"]))
    found.pred_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    found.scores = torch.ones(len(boxes))
    found.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
    return found


def test_predictions_are_on_the_left_and_truth_on_the_right(tmp_path: Path) -> None:
    write_data(tmp_path, images=1)
    name = register_data(tmp_path)
    sample, metadata = DatasetCatalog.get(name)[0], MetadataCatalog.get(name)
    nothing = visualize.draw(sample, {"a": found_in(sample, [])}, metadata)
    box = found_in(sample, [[10.0, 10.0, 60.0, 60.0]])
    one = visualize.draw(sample, {"a": box}, metadata)
    assert one.shape == nothing.shape and one.dtype == np.uint8
    half = one.shape[1] // 2 - 4
    assert (one[:, :half] != nothing[:, :half]).any()
    # with nothing found the left side is the plain image; on the right the truth is drawn
    assert not np.array_equal(nothing[32:, :half], nothing[32:, -half:])
    # two detectors, then the truth: three sides
    both = visualize.draw(sample, {"a": found_in(sample, []), "b": box}, metadata)
    assert both.shape[1] == 3 * half + 16
    assert np.array_equal(both[32:, :half], nothing[32:, :half])
    middle = both[32:, half + 8 : -half - 8]
    assert middle.shape == one[32:, :half].shape
    assert (middle != nothing[32:, :half]).any() and (both[:32, half:] < 128).any()


def test_the_sheet_holds_every_picture() -> None:
    pictures = [np.full((40, 60 + i, 3), 10 * i, np.uint8) for i in range(5)]
    sheet = visualize.contact_sheet(pictures)
    assert sheet.shape[0] == 3 * (320 + 8)  # two columns
    assert {10 * i for i in range(5)} <= set(np.unique(sheet).tolist())


def test_no_image_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        visualize.run(visualize.main, "draw", ["--images", "0"], add_options=visualize.add_options)
    assert "--images: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
def test_the_command(tmp_path: Path, monkeypatch: Any, capsys: Any, beside: bool) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    config, other = (get_config_file(f"shapes/retinanet_bn_row{row}.yaml") for row in (1, 3))
    keys = ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cpu"]
    model = visualize.Trainer.build_model(visualize.load_config(config, keys[2:]))
    torch.save({"model": model.state_dict()}, tmp_path / "row1.pth")
    keys += ["MODEL.WEIGHTS", str(tmp_path / "row1.pth")]
    options = ["--beside", other, str(tmp_path / "row3.pth")] if beside else []
    command = ["--images", "2", *options, "--config-file", config, *keys]
    if beside:
        with pytest.raises(SystemExit, match="--beside.*row3.pth"):
            visualize.run(visualize.main, "draw", command, add_options=visualize.add_options)
        model = visualize.Trainer.build_model(visualize.load_config(other, keys[2:]))
        torch.save({"model": model.state_dict()}, tmp_path / "row3.pth")
    visualize.run(visualize.main, "draw", command, add_options=visualize.add_options)
    written = sorted(path.name for path in (tmp_path / "out" / "visualize").iterdir())
    assert len(written) == 3 and written[-1] == "sheet.jpg"
    sheet = cv2.imread(str(tmp_path / "out" / "visualize" / "sheet.jpg"))
    assert sheet is not None and sheet.std() > 1
    one = cv2.imread(str(tmp_path / "out" / "visualize" / written[0]))
    assert (one.shape[1] > 2.5 * one.shape[0]) == beside  # three sides
    assert "2 pictures" in capsys.readouterr().out

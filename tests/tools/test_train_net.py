"""The command line: every kind of bad input is one line, and runs in all its ways of launching."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rethinking_bn import get_config_file
from rethinking_bn.engine import Checkpointer, Trainer, launch, load_config
from rethinking_bn.engine.check_config import warnings_of
from tests.engine.tiny import register_data, tiny_config
from tests.tools.runs import TOOL, environment, write_run

MABN = "MODEL.BACKBONE.NAME build_mabn_retinanet_resnet_fpn_backbone"
RCNN = "MODEL.META_ARCHITECTURE GeneralizedRCNN"
UNREAD = ["MODEL.META_ARCHITECTURE RetinaNet does not read it", "ConfigurableHeadRetinaNet"]


class Started(Exception):
    """Raised in place of starting anything."""


def start(*args: Any, **kwargs: Any) -> None:
    raise Started


class Tool:
    """A command line with a complete config, whose processes are not started."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.config_file, self.out, self._capsys = str(folder / "tiny.yaml"), folder / "out", capsys
        self.config = tiny_config(register_data(folder), self.out)
        Path(self.config_file).write_text(self.config.dump())

    def fails(self, *argv: str) -> str:
        """Return the one line that the command line ends in."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            launch.run(start, "a test", ["--config-file", self.config_file, *argv])
        assert caught.value.code == 1
        (line,) = self._capsys.readouterr().err.splitlines()
        assert "error: " in line
        return str(line)

    def starts(self, *argv: str) -> None:
        """Check that the command line is good."""
        with pytest.raises(Started):
            launch.run(start, "a test", ["--config-file", self.config_file, *argv])


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Tool:
    monkeypatch.setattr(launch, "launch", start)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return Tool(tmp_path, capsys)


def test_good_input_starts(tmp_path: Path, tool: Tool) -> None:
    weights = str(tmp_path / "weights.pth")
    torch.save({"model": Trainer.build_model(tool.config).state_dict()}, weights)
    tool.starts("--eval-only", "MODEL.WEIGHTS", weights)
    tool.starts("--num-gpus", "2")
    tool.starts("SOLVER.MAX_ITER", "3")
    # what MABN needs in training only, and what fits as two processes share it
    tool.starts("--eval-only", "MODEL.WEIGHTS", weights, "MODEL.MABN.REQUIRE_WEIGHTS", "True")
    tool.starts("--num-gpus", "2", *MABN.split(), "SOLVER.IMS_PER_BATCH", "64")


# words of a command line, and what its one line says; defects 19, 31, 47 and 51
BAD = [
    ("MODEL.WEIGHTS nowhere.pth", ["MODEL.WEIGHTS", "nowhere.pth", "does not exist"]),
    ("--num-gpus 0", ["--num-gpus", "at least 1"]),
    ("--num-gpus 3", ["SOLVER.IMS_PER_BATCH 4", "3 process"]),
    ("SOLVER.REFERENCE_WORLD_SIZE 3", ["SOLVER.IMS_PER_BATCH 4", "WORLD_SIZE 3"]),
    ("SOLVER.CHECKPOINT_PERIOD 0", ["SOLVER.CHECKPOINT_PERIOD", "at least 1"]),
    (
        "TEST.PRECISE_BN.ENABLED True TEST.PRECISE_BN.NUM_ITER 0",
        ["TEST.PRECISE_BN.NUM_ITER", "at least 1"],
    ),
    ("--num-machines 2", ["--dist-url"]),
    ("--num-machines 2 --machine-rank 2", ["--machine-rank 2"]),
    ("DATASETS.TRAIN ('shapes_trian',)", ["'shapes_trian'", "shapes_train"]),
    ("DATASETS.TRAIN ()", ["DATASETS.TRAIN is empty"]),
    ("DATASETS.TEST ('coco_2014_minival',)", ["DETECTRON2_DATASETS", "minival2014.json"]),
    (
        "MODEL.MABN.REQUIRE_WEIGHTS True",
        ["MODEL.WEIGHTS is empty", "trained with MABN", "REQUIRE_WEIGHTS False"],
    ),
    (
        f"--num-gpus 2 {MABN} SOLVER.IMS_PER_BATCH 6",
        ["SIMULATED_BATCH_SIZE 32", "the 3 images per process", "IMS_PER_BATCH 6, 2 process"],
    ),
    (f"{MABN} MODEL.MABN.BATCH_SIZE 3", ["SIMULATED_BATCH_SIZE 32", "BATCH_SIZE 3"]),
    ("MODEL.META_ARCHITECTURE RetinaNets", ["RetinaNets", "META_ARCH"]),
    (
        "MODEL.META_ARCHITECTURE ConfigurableHeadRetinaNet MODEL.RETINANET.HEAD_NAME "
        "MultiDomainBNRetinaNetHead MODEL.RETINANET.BN.TRAIN_STATS sharde",
        ["sharde", "shared", "domain_specific"],
    ),
    ("TEST.PRECISE_BN.ENABLED True TEST.PRECISE_BN.DATASETS ('nothing',)", ["'nothing'"]),
    ("TEST.DIAGNOSE.PERIOD -1", ["TEST.DIAGNOSE.PERIOD must be at least 0, got -1"]),
    (
        "TEST.DIAGNOSE.PERIOD 5 TEST.PRECISE_BN.NUM_ITER 1",
        ["TEST.PRECISE_BN.NUM_ITER must be at least 2"],
    ),
    ("TEST.DIAGNOSE.PERIOD 5 TEST.PRECISE_BN.DATASETS ('nowhere',)", ["'nowhere'"]),
    ("MODEL.RETINANET.HEAD_NAME SharedBNRetinaNetHead", [*UNREAD, "'SharedBNRetina"]),
    ("MODEL.RETINANET.BN.AFFINE shared", [*UNREAD, "BN.AFFINE is 'shared'"]),
    ("--eval-only MODEL.RETINANET.BN.AFFINE shared", [*UNREAD]),
    ("MODEL.ROI_HEADS.NORM_IMAGES 1", ["NORM_IMAGES is 1", "ARCHITECTURE RetinaNet"]),
    ("MODEL.ROI_BOX_HEAD.NAME ShuffleBNBoxHead", ["BOX_HEAD.NAME", "RetinaNet"]),
    (
        f"{RCNN} MODEL.ROI_HEADS.NAME StandardROIHeads MODEL.ROI_HEADS.NORM_IMAGES 1",
        ["NORM_IMAGES is 1", "NormImagesROIHeads"],
    ),
    (f"{RCNN} MODEL.ROI_BOX_HEAD.NAME NormBoxHead", ["NormBoxHead", "Res5ROIHeads"]),
    ("SOLVER.TRAIN_ONLY ('head.*','nothing')", ["train_only", "'nothing'"]),
    ("--eval-only", ["MODEL.WEIGHTS is empty"]),
    ("--eval-only --resume", ["MODEL.WEIGHTS is empty", "no last checkpoint"]),
    ("MODEL.RETINANET.NUM_CLASSES 1", ["MODEL.RETINANET.NUM_CLASSES 1", "2 classes"]),
    ("SOLVER.BASE_LR -0.1", ["SOLVER.BASE_LR", "-0.1"]),
    ("SOLVER.BASE_LR nan", ["SOLVER.BASE_LR", "nan"]),
    ("MODEL.DEVICE gpu", ["MODEL.DEVICE 'gpu'", "cpu"]),
    ("MODEL.DEVICE cudaa", ["MODEL.DEVICE 'cudaa'", "cpu"]),
    ("SEED 4294967296", ["SEED", "4294967296"]),
    ("DATALOADER.NUM_WORKERS -1", ["DATALOADER.NUM_WORKERS", "-1"]),
    ("TEST.PRECISE_BN.NUM_WORKERS -1", ["TEST.PRECISE_BN.NUM_WORKERS", "-1"]),
    ("OUTPUT_DIR ", ["OUTPUT_DIR must not be empty"]),
    ("INPUT.MIN_SIZE_TRAIN ()", ["INPUT.MIN_SIZE_TRAIN must not be empty, got ()"]),
    ("MODEL.RETINANET.PRIOR_PROB 0.0", ["MODEL.RETINANET.PRIOR_PROB", "0.0"]),
    ("MODEL.RETINANET.PRIOR_PROB 1.0", ["MODEL.RETINANET.PRIOR_PROB", "1.0"]),
    (
        "MODEL.ANCHOR_GENERATOR.SIZES [[]]",
        ["MODEL.ANCHOR_GENERATOR.SIZES must not be empty, got [[]]"],
    ),
    ("SOLVER.AVERAGE.LR (0.1,)", ["SOLVER.AVERAGE.LR", "SOLVER.AVERAGE.KIND"]),
    ("SOLVER.MAX_ITER -1", ["SOLVER.MAX_ITER must be at least 1;", "got -1", "--eval-only"]),
    (f"OUTPUT_DIR {__file__}", ["OUTPUT_DIR", "is a file", "name another folder"]),
    ("MODEL.RETINANET.NORM MABN", ["MODEL.RETINANET.NORM 'MABN'", "HEAD_NAME"]),
    (
        "MODEL.RETINANET.IN_FEATURES ['p3','p9']",
        ["no 'p9'", "MODEL.RETINANET.IN_FEATURES", "p3, p4, p5, p6, p7"],
    ),
    (
        "--num-gpus 2 TEST.PRECISE_BN.ENABLED True TEST.PRECISE_BN.IMS_PER_BATCH 3",
        ["TEST.PRECISE_BN.IMS_PER_BATCH 3"],
    ),
]


@pytest.mark.parametrize(("words", "parts"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line(tool: Tool, words: str, parts: list[str]) -> None:
    line = tool.fails(*words.split(" "))
    for part in parts:
        assert part in line


def test_warnings_do_not_add_lines(tmp_path: Path, tool: Tool) -> None:
    path = tmp_path / "no_version.yaml"  # detectron2 warns of that
    path.write_text("MODEL: {DEVICE: cpu}\n")
    assert "DATASETS.TRAIN is empty" in tool.fails("--config-file", str(path))


def test_more_gpus_than_there_are(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    argv = ["--num-gpus", "4", "MODEL.DEVICE", "cuda"]
    assert "4 GPUs asked for, but this machine has 2" in tool.fails(*argv)
    tool.starts(*argv[:-1], "cpu")  # processes on the CPU are not limited by GPUs
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # so detectron2 starts gloo, not NCCL


def test_without_gpus_cuda_means_processes_on_the_cpu(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tool.starts("--num-gpus", "4", "MODEL.DEVICE", "cuda")


def test_resuming_needs_the_last_checkpoint_and_no_initial_weights(tool: Tool) -> None:
    tool.out.mkdir()
    (tool.out / "last_checkpoint").write_text("model_0000009.pth")
    line = tool.fails("--resume")
    assert "last_checkpoint names" in line and "model_0000009.pth" in line
    torch.save({"model": {}}, tool.out / "model_0000009.pth")
    tool.starts("--resume", "MODEL.WEIGHTS", "nowhere.pth")


def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, tool: Tool) -> None:
    """Defect 31: what was a traceback of every rank; nothing is written, the log is not begun."""
    out, good = tmp_path / "out", {"model": {"backbone.x": torch.ones(100)}}
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"neither zip nor pickle")
    argv = ["MODEL.WEIGHTS", str(bad)]
    line = tool.fails(*argv)
    assert str(bad) in line and "cannot be read as a checkpoint" in line and not out.exists()
    out.mkdir()
    for name in ("model_0000004.pth", "model_0000009.pth", "model_0000014.pth"):
        torch.save(good, out / name)
        os.utime(out / name, (int(name[6:13]),) * 2)
    whole = (out / "model_0000014.pth").read_bytes()
    for cut in (0, len(whole) // 2, len(whole) - 1):
        (out / "model_0000014.pth").write_bytes(whole[:cut])
        (out / "last_checkpoint").write_text("model_0000014.pth")
        line = tool.fails("--resume", *argv)
        assert "model_0000014.pth cannot be read" in line
        assert "the newest that can is model_0000009.pth" in line and "last_checkpoint" in line
    assert "log.txt" not in os.listdir(out)


def test_a_pickle_of_weights_cannot_execute_code(tmp_path: Path, tool: Tool) -> None:
    """Defect 31: and one of arrays, as Detectron's are, loads."""

    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": Code()}, "__author__": "me"}))
    argv = ["MODEL.WEIGHTS", str(path)]
    line = tool.fails(*argv)
    assert str(path) in line and "posix.mkdir" in line and "execute code" in line
    assert not (tmp_path / "ran").exists()
    weights = {"conv1_w": np.ones((8, 3, 7, 7), np.float32), "conv1_b": np.ones(8, np.float16)}
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"blobs": weights}, protocol=protocol))
        tool.starts(*argv)


def test_weights_of_another_architecture(tmp_path: Path, tool: Tool, caplog: Any) -> None:
    """Defect 20."""
    cfg = load_config(tool.config_file)
    detector = Trainer.build_model(cfg).state_dict()
    other = {k.replace("head.", "roi_heads.box_head."): v for k, v in detector.items()}
    torch.save({"model": other}, tmp_path / "other.pth")
    argv = ["MODEL.WEIGHTS", str(tmp_path / "other.pth")]
    line = tool.fails("--eval-only", *argv)
    assert "another architecture" in line and "roi_heads" in line and "head, left untrained" in line
    tool.starts(*argv)  # training may start from a backbone
    Checkpointer(Trainer.build_model(cfg)).load(str(tmp_path / "other.pth"))
    said = [r for r in caplog.records if "another architecture" in r.getMessage()]
    assert len(said) == 1 and "\n" not in said[0].getMessage()
    backbone = {k.removeprefix("backbone."): v for k, v in detector.items() if "backbone" in k}
    backbone["stem.fc.weight"] = torch.ones(3)
    torch.save(backbone, tmp_path / "imagenet.pth")
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "imagenet.pth") + "?matching_heuristics=True")
    assert checkpointer.misfit is None
    torch.save({"something": torch.ones(1)}, tmp_path / "nothing.pth")
    argv[-1] = str(tmp_path / "nothing.pth")
    assert "none of its 1 keys fits" in tool.fails(*argv)


def test_weights_without_the_statistics_of_a_head(tmp_path: Path, tool: Tool) -> None:
    """Defect 20, before a process is started."""
    head = [
        "MODEL.META_ARCHITECTURE", "ConfigurableHeadRetinaNet",
        "MODEL.RETINANET.HEAD_NAME", "SharedBNRetinaNetHead",
    ]  # fmt: skip
    without = load_config(tool.config_file, [*head[:2], "MODEL.RETINANET.NORM", ""])
    path = str(tmp_path / "without.pth")
    torch.save({"model": Trainer.build_model(without).state_dict()}, path)
    argv = [*head, "MODEL.WEIGHTS", path]
    line = tool.fails(*argv)
    assert "head.cls_subnet.1.running_mean" in line
    assert "MODEL.ALLOW_MISSING_STATISTICS True" in line
    tool.starts(*argv, "MODEL.ALLOW_MISSING_STATISTICS", "True")


@pytest.mark.parametrize("tool", ["train_net.py", "leakage.py"])
def test_help_works_without_detectron2(tmp_path: Path, tool: str) -> None:
    """Defect 31."""
    path = Path(TOOL).parent / tool
    code = (
        "import runpy, sys; sys.modules['detectron2'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_tool(tmp_path, sys.executable, "-c", code, str(path), "--help")
    assert done.returncode == 0 and "--num-gpus" in done.stdout and done.stderr == ""
    done = run_tool(tmp_path, sys.executable, "-c", code, str(path), "SEED", "1")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{tool}: error: needs detectron2")


def test_weights_elsewhere_are_fetched_before_the_run(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 47: those that cannot be fetched were a traceback of every rank."""
    weights, here = "https://host.invalid/model.pth", tmp_path / "model.pth"
    torch.save({"model": Trainer.build_model(load_config(tool.config_file)).state_dict()}, here)
    argv = ["MODEL.WEIGHTS", weights]

    def fetch(path: str, *args: Any, **kwargs: Any) -> str:
        if path == weights and not here.exists():
            raise OSError("no route\nto host")
        return str(here) if path == weights else path

    monkeypatch.setattr("detectron2.utils.file_io.PathManager.get_local_path", fetch)
    tool.starts(*argv)
    here.unlink()
    (tmp_path / "out").rmdir()
    line = tool.fails(*argv)
    assert weights in line and "no route to host" in line and not (tmp_path / "out").exists()


def test_what_may_be_meant_is_warned_of(tool: Tool) -> None:
    """Defect 47: more classes than the data has; frozen layers without weights."""

    def warned(*opts: str, training: bool = True) -> list[str]:
        return list(
            warnings_of(load_config(tool.config_file, opts), training=training, resumes=False)
        )

    assert warned() == []
    (line,) = warned("MODEL.RETINANET.NUM_CLASSES", "3")
    assert "MODEL.RETINANET.NUM_CLASSES is 3" in line and "2 classes" in line
    frozen = ("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.RESNETS.NORM", "FrozenBN")
    (line,) = warned(*frozen)
    assert "MODEL.WEIGHTS is empty" in line and "RESNETS.NORM FrozenBN" in line and "AT 2" in line
    assert warned(*frozen, training=False) == warned(*frozen, "MODEL.WEIGHTS", "a.pth") == []


def test_generated_data_sets_need_not_be_there(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "empty"))
    keys = "DATASETS.TRAIN ('shapes_train',) DATASETS.TEST ('shapes_val',)"
    tool.starts(*keys.split(), "MODEL.RETINANET.NUM_CLASSES", "3")
    assert not (tmp_path / "empty").exists()


def test_under_torchrun_ranks_are_counted_from_the_environment(
    tool: Tool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    assert "3 process" in tool.fails()
    assert "leave out --num-gpus" in tool.fails("--num-gpus", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        launch.run(start, "a test", ["--config-file", tool.config_file])
    assert capsys.readouterr().err == ""  # rank 0 says it once


def run_tool(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=240
    )


def test_the_tool_itself_prints_one_line(tmp_path: Path) -> None:
    config = ("--config-file", get_config_file("retinanet_bn_row1.yaml"))
    done = run_tool(tmp_path, sys.executable, TOOL, *config, "MODEL.WEIGHTS", "")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_net.py: error: ")
    assert "coco_2017_" in line and str(tmp_path) in line and "DETECTRON2_DATASETS" in line


@pytest.mark.slow
def test_train_on_two_processes_then_train_a_population_under_torchrun(tmp_path: Path) -> None:
    out = write_run(
        tmp_path,
        # as on GPUs, to the letter (defect 13)
        MODEL__DEVICE="cuda",
        MODEL__META_ARCHITECTURE="ConfigurableHeadRetinaNet",
        MODEL__RETINANET__HEAD_NAME="SharedBNRetinaNetHead",
        MODEL__RETINANET__NORM="SyncBN",
        SOLVER__MAX_ITER=2,
    )

    done = run_tool(tmp_path, sys.executable, TOOL, "--config-file", "run.yaml", "--num-gpus", "2")
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    assert "Evaluation results for coco_2017_val_100" in log
    assert log.count("No GPU is visible") == 1
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    trained = torch.load(out / "model_final.pth")
    assert len(trained["trainer"]["rank_states"]) == 2

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = run_tool(
        tmp_path, *torchrun, "2", TOOL, "--config-file", "run.yaml", "--eval-only",
        "MODEL.WEIGHTS", "out/model_final.pth", "TEST.PRECISE_BN.ENABLED", "True",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Evaluation results for coco_2017_val_100" in done.stdout + done.stderr
    assert (out / "last_checkpoint").read_text() == "model_final.pth"  # defect 17
    population = torch.load(out / "model_population.pth")["model"]
    for name, value in trained["model"].items():
        same = torch.equal(population[name], value)
        assert same != name.endswith(("running_mean", "running_var")), name

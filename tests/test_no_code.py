"""No file that is read can execute code: weights of any kind, and config files."""

from __future__ import annotations

import os
import pickle
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from torch import nn

from rethinking_bn.checkpoint import read_file, read_weights
from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.engine import Trainer, load_config
from rethinking_bn.modeling.distilled import Teacher, teacher_config
from tests.engine.tiny import tiny_config

ROOT = Path(__file__).parent.parent


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


@pytest.fixture(
    params=product((pickle.dump, torch.save), (".pkl", ".pth", ".pyth")),
    ids=lambda c: c[0].__module__ + c[1],
)
def malicious(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield the path of weights with something malicious; at the end nothing may have run."""
    # even where torch is told to unpickle anything
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    save, suffix = request.param
    path, made = tmp_path / f"weights{suffix}", tmp_path / "it ran"
    content = {"model": {"weight": torch.ones(3), "bias": Malicious(made)}, "__author__": "x"}
    with open(path, "wb") as file:
        save(content, file)
    yield path
    assert not made.exists()


def test_readers_refuse_in_one_line(malicious: Path, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(malicious.name)
    checkpointer = Checkpointer(nn.Linear(3, 1), str(tmp_path))
    for reader in (
        lambda: read_file(malicious),
        lambda: read_weights(malicious),
        lambda: checkpointer.load(str(malicious)),
        lambda: checkpointer.resume_or_load("", resume=True),
    ):
        with pytest.raises(ValueError, match=f"{malicious.name} cannot be read") as error:
            reader()
        assert "\n" not in str(error.value)


def test_a_run_and_its_teacher_refuse(malicious: Path, tmp_path: Path) -> None:
    """Defect 45: detectron2's checkpointer read the teacher's weights."""
    cfg = tiny_config("no data", tmp_path / "out", MODEL__WEIGHTS=str(malicious))
    model = Trainer.build_model(cfg)
    with pytest.raises(ValueError, match="cannot be read"):
        Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    teacher = Teacher(str(tmp_path / "teacher.yaml"), str(malicious))
    with pytest.raises(ValueError, match="cannot be read"):
        teacher.model(torch.zeros(1))


@pytest.mark.parametrize("read", [load_config, teacher_config])
def test_tags_of_a_config_file_run_nothing(read: Any, tmp_path: Path) -> None:
    made = tmp_path / "it ran"
    (tmp_path / "base.yaml").write_text(f"SEED: !!python/object/apply:os.mkdir ['{made}']\n")
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\n")
    zoo = Path(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_3x.yaml")).parents[1]
    outside = os.path.relpath(tmp_path / "base.yaml", zoo)  # as if from detectron2's own
    for name in (tmp_path / "base.yaml", tmp_path / "child.yaml", outside):
        if name != outside or read is teacher_config:
            with pytest.raises(Exception, match=r"tag|constructor"):
                read(str(name))
    assert not made.exists()


class _Pointers:
    """Eight bytes that numpy would take for the address of an object."""

    def __reduce__(self) -> Any:
        class Record:
            def __reduce__(self) -> Any:
                fields = {"a": (np.dtype("O"), 0)}
                return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 16)

        state = (1, (1,), Record(), False, (0x41414141).to_bytes(8, "little"))
        return np.array(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state


@pytest.mark.parametrize("value", [_Pointers(), np.array([[]], dtype=object), np.array("a")])
def test_arrays_of_anything_but_numbers_are_refused(value: Any, tmp_path: Path) -> None:
    """numpy believes a pickle's flags; reading such an array's first element is a crash."""
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"weight": value}}))
    with pytest.raises(ValueError, match=r"weights.pkl cannot be read.*array of the type"):
        read_file(path)


def test_arrays_in_pickles_become_tensors(tmp_path: Path) -> None:
    path, plain = tmp_path / "weights.pkl", np.arange(24.0).reshape(2, 3, 4)
    arrays = [plain, np.asfortranarray(plain), plain[0, 0, :0], plain.astype("f2"), plain > 3]
    arrays += [np.array(3.5), plain.astype("i8")[:, ::2]]
    for protocol, some in ((2, arrays[:2]), (4, arrays)):
        content = {str(i): array for i, array in enumerate(some)}
        path.write_bytes(pickle.dumps({"model": content, "step": np.int64(3)}, protocol=protocol))
        found = read_file(path)
        assert found["step"] == 3
        for expected, got in zip(some, found["model"].values(), strict=True):
            assert got.dtype == torch.from_numpy(expected.copy()).dtype
            assert torch.equal(got, torch.from_numpy(expected.copy()))
        assert set(read_weights(path)) == set(content)


def test_files_of_caffe2_and_pycls_load(tmp_path: Path) -> None:
    """What detectron2 reads by itself: names are matched, leftovers dropped."""
    weight = torch.full((1, 3), 2.0).numpy()
    flat = {"weight": weight, "weight_momentum": weight}
    files = {
        "flat.pkl": flat,
        "blobs.pkl": {"blobs": flat},
        "zoo.pkl": {"model": {"weight": weight}, "__author__": "x", "matching_heuristics": True},
    }
    torch.save({"model_state": {"weight": torch.from_numpy(weight)}}, tmp_path / "pycls.pyth")
    for name in (*files, "pycls.pyth"):
        if name in files:
            (tmp_path / name).write_bytes(pickle.dumps(files[name]))
        model = nn.Linear(3, 1)
        Checkpointer(model).load(str(tmp_path / name))
        assert torch.equal(model.weight, torch.full((1, 3), 2.0)), name


def test_files_are_read_in_one_place() -> None:
    """Whatever can execute a file's code appears where it cannot; elsewhere nothing reads one."""
    readers = re.compile(
        r"torch\.load\(|pickle\.(?:loads?|Unpickler)\b|from pickle|(?:np|numpy)\.load\("
        r"|import (?:joblib|dill)|import \w*Checkpointer|hub\.load|yaml\.(?:unsafe_|full_)?load\b"
    )
    found = {}
    for file in [*(ROOT / "rethinking_bn").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        source = file.read_text(encoding="utf-8")
        lines = [line for line in source.splitlines() if "from rethinking_bn" not in line]
        if names := readers.findall("\n".join(lines)):
            found[file.relative_to(ROOT).as_posix()] = names
    found.pop("tools/machine/processes.py", None)  # what processes of its own have just written
    assert found == {
        "rethinking_bn/checkpoint.py": ["pickle.Unpickler", "torch.load("],
        "rethinking_bn/checkpointer.py": ["import DetectionCheckpointer"],
        "rethinking_bn/engine/trainer_mixin.py": ["import DetectionCheckpointer"],  # replaced
    }
    source = (ROOT / "rethinking_bn" / "checkpoint.py").read_text(encoding="utf-8")
    assert 'torch.load(path, map_location="cpu", weights_only=True)' in source

"""A run that was interrupted and resumed is, bit for bit, the run that was not (defect 16)."""

from __future__ import annotations

import hashlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from torch import nn

from rethinking_bn.engine import Trainer, WeightAverage
from rethinking_bn.modeling import ConfigurableHeadRetinaNet
from tests.engine.tiny import register_data, tiny_config, write_data
from tests.helpers import run_distributed

Record = dict[str, Any]


# its windows of past statistics are each rank's own; a model's state dict holds rank 0's
MABN = {
    "MODEL.RETINANET.HEAD_NAME": "MultiDomainBNRetinaNetHead",
    "MODEL.RETINANET.NORM": "MABN",
    "MODEL.MABN.WARMUP_ITERS": "1",
    "MODEL.MABN.SIMULATED_BATCH_SIZE": "8",
}
EVERYTHING = {
    "SOLVER.IMS_PER_BATCH": "8",  # two images in each of two passes on two ranks
    "SOLVER.ACCUMULATION_STEPS": "2",
    "SOLVER.AMP.ENABLED": "True",
    "SOLVER.AVERAGE.KIND": "ema",
    "TEST.PRECISE_BN.ENABLED": "True",
    "TEST.PRECISE_BN.NUM_ITER": "1",
}
FROZEN = {"SOLVER.FREEZE_BN.START": "2", "SOLVER.FREEZE_BN.AFFINE": "True"}
NO_EVALUATION = {"TEST.EVAL_PERIOD": "0", "DATASETS.TEST": "()"}
# BN of each rank's own data: the ranks' statistics differ until they are merged. The checkpoint is
# between the start and the first update.
AVERAGE = {
    **NO_EVALUATION,
    "SOLVER.AVERAGE.KIND": "ema",
    "SOLVER.AVERAGE.PERIOD": "2",
    "SOLVER.AVERAGE.START": "2",
    "TEST.PRECISE_BN.ENABLED": "True",
}


class NoisyRetinaNet(ConfigurableHeadRetinaNet):
    """RetinaNet with a random part in its forward, and a module that is told the iteration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told = Told()

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> Any:
        images = super().preprocess_image(batched_inputs)
        if self.training:
            images.tensor = nn.functional.dropout(images.tensor, 0.1)
        return images


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def set_iteration(self, run_seed: int, iteration: int) -> None:
        self.calls.append((run_seed, iteration))


if "NoisyRetinaNet" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(NoisyRetinaNet)


class Interruption(HookBase):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


class SchedulersSignal(Interruption):
    """SIGTERM to the last rank, which ends all of them after that iteration."""

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration and comm.get_rank() == comm.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class RecordingTrainer(Trainer):
    """Keeps this rank's losses of every iteration."""

    def run_step(self) -> None:
        self.losses = getattr(self, "losses", {})

        def record(module: nn.Module, inputs: Any, output: dict[str, torch.Tensor]) -> None:
            self.losses[self.iter] = {name: loss.item() for name, loss in output.items()}

        handle = self.model.register_forward_hook(record)
        super().run_step()
        handle.remove()


def digest(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha1(value.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, value in state.items()
    }


def train(cfg: CfgNode, *, resume: bool = False, interruption: HookBase | None = None) -> Record:
    trainer = RecordingTrainer(cfg)
    trainer.resume_or_load(resume)
    if interruption is not None:
        trainer.register_hooks([interruption])
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.train()
        return {"seed": trainer.run_seed}
    trainer.train()
    model = getattr(trainer.model, "module", trainer.model)
    momenta = {
        str(index): entry["momentum_buffer"]
        for index, entry in trainer.optimizer.state_dict()["state"].items()
    }
    averages = (hook.averaged for hook in trainer._hooks if isinstance(hook, WeightAverage))
    return {
        "start": trainer.start_iter,
        "average": [(average.updates, digest(average.module.state_dict())) for average in averages],
        "seed": trainer.run_seed,
        "losses": trainer.losses,
        "normalizer": model.loss_normalizer,
        "state": digest(model.state_dict()),
        "momenta": digest(momenta),
        "lr": trainer.scheduler.get_last_lr(),
        # population training announces batches of its own, under another seed
        "told": [call for call in model.told.calls if call[0] == trainer.run_seed],
    }


def config(data: str, out: Path, overrides: dict[str, Any]) -> CfgNode:
    return tiny_config(data, out, MODEL__META_ARCHITECTURE="NoisyRetinaNet", **overrides)


def interrupted_and_not(
    folder: Path, overrides: dict[str, Any], interruption: HookBase
) -> tuple[Record, Record]:
    """Train 6 iterations at one go, and again with an interruption; checkpoint after 3."""
    data = register_data(folder)
    whole = train(config(data, folder / "whole", overrides))
    if int(overrides.get("SEED", 0)) < 0:
        overrides = {**overrides, "SEED": whole["seed"]}
    ended = config(data, folder / "ended", overrides)
    train(ended, interruption=interruption)
    ended.SEED = -1  # a new random seed, which the checkpoint's must replace
    torch.manual_seed(99)  # whatever happened in between
    return whole, train(ended, resume=True)


def assert_same_run(whole: Record, resumed: Record, start: int = 3) -> None:
    assert (whole["start"], resumed["start"]) == (0, start)
    for key in ("seed", "normalizer", "state", "momenta", "lr", "average"):
        assert resumed[key] == whole[key], key
    assert sorted(whole["losses"]) == list(range(6))
    assert resumed["losses"] == {i: whole["losses"][i] for i in range(start, 6)}
    assert resumed["told"] == whole["told"][start:]


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        slow({"SEED": "-1", "DATALOADER.NUM_WORKERS": "2"}),
        slow(
            {
                "SOLVER.AMP.ENABLED": "True",
                "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
            }
        ),
        slow({"TEST.PRECISE_BN.ENABLED": "True"}),
        {"SOLVER.ACCUMULATION_STEPS": "2", "SOLVER.AMP.ENABLED": "True", **NO_EVALUATION},
        {"SOLVER.FREEZE_BN.START": "4"},  # after the checkpoint
        {**MABN, **NO_EVALUATION},
    ],
    ids=str,
)
def test_one_process(tmp_path: Path, overrides: dict[str, Any]) -> None:
    whole, resumed = interrupted_and_not(tmp_path, overrides, Interruption(4))
    assert_same_run(whole, resumed)
    assert whole["told"] == [(whole["seed"], iteration) for iteration in range(6)]


def on_rank(rank: int, *args: Any) -> tuple[Record, Record]:
    return interrupted_and_not(*args)


@pytest.mark.parametrize(
    ("world", "overrides", "interruption"),
    [
        (2, {"TEST.PRECISE_BN.ENABLED": "True"}, Interruption(4)),
        # frozen after the checkpoint that is resumed, and before it
        slow(2, {**EVERYTHING, "SOLVER.FREEZE_BN.START": "4"}, Interruption(4)),
        slow(2, {**EVERYTHING, **FROZEN}, Interruption(4)),
        (2, {**AVERAGE, "SOLVER.AVERAGE.STATISTICS": "average"}, SchedulersSignal(3)),
        slow(2, {**AVERAGE, "SOLVER.AVERAGE.STATISTICS": "copy"}, SchedulersSignal(3)),
        slow(2, {**AVERAGE, "SOLVER.AVERAGE.STATISTICS": "copy"}, Interruption(4)),
        # the sum of three gradients depends on their order
        (3, {"SOLVER.IMS_PER_BATCH": "6", **MABN, **NO_EVALUATION}, Interruption(4)),
    ],
)
def test_several_processes(
    tmp_path: Path, world: int, overrides: dict[str, Any], interruption: Interruption
) -> None:
    write_data(tmp_path)
    ranks = run_distributed(on_rank, world, tmp_path, overrides, interruption, timeout=240)
    for whole, resumed in ranks:
        assert_same_run(whole, resumed, 4 if isinstance(interruption, SchedulersSignal) else 3)
    first, second = ranks[0][0], ranks[1][0]
    # the ranks see different data, and end with the same model
    assert first["losses"] != second["losses"] and first["normalizer"] != second["normalizer"]
    assert first["average"] == second["average"]
    differing = {name for name in first["state"] if first["state"][name] != second["state"][name]}
    assert all("_ring." in name for name in differing)
    assert bool(differing) == ("MABN" in overrides.values())

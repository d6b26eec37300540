"""Runs of Mask R-CNN, by the configs of Tables 3 and 6, on one and on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from rethinking_bn.engine import Trainer
from rethinking_bn.shuffle import rows
from tests.helpers import run_distributed
from tests.modeling.roi_cases import SHUFFLED, mask_config, norms, register_masks


def _train(rank: int, folder: str) -> list[Any]:
    seen = []
    for number, keys in enumerate(RUNS):
        cfg = run_config(folder, f"{folder}/{number}", **keys)
        trainer = Trainer(cfg)
        trainer.train()
        results = trainer._last_eval_results
        state = {k: v for k, v in trainer.model.module.state_dict().items() if "roi_heads" in k}
        seen.append((results, state))
    return seen


RUNS: list[dict[str, Any]] = [
    {**SHUFFLED, "MODEL__ROI_HEADS__NORM_IMAGES": 1},
    norms("SyncBN"),
]


def run_config(folder: str | Path, output_dir: str | Path, **keys: Any) -> CfgNode:
    """Return a config that trains 2 iterations of 4 shapes images and then a population."""
    run = {"SOLVER__MAX_ITER": 2, "TEST__EVAL_PERIOD": 2, "TEST__PRECISE_BN__NUM_ITER": 1}
    run["TEST__PRECISE_BN__ENABLED"] = True
    return mask_config(register_masks(folder), output_dir, **{**run, **keys})


def test_two_processes_train_a_population_and_evaluate(tmp_path: Path) -> None:
    register_masks(tmp_path)  # generated once
    first, second = run_distributed(_train, 2, str(tmp_path), timeout=200)
    for number in range(len(RUNS)):
        results, state = first[number]
        assert set(results) == {"bbox", "segm"}
        assert all(torch.equal(value, second[number][1][key]) for key, value in state.items())
        saved = torch.load(tmp_path / str(number) / "model_final.pth", weights_only=False)
        assert all(torch.equal(saved["model"][key], value) for key, value in state.items())


def test_a_project_with_detectron2s_trainer_names_the_heads_in_its_yaml(tmp_path: Path) -> None:
    keys = {"MODEL__ROI_HEADS__NAME": "StandardROIHeads", "DATASETS__TEST": ()}
    cfg = run_config(tmp_path, tmp_path / "out", **SHUFFLED, **keys)
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = DefaultTrainer(cfg)
    with mock.patch.object(rows, "plan_exchange", wraps=rows.plan_exchange) as plans:
        trainer.train()
    seeds = [seed for _, (_, _, seed), _ in plans.mock_calls]
    # two heads, two iterations; detectron2's population training counts from iteration 0 again
    assert len(set(seeds[:4])) == 4 and seeds[4:] == seeds[:2]


def test_a_resumed_run_shuffles_as_the_uninterrupted_one(tmp_path: Path) -> None:
    keys = {
        **SHUFFLED,
        "MODEL__ROI_HEADS__NORM_IMAGES": 1,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "TEST__EVAL_PERIOD": 0,
        "DATASETS__TEST": (),
        "TEST__PRECISE_BN__ENABLED": False,
    }
    states = []
    for resume in (False, True):
        cfg = run_config(tmp_path, tmp_path / "out", SOLVER__MAX_ITER=3, **keys)
        if resume:
            (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        assert trainer.start_iter == (2 if resume else 0)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())

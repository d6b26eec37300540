"""Runs of Mask R-CNN, by the configs of Tables 3 and 6, on one and on two processes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from rethinking_bn.command_line import argument_parser
from rethinking_bn.engine import Trainer
from rethinking_bn.engine.check_config import check_batch_size
from rethinking_bn.engine.rank_state import wrap_data_parallel
from rethinking_bn.shuffle import rows
from tests.helpers import run_distributed
from tests.modeling.roi_cases import SHUFFLED, gradients, mask_config, norms, register_masks
from tests.test_configs import TABLES_3_AND_6, batch, load

TRAIN_NET = Path(__file__).parents[1] / "tools" / "train_net.py"


def _step_and_infer(rank: int) -> dict[str, Any]:
    """Take a training step and an inference step with each twin, one image on each rank."""
    seen = {}
    for name in TABLES_3_AND_6:
        cfg = load(f"shapes/{name}.yaml")
        cfg.INPUT.MASK_FORMAT = "bitmask"
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50, 10
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
        torch.manual_seed(0)
        model = build_model(cfg)
        parallel = wrap_data_parallel(model)
        torch.manual_seed(rank)
        images = batch(with_masks=True)
        with EventStorage():
            losses = parallel(images[rank : rank + 1])
            sum(losses.values()).backward()
        with torch.no_grad():
            outputs = model.eval()([{"image": images[rank]["image"]}])
        size = outputs[0]["instances"].image_size
        heads = gradients(model.roi_heads)
        seen[name] = {k: v.detach() for k, v in losses.items()}, heads, size
    return seen


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_train_and_infer() -> None:
    first, second = run_distributed(_step_and_infer, 2, timeout=200)
    for name in TABLES_3_AND_6:
        for losses, _, _ in (first[name], second[name]):
            assert len(losses) == 5 and all(loss.isfinite() for loss in losses.values())
        assert all(torch.equal(first[name][1][k], g) for k, g in second[name][1].items())
        assert (first[name][2], second[name][2]) == ((64, 64), (32, 64))


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
    return mask_config(
        register_masks(folder),
        output_dir,
        **{
            "SOLVER__MAX_ITER": 2,
            "TEST__EVAL_PERIOD": 2,
            "TEST__PRECISE_BN__ENABLED": True,
            "TEST__PRECISE_BN__NUM_ITER": 1,
            **keys,
        },
    )


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


def test_normalisation_batches_that_do_not_fit_are_found_before_the_start() -> None:
    cfg = load("mask_rcnn_bn_head_1im.yaml")
    check_batch_size(cfg, 16)
    cfg.MODEL.ROI_HEADS.NORM_IMAGES = 2
    check_batch_size(cfg, 8)
    with pytest.raises(ValueError, match="NORM_IMAGES 2 does not divide the 1 images"):
        check_batch_size(cfg, 16)
    cfg.TEST.PRECISE_BN.IMS_PER_BATCH = 8
    with pytest.raises(ValueError, match=r"PRECISE_BN.IMS_PER_BATCH 8, 8 process"):
        check_batch_size(cfg, 8)


def test_eval_only_with_batch_statistics_on_a_bn_checkpoint(tmp_path: Path) -> None:
    """The weights of the BN config, evaluated in both ways, give different detections."""
    trained = tmp_path / "trained"
    Trainer(run_config(tmp_path, trained, TEST__EVAL_PERIOD=0, DATASETS__TEST=())).train()
    evaluate = runpy.run_path(str(TRAIN_NET), run_name="train_net")["evaluate"]
    detections = {}
    for norm in ("BN", "BatchStatBN"):
        out = tmp_path / norm
        cfg = run_config(tmp_path, out, **norms(norm), TEST__PRECISE_BN__ENABLED=False)
        cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
        (tmp_path / f"{norm}.yaml").write_text(cfg.dump())
        words = ["--config-file", str(tmp_path / f"{norm}.yaml"), "--eval-only"]
        results = evaluate(argument_parser("").parse_args(words))
        assert set(results) == {"bbox", "segm"}
        saved = out / "inference" / "coco_instances_results.json"
        detections[norm] = [d["score"] for d in json.loads(saved.read_text())]
    assert detections["BN"] and detections["BatchStatBN"]
    assert detections["BN"] != detections["BatchStatBN"]

"""The training loader: detectron2's images, any place to begin, no trace of the workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_train_loader

from rethinking_bn.engine import ResumableTrainLoader, build_train_loader
from tests.engine.test_population_loader import random_states, register_copy, without
from tests.engine.tiny import register_data, tiny_config

SAMPLERS = [
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
]


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    return tiny_config(register_data(tmp_path), tmp_path)


def describe(batches: list[Any]) -> list[Any]:
    """Everything random about batches: which images, and every pixel after augmentation."""
    return [[(d["image_id"], d["image"].numpy().tobytes()) for d in batch] for batch in batches]


def ids(batches: list[Any]) -> list[list[int]]:
    return [[d["image_id"] for d in batch] for batch in batches]


def take(loader: Any, start: int, number: int) -> list[Any]:
    loader.start_at(start)
    return list(islice(iter(loader), number))


@pytest.mark.parametrize("grouping", [True, False])
def test_images_are_those_of_detectron2s_loader(cfg: CfgNode, grouping: bool) -> None:
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    ours = list(islice(iter(build_train_loader(cfg)), 12))
    stock = list(islice(iter(build_detection_train_loader(cfg)), 12))
    assert ids(ours) == ids(stock)
    shapes = {tuple(d["height"] > d["width"] for d in batch) for batch in ours}
    assert (len(shapes) == 2) == grouping  # batches of wide images, and batches of high ones


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stream_can_begin_anywhere(cfg: CfgNode, sampler: str) -> None:
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.7
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(cfg.DATASETS.TRAIN[0], 1.5)]
    whole = describe(take(build_train_loader(cfg), 0, 9))
    np.random.seed(3)  # what came before must not matter
    assert describe(take(build_train_loader(cfg), 5, 4)) == whole[5:]


def test_workers_do_not_change_the_data(cfg: CfgNode) -> None:
    alone = describe(take(build_train_loader(cfg), 2, 5))
    cfg.DATALOADER.NUM_WORKERS = 2
    assert describe(take(build_train_loader(cfg), 2, 5)) == alone


def test_another_seed_gives_other_images_and_other_augmentation(cfg: CfgNode) -> None:
    first = take(build_train_loader(cfg), 0, 4)
    cfg.SEED = 8
    assert ids(take(build_train_loader(cfg), 0, 4)) != ids(first)
    # the same image seen again is augmented anew
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 48, 56, 64, 72)
    samples = [d for batch in take(build_train_loader(cfg), 0, 12) for d in batch]
    sizes: dict[int, set[Any]] = {}
    for sample in samples:
        sizes.setdefault(sample["image_id"], set()).add(tuple(sample["image"].shape))
    assert max(len(found) for found in sizes.values()) > 1


def test_loading_leaves_the_global_generators_alone(cfg: CfgNode) -> None:
    before = random_states()
    take(build_train_loader(cfg), 0, 3)
    assert random_states() == before


def counting(mapper_result: Callable[[dict[str, Any]], Any]) -> tuple[list[int], Any]:
    calls: list[int] = []

    def mapper(sample: dict[str, Any]) -> Any:
        calls.append(sample["image_id"])
        return mapper_result(sample)

    return calls, mapper


def test_fast_forward_loads_no_image(cfg: CfgNode) -> None:
    calls, mapper = counting(lambda sample: sample)
    take(build_train_loader(cfg, mapper), 1000, 1)
    assert len(calls) == 4


def test_an_image_the_mapper_refuses_is_replaced_the_same_way_every_time(cfg: CfgNode) -> None:
    _, mapper = counting(lambda sample: None if sample["image_id"] < 5 else sample)
    whole = ids(take(build_train_loader(cfg, mapper), 0, 8))
    assert min(min(batch) for batch in whole) >= 5
    assert ids(take(build_train_loader(cfg, mapper), 3, 5)) == whole[3:]


def test_a_mapper_that_refuses_everything_is_an_error(cfg: CfgNode) -> None:
    _, mapper = counting(lambda sample: None)
    with pytest.raises(RuntimeError, match="10 images"):
        take(build_train_loader(cfg, mapper), 0, 1)


def test_without_sizes_nothing_is_grouped(cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    (trained,) = cfg.DATASETS.TRAIN
    bare = register_copy(trained, "no sizes", lambda d: without("width")(without("height")(d)))
    ungrouped = tiny_config(trained, cfg.OUTPUT_DIR, DATALOADER__ASPECT_RATIO_GROUPING=False)
    cfg.DATASETS.TRAIN = (bare,)
    expected = ids(take(build_train_loader(ungrouped), 0, 4))
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        assert ids(take(build_train_loader(cfg), 0, 4)) == expected
    assert "not grouped by aspect ratio" in caplog.text


def test_a_torch_dataset_gets_detectron2s_loader_and_a_warning(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    (trained,) = cfg.DATASETS.TRAIN
    name, dicts = f"a torch dataset {trained}", DatasetCatalog.get(trained)
    DatasetCatalog.register(name, lambda: torch.utils.data.Subset(dicts, range(len(dicts))))
    cfg.DATASETS.TRAIN = (name,)
    loader = build_train_loader(cfg)
    assert not isinstance(loader, ResumableTrainLoader)
    assert len(next(iter(loader))) == 4
    assert "starts over" in caplog.text

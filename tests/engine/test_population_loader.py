"""The images of population training: the same at every start, and no business of anybody else's."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from rethinking_bn.engine import build_population_loader
from rethinking_bn.engine.loaders import build_together
from tests.engine.tiny import register_data, tiny_config, write_data
from tests.helpers import run_distributed


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    return tiny_config(register_data(tmp_path), tmp_path)


def register_copy(source: str, name: str, change: Any) -> str:
    """Register a data set with the dicts of another, each changed by a function."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: [change(dict(d)) for d in DatasetCatalog.get(source)])
    return name


def without(key: str) -> Any:
    return lambda sample: {k: v for k, v in sample.items() if k != key}


def take(loader: Any, number: int = 7) -> list[list[tuple[int, bytes]]]:
    """Everything random about batches: which images, and every pixel after augmentation."""
    return [
        [(d["image_id"], d["image"].numpy().tobytes()) for d in batch]
        for batch in islice(iter(loader), number)
    ]


def random_states() -> list[Any]:
    keys = np.random.get_state()[1]
    return [random.getstate(), np.asarray(keys).tolist(), torch.get_rng_state().tolist()]


def test_the_batch_is_scaled_to_the_processes_as_in_training(cfg: CfgNode) -> None:
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = 8, 4
    assert len(next(iter(build_together(cfg)))) == 2
    cfg.SOLVER.IMS_PER_BATCH = 6
    with pytest.raises(ValueError, match="IMS_PER_BATCH 6 cannot be divided by .*WORLD_SIZE 4"):
        build_together(cfg)


def test_every_start_gives_the_same_whatever_the_generators_do(cfg: CfgNode) -> None:
    loader = build_population_loader(cfg)
    before = random_states()
    first = take(loader)
    assert random_states() == before  # not moved
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert take(loader) == first  # not read, and the loader starts over
    assert take(build_population_loader(cfg)) == first
    cfg.TEST.PRECISE_BN.NUM_WORKERS = 2
    assert take(build_population_loader(cfg)) == first
    assert {i for batch in first for i, _ in batch} <= set(range(10))  # those of training
    trained = cfg.DATASETS.TRAIN[0]
    other = register_copy(trained, f"other {trained}", lambda d: {**d, "image_id": "other"})
    cfg.TEST.PRECISE_BN.DATASETS = (other,)
    assert {i for batch in take(build_population_loader(cfg)) for i, _ in batch} == {"other"}
    cfg.TEST.PRECISE_BN.DATASETS = ()
    cfg.SEED = 0
    zero = take(build_population_loader(cfg))
    cfg.SEED = -1
    assert take(build_population_loader(cfg)) == zero != first


def test_images_are_drawn_without_replacement_and_augmented_as_in_training(cfg: CfgNode) -> None:
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.TEST.PRECISE_BN.IMS_PER_BATCH = 5
    batches = list(islice(iter(build_population_loader(cfg)), 4))
    assert [len(batch) for batch in batches] == [5] * 4
    for epoch in (batches[:2], batches[2:]):
        assert sorted(d["image_id"] for batch in epoch for d in batch) == list(range(10))
    samples = [d for batch in batches for d in batch]
    assert {min(d["image"].shape[1:]) for d in samples} == {48, 64}  # INPUT.MIN_SIZE_TRAIN
    assert all(len(d["instances"]) == 2 for d in samples)


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_data_sets_without_labels(cfg: CfgNode, how: str) -> None:
    """Empty annotations everywhere are what a COCO file of images alone becomes."""
    trained = cfg.DATASETS.TRAIN[0]
    change = without("annotations") if how == "missing" else lambda d: {**d, "annotations": []}
    bare = register_copy(trained, f"bare {trained}", change)
    for names in ((bare,), (trained, bare), (bare, trained)):
        cfg.TEST.PRECISE_BN.DATASETS = names
        loader = build_population_loader(cfg)
        samples = [d for batch in islice(iter(loader), 5) for d in batch]
        assert len(samples) == 20
        assert not any("instances" in d or "annotations" in d for d in samples)


def test_labelled_images_without_objects_are_left_out_as_in_training(cfg: CfgNode) -> None:
    trained = cfg.DATASETS.TRAIN[0]

    def only_three(sample: dict[str, Any]) -> dict[str, Any]:
        return sample if sample["image_id"] < 3 else {**sample, "annotations": []}

    cfg.TEST.PRECISE_BN.DATASETS = (register_copy(trained, f"few {trained}", only_three),)
    batches = take(build_population_loader(cfg))
    assert {i for batch in batches for i, _ in batch} == {0, 1, 2}
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    batches = take(build_population_loader(cfg))
    assert len({i for batch in batches for i, _ in batch}) == 10


def test_bad_values_are_named(cfg: CfgNode) -> None:
    cfg.TEST.PRECISE_BN.DATASETS = ("nowhere",)
    with pytest.raises(ValueError, match="TEST.PRECISE_BN.DATASETS.*nowhere.*not registered"):
        build_population_loader(cfg)
    cfg.TEST.PRECISE_BN.DATASETS = cfg.DATASETS.TRAIN
    cfg.TEST.PRECISE_BN.IMS_PER_BATCH = -2
    with pytest.raises(ValueError, match="TEST.PRECISE_BN.IMS_PER_BATCH -2"):
        build_population_loader(cfg)


def batches_on_rank(rank: int, folder: str) -> Any:
    cfg = tiny_config(register_data(folder), folder)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_population_loader(cfg)
    twice = take(loader, 5), take(loader, 5)
    cfg.TEST.PRECISE_BN.IMS_PER_BATCH = 3
    try:
        build_population_loader(cfg)
    except ValueError as error:
        return *twice, str(error)


def test_ranks_share_the_data(tmp_path: Path) -> None:
    write_data(tmp_path)
    (first, again, said), (second, _, _) = run_distributed(batches_on_rank, 2, str(tmp_path))
    assert (
        first == again
        and said == "TEST.PRECISE_BN.IMS_PER_BATCH 3 cannot be divided among 2 process(es)"
    )
    assert all(len(batch) == 2 for batch in first + second)  # of 4 on both ranks
    ids = [i for batch in first + second for i, _ in batch]
    assert sorted(ids) == sorted([*range(10)] * 2)
    ids = [i for mine, others in zip(first[:2], second[:2], strict=True) for i, _ in mine + others]
    assert len(set(ids)) == 8  # no image twice within one pass


def test_the_preprocessing_of_inference(cfg: CfgNode) -> None:
    """Table 4's last row: no augmentation, and no labels."""
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (48,), 64
    cfg.TEST.PRECISE_BN.TRANSFORMS = "test"
    batch = next(iter(build_population_loader(cfg)))
    assert all("instances" not in sample for sample in batch)
    assert all(min(sample["image"].shape[1:]) == 64 for sample in batch)
    cfg.TEST.PRECISE_BN.TRANSFORMS = "train"
    batch = next(iter(build_population_loader(cfg)))
    assert all("instances" in sample for sample in batch)
    cfg.TEST.PRECISE_BN.TRANSFORMS = "inference"
    with pytest.raises(ValueError, match=r"TRANSFORMS .*'train', 'test'.*'inference'"):
        build_population_loader(cfg)

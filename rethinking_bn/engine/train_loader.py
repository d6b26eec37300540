"""A training loader that can begin at any iteration with exactly the data that belongs there."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import GroupedBatchSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from rethinking_bn.config import check_divides
from rethinking_bn.data.domains import domain_groups, marked_training_dicts
from rethinking_bn.randomness import derive_seed, isolated_random_state

Sample = dict[str, Any]  # detectron2's dataset dict, before or after mapping
Mapper = Callable[[Sample], "Sample | None"]


class ResumableTrainLoader(Iterable[list[Sample]]):
    """This rank's endless batches, a pure function of (seed, iteration, rank).

    Images are grouped by aspect ratio from the sizes in the dataset dicts, so that fast-forward
    to an iteration loads no image; each sample's augmentation is drawn from a seed of its own, so
    that it does not depend on the number of workers either. With the same seed, the images are
    those of detectron2's loader without workers, batch by batch.
    """

    def __init__(
        self,
        dataset: list[Sample],
        mapper: Mapper,
        sampler: Sampler[int],
        batch_size: int,
        *,
        seed: int,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            dataset: detectron2's dataset dicts, with "width" and "height" if grouping is on.
            mapper: turns a dataset dict into the model's input, or into None to skip it (another
                image takes its place). Any randomness must come from the global generators.
            sampler: this rank's endless stream of indices; starts over at every ``iter()``.
            batch_size: images per rank.
            seed: of the run, equal on all ranks.
            aspect_ratio_grouping: batch wide images with wide ones, and the others together.
            num_workers: processes that load images, 0 for none.
        """
        self._samples = _SeededSamples(dataset, mapper)
        self._sampler = sampler
        self._batch_size = batch_size
        self._seed = seed
        self._groups = [
            int(aspect_ratio_grouping and sample["width"] <= sample["height"]) for sample in dataset
        ]
        self._num_workers = num_workers
        self._start = 0

    def start_at(self, iteration: int) -> None:
        """Let the next ``iter()`` begin with the batch of this iteration (counted from 0)."""
        self._start = iteration

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(
            DataLoader(
                self._samples,
                batch_sampler=_Stream(self._keys),  # type: ignore[arg-type]
                num_workers=self._num_workers,
                collate_fn=_as_list,
                # of its own, because a DataLoader's iterator draws a number when it is made
                generator=torch.Generator().manual_seed(derive_seed(self._seed)),
            )
        )

    def _keys(self) -> Iterator[list[tuple[int, int]]]:
        """Yield (seed of the sample, index of the image) for each image, batch by batch."""
        rank = comm.get_rank()
        batches = GroupedBatchSampler(self._sampler, self._groups, self._batch_size)
        for iteration, batch in itertools.islice(enumerate(batches), self._start, None):
            yield [
                (derive_seed(self._seed, iteration, rank, place), index)
                for place, index in enumerate(batch)
            ]


def build_train_loader(cfg: CfgNode, mapper: Mapper | None = None) -> Iterable[list[Sample]]:
    """Build the training loader that ``cfg`` describes, resumable if its data sets are lists.

    Data sets, filtering, sampler, grouping and workers are read by detectron2, so all its keys and
    training samplers work; with MODEL.DOMAIN_BN each image is marked with its domain. A torch
    Dataset registered in place of a list gets detectron2's own loader, which starts over when a run
    is resumed; the log warns of it.

    Args:
        cfg: ``cfg.SEED`` must be the run's seed, not negative and equal on all ranks.
        mapper: default detectron2's ``DatasetMapper(cfg, is_train=True)``.

    Raises:
        ValueError: if ``SOLVER.IMS_PER_BATCH`` cannot be divided among the ranks, or a dataset
            dict has no size to group by.
    """
    dataset = marked_training_dicts(cfg) if domain_groups(cfg) else None
    # samplers that take no seed draw one from numpy's generator
    with isolated_random_state(derive_seed(cfg.SEED)):
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)
    if not isinstance(parts["dataset"], list):
        logging.getLogger(__name__).warning(
            "%s are not lists of dicts but %s: a resumed run starts over with the data.",
            cfg.DATASETS.TRAIN,
            type(parts["dataset"]).__name__,
        )
        return build_detection_train_loader(**parts)
    world = comm.get_world_size()
    check_divides("SOLVER.IMS_PER_BATCH", parts["total_batch_size"], world)
    grouping = parts["aspect_ratio_grouping"]
    if grouping and not all("width" in d and "height" in d for d in parts["dataset"]):
        raise ValueError(
            f"{cfg.DATASETS.TRAIN} hold dicts without width or height; set "
            "DATALOADER.ASPECT_RATIO_GROUPING False"
        )
    return ResumableTrainLoader(
        parts["dataset"],
        parts["mapper"],
        parts["sampler"],
        parts["total_batch_size"] // world,
        seed=cfg.SEED,
        aspect_ratio_grouping=grouping,
        num_workers=parts["num_workers"],
    )


class _SeededSamples(Dataset[Sample]):
    """Mapped samples; the key says which image and from which seed its augmentation is drawn."""

    def __init__(self, dataset: list[Sample], mapper: Mapper) -> None:
        self._dataset = DatasetFromList(dataset, copy=False)
        self._mapper = PicklableWrapper(mapper)  # workers may be spawned, and mappers lambdas

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        seed, index = key
        with isolated_random_state(seed):
            for candidate in self._candidates(seed, index):
                sample = self._mapper(self._dataset[candidate])
                if sample is not None:
                    return sample
        raise RuntimeError(f"the mapper returned None for each of {len(self._dataset)} images")

    def _candidates(self, seed: int, index: int) -> Iterator[int]:
        yield index
        yield from torch.randperm(
            len(self._dataset), generator=torch.Generator().manual_seed(seed)
        ).tolist()


class _Stream(Sampler[Any]):
    """An iterable for DataLoader, from a function that returns an iterator."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()


def _as_list(batch: list[Sample]) -> list[Sample]:
    return batch

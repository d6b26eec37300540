"""The images of training and of population training, each a pure function of seeds."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
)
from detectron2.data.samplers import GroupedBatchSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from rethinking_bn.config import check_divides, check_has_keys, check_transforms, images_per_pass
from rethinking_bn.data.domains import domain_groups, mark, marked_training_dicts
from rethinking_bn.distributed import raise_together
from rethinking_bn.engine.load_config import scale_to_ranks
from rethinking_bn.randomness import derive_seed, isolated_random_state

logger = logging.getLogger(__name__)

Sample = dict[str, Any]  # detectron2's dataset dict, before or after mapping
Mapper = Callable[[Sample], "Sample | None"]

_ANNOTATION_KEYS = ("annotations", "sem_seg_file_name")


class ResumableTrainLoader(Iterable[list[Sample]]):
    """This rank's endless batches, a pure function of (seed, iteration, rank).

    Images are grouped by aspect ratio from the sizes in the dataset dicts, so that fast-forward
    to an iteration loads no image; each sample's augmentation is drawn from a seed of its own.
    With the same seed, the images are those of detectron2's loader without workers.
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
            dataset: detectron2's dataset dicts; without "width" and "height" nothing is grouped.
            mapper: makes a dataset dict the model's input, or None to skip it (another image takes
                its place). Any randomness must come from the global generators.
            sampler: this rank's endless stream of indices; starts over at every ``iter()``.
            batch_size: images per rank.
            seed: of the run, equal on all ranks.
            aspect_ratio_grouping, num_workers: as of detectron2's loader.
        """
        self._samples = _SeededSamples(dataset, mapper)
        self._sampler, self._batch_size = sampler, batch_size
        self._seed, self._num_workers, self._start = seed, num_workers, 0
        grouping = aspect_ratio_grouping and all("width" in d and "height" in d for d in dataset)
        if aspect_ratio_grouping and not grouping:
            logger.info("images are not grouped by aspect ratio: some have no width or height")
        self._groups = [int(grouping and d["width"] <= d["height"]) for d in dataset]

    def start_at(self, iteration: int) -> None:
        """Let the next ``iter()`` begin with the batch of this iteration (counted from 0)."""
        self._start = iteration

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(
            DataLoader(
                self._samples,
                batch_sampler=self._keys(),  # type: ignore[arg-type]  # for this one iteration
                num_workers=self._num_workers,
                collate_fn=list,
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

    All of detectron2's training samplers work; with MODEL.DOMAIN_BN each image is marked with its
    domain. A torch Dataset registered in place of a list gets detectron2's own loader, which starts
    over when a run is resumed; the log warns of it.

    Args:
        cfg: ``cfg.SEED`` must be the run's seed, not negative and equal on all ranks.
        mapper: default detectron2's ``DatasetMapper(cfg, is_train=True)``.

    Raises:
        ValueError: if ``SOLVER.IMS_PER_BATCH`` cannot be divided among the ranks.
    """
    dataset = marked_training_dicts(cfg) if domain_groups(cfg) else None
    # samplers that take no seed draw one from numpy's generator
    with isolated_random_state(derive_seed(cfg.SEED)):
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)
    images = parts["dataset"]
    if not isinstance(images, list):
        logger.warning(
            "%s are not lists of dicts but %s: a resumed run starts over with the data.",
            *(cfg.DATASETS.TRAIN, type(images).__name__),
        )
        return build_detection_train_loader(**parts)
    world = comm.get_world_size()
    check_divides("SOLVER.IMS_PER_BATCH", parts["total_batch_size"], world)
    return ResumableTrainLoader(
        images,
        parts["mapper"],
        parts["sampler"],
        parts["total_batch_size"] // world,
        seed=cfg.SEED,
        aspect_ratio_grouping=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
    )


def build_population_loader(
    cfg: CfgNode, mapper: Mapper | None = None
) -> Iterable[list[dict[str, Any]]]:
    """Build the loader that ``cfg.TEST.PRECISE_BN`` describes.

    It yields batches without end, other images on each rank. Every ``iter()`` starts over with the
    same images and augmentations: they follow from ``cfg.SEED`` (0 stands in for a negative one).

    With TRANSFORMS "test" images get those of inference, and no labels. Where a data set has no
    annotations, or only empty ones, all are unlabelled: the samples have no "instances".

    Args:
        cfg: read are TEST.PRECISE_BN, SEED, INPUT, and the filter and grouping of DATALOADER.
        mapper: from a dataset dict to the model's input; None: detectron2's DatasetMapper.

    Raises:
        ValueError: for a data set that is not registered, or no list, for a batch that cannot be
            divided among the ranks, and for other TRANSFORMS.
    """
    check_has_keys(cfg)
    keys, world = cfg.TEST.PRECISE_BN, comm.get_world_size()
    images = keys.IMS_PER_BATCH or world * images_per_pass(cfg, world)
    check_divides("TEST.PRECISE_BN.IMS_PER_BATCH", images, world)
    transforms = check_transforms(cfg)
    names = keys.DATASETS or cfg.DATASETS.TRAIN
    samples = _load(cfg, names, labelled=transforms == "train")
    seed = max(cfg.SEED, 0)
    return ResumableTrainLoader(
        samples,
        mapper or DatasetMapper(cfg, is_train=transforms == "train"),
        TrainingSampler(len(samples), seed=seed),
        images // world,
        seed=seed,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=keys.NUM_WORKERS,
    )


def build_together(cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
    """Build :func:`build_population_loader`'s loader, scaled, on every rank or on none."""
    error: Exception | None = None
    try:
        loader = build_population_loader(scale_to_ranks(cfg, comm.get_world_size()))
    except Exception as raised:
        error = raised
    raise_together(error)
    return loader


def _load(cfg: CfgNode, names: Sequence[str], *, labelled: bool) -> list[Sample]:
    """Return the dataset dicts, all with labels, if they are asked for, or all without."""
    if not names:
        raise ValueError("neither TEST.PRECISE_BN.DATASETS nor DATASETS.TRAIN names a data set")
    if unknown := {*names} - {*DatasetCatalog.list()}:
        raise ValueError(f"TEST.PRECISE_BN.DATASETS: {unknown} are not registered data sets")
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    if proposals and tuple(names) != tuple(cfg.DATASETS.TRAIN):
        raise ValueError("MODEL.LOAD_PROPOSALS has proposals for DATASETS.TRAIN alone")
    sets = {}
    for index, name in enumerate(names):
        files = [proposals[index]] if proposals else None
        # unfiltered: the filter would drop every image of a data set without annotations
        samples = get_detection_dataset_dicts([name], filter_empty=False, proposal_files=files)
        if not isinstance(samples, list):
            raise ValueError(
                f"{name} is a {type(samples).__name__}; population training needs a list of dicts"
            )
        sets[name] = mark(cfg, name, samples)
    unlabelled = [name for name, samples in sets.items() if not _has_labels(samples)]
    found = list(itertools.chain.from_iterable(sets.values()))
    if unlabelled or not labelled:
        if labelled:
            logger.info("population training without labels: %s has none", ", ".join(unlabelled))
        return [{k: v for k, v in d.items() if k not in _ANNOTATION_KEYS} for d in found]
    if "annotations" in found[0]:  # leave out what training leaves out
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            found = filter_images_with_only_crowd_annotations(found)
        least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        found = filter_images_with_few_keypoints(found, least) if least > 0 else found
    return found


def _has_labels(samples: list[Sample]) -> bool:
    """Return whether some image has ground truth, and every one at least an empty list of it."""
    everywhere = all(any(key in sample for key in _ANNOTATION_KEYS) for sample in samples)
    return everywhere and any(sample.get(key) for sample in samples for key in _ANNOTATION_KEYS)


class _SeededSamples(Dataset[Sample]):
    """Mapped samples; the key says which image and from which seed its augmentation is drawn."""

    def __init__(self, dataset: list[Sample], mapper: Mapper) -> None:
        self._dataset = DatasetFromList(dataset, copy=False)
        self._mapper = PicklableWrapper(mapper)  # workers may be spawned, and mappers lambdas

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        seed, index = key
        with isolated_random_state(seed):
            if (sample := self._mapper(self._dataset[index])) is not None:
                return sample
            generator = torch.Generator().manual_seed(seed)
            for other in torch.randperm(len(self._dataset), generator=generator).tolist():
                if (sample := self._mapper(self._dataset[other])) is not None:
                    return sample
        raise RuntimeError(f"the mapper returned None for each of {len(self._dataset)} images")

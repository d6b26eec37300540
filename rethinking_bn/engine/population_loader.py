"""The images of population training: seeded, the same at every start, labelled or not."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, get_detection_dataset_dicts
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from rethinking_bn.config import check_divides, check_transforms, images_per_pass
from rethinking_bn.data.domains import mark
from rethinking_bn.distributed import raise_together
from rethinking_bn.engine.load_config import scale_to_ranks
from rethinking_bn.engine.train_loader import Mapper, ResumableTrainLoader, Sample

logger = logging.getLogger(__name__)

_ANNOTATION_KEYS = ("annotations", "sem_seg_file_name")


def build_population_loader(
    cfg: CfgNode, mapper: Mapper | None = None
) -> Iterable[list[dict[str, Any]]]:
    """Build the loader that ``cfg.TEST.PRECISE_BN`` describes.

    It yields batches without end, sampled without replacement within each pass over the data,
    other images on each rank. Every ``iter()`` starts over with the same images and the same
    augmentations: they follow from ``cfg.SEED`` (0 stands in for a negative one), whatever the
    number of workers, and neither read nor move the global random generators.

    Images get the training transforms, or those of inference if TEST.PRECISE_BN.TRANSFORMS is
    "test", which leaves labels out, and are grouped by aspect ratio as in training. Data sets
    without annotations, or with nothing but empty ones, are unlabelled: the samples then have no
    "instances", and the model is to run in eval mode. One unlabelled data set among several makes
    all of them unlabelled.

    Args:
        cfg: read are TEST.PRECISE_BN.DATASETS (empty: DATASETS.TRAIN), IMS_PER_BATCH (on all ranks
            together; 0: those of one pass of training), NUM_WORKERS (per rank), TRANSFORMS, SEED,
            INPUT, and the filter and grouping of DATALOADER.
        mapper: from a dataset dict to the model's input; None: detectron2's DatasetMapper, for
            training or inference as TRANSFORMS says.

    Raises:
        ValueError: for a data set that is not registered, or that cannot be indexed, for a batch
            that cannot be divided among the ranks, and for other TRANSFORMS.
    """
    names = _read(cfg, "DATASETS", ()) or cfg.DATASETS.TRAIN
    images, workers = _read(cfg, "IMS_PER_BATCH", 0), _read(cfg, "NUM_WORKERS", 0)
    world = comm.get_world_size()
    images = images or world * images_per_pass(cfg, world)
    check_divides("TEST.PRECISE_BN.IMS_PER_BATCH", images, world)
    transforms = check_transforms(cfg)
    samples = _load(cfg, names, labelled=transforms == "train")
    seed = max(cfg.SEED, 0)
    return ResumableTrainLoader(
        samples,
        mapper or DatasetMapper(cfg, is_train=transforms == "train"),
        TrainingSampler(len(samples), seed=seed),
        images // world,
        seed=seed,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING
        and all("width" in sample and "height" in sample for sample in samples),
        num_workers=workers,
    )


def build_together(cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
    """Build :func:`build_population_loader`'s loader on every rank, or on none: a collective.

    For as many processes as there are: SOLVER.REFERENCE_WORLD_SIZE scales it, as in training.
    """
    error: Exception | None = None
    loader: Iterable[list[dict[str, Any]]] = ()
    try:
        loader = build_population_loader(scale_to_ranks(cfg, comm.get_world_size()))
    except Exception as raised:
        error = raised
    raise_together(error)
    return loader


def _read(cfg: CfgNode, key: str, default: Any) -> Any:
    """Read one of our keys; configs of other projects may lack it."""
    return cfg.TEST.PRECISE_BN.get(key, default)


def _load(cfg: CfgNode, names: Sequence[str], *, labelled: bool) -> list[Sample]:
    """Return the dataset dicts, all with labels, if they are asked for, or all without."""
    if not names:
        raise ValueError("neither TEST.PRECISE_BN.DATASETS nor DATASETS.TRAIN names a data set")
    unknown = [name for name in names if name not in DatasetCatalog.list()]
    if unknown:
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
    if labelled and not unlabelled:
        return _filtered(cfg, itertools.chain.from_iterable(sets.values()))
    if labelled:
        logger.info("population training without labels: %s has none", ", ".join(unlabelled))
    return [
        {key: value for key, value in sample.items() if key not in _ANNOTATION_KEYS}
        for sample in itertools.chain.from_iterable(sets.values())
    ]


def _has_labels(samples: list[Sample]) -> bool:
    """Return whether some image has ground truth, and every one at least an empty list of it."""
    everywhere = all(any(key in sample for key in _ANNOTATION_KEYS) for sample in samples)
    return everywhere and any(sample.get(key) for sample in samples for key in _ANNOTATION_KEYS)


def _filtered(cfg: CfgNode, samples: Iterable[Sample]) -> list[Sample]:
    """Leave out the images that training leaves out."""
    kept = list(samples)
    if "annotations" not in kept[0]:
        return kept
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        kept = filter_images_with_only_crowd_annotations(kept)
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    return filter_images_with_few_keypoints(kept, least) if least > 0 else kept

"""Groups of data sets as domains (MODEL.DOMAIN_BN.DATASETS): reading them, marking images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from rethinking_bn._detectron2 import require_detectron2

require_detectron2("rethinking_bn.data.domains")

from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import (  # noqa: E402
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import check_metadata_consistency  # noqa: E402

Sample = dict[str, Any]  # detectron2's dataset dict, before or after mapping

#: an image's domain in its dataset dict and in the model's input
DOMAIN = "domain"


def domain_groups(cfg: CfgNode) -> tuple[tuple[str, ...], ...]:
    """Return the names of the data sets of each domain; () without domains.

    Raises:
        ValueError: for what is not a list of lists of names, a group without a name, or a name in
            two groups.
    """
    groups = cfg.MODEL.get("DOMAIN_BN", {}).get("DATASETS", ())  # absent in other projects
    key = f"MODEL.DOMAIN_BN.DATASETS {list(groups)}"
    names: list[str] = []
    for group in groups:
        if not isinstance(group, (list, tuple)) or {*map(type, group)} != {str}:
            raise ValueError(f"{key} must be a list of groups, each a list of data set names")
        names += group
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{key} names {name!r} twice: a data set has one domain")
    return tuple(tuple(group) for group in groups)


def domain_of(cfg: CfgNode, name: str) -> int:
    """Return the domain of a data set; a ValueError when it is in no group."""
    groups = domain_groups(cfg)
    for domain, group in enumerate(groups):
        if name in group:
            return domain
    raise ValueError(
        f"data set {name!r} is in no group of MODEL.DOMAIN_BN.DATASETS {groups}: add it to one"
    )


def mark(cfg: CfgNode, name: str, samples: list[Sample]) -> list[Sample]:
    """Return a data set's dicts with their domain, or as they are without domains.

    detectron2's DatasetMapper keeps it, as every mapper does that passes on what it does not know.
    """
    if not domain_groups(cfg):
        return samples
    domain = domain_of(cfg, name)
    return [{**sample, DOMAIN: domain} for sample in samples]


def marked_training_dicts(cfg: CfgNode) -> list[Sample]:
    """Return what ``build_detection_train_loader(cfg, dataset=...)`` takes: DATASETS.TRAIN, marked.

    Raises:
        ValueError: for a data set that is in no group, or is no list.
    """
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    marked: list[Sample] = []
    for index, name in enumerate(cfg.DATASETS.TRAIN):
        samples = get_detection_dataset_dicts(
            [name],
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=least,
            proposal_files=proposals and [proposals[index]],
        )
        if not isinstance(samples, list):
            raise ValueError(
                f"{name} is a {type(samples).__name__}, but MODEL.DOMAIN_BN needs lists of dicts"
            )
        marked += mark(cfg, name, samples)
    check_metadata_consistency("thing_classes", cfg.DATASETS.TRAIN)
    return marked


def _map(mapper: Callable[[Sample], Sample | None], domain: int, sample: Sample) -> Sample | None:
    """Map a dataset dict to the model's input, and say its domain there."""
    mapped = mapper(sample)
    return None if mapped is None else {**mapped, DOMAIN: domain}


def build_test_loader(cfg: CfgNode, name: str) -> Iterable[list[Sample]]:
    """Build detectron2's loader of a test set, marking the images if there are domains."""
    if not domain_groups(cfg):
        return build_detection_test_loader(cfg, name)
    mapper = partial(_map, DatasetMapper(cfg, is_train=False), domain_of(cfg, name))
    return build_detection_test_loader(cfg, name, mapper=mapper)

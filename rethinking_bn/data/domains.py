"""Groups of data sets as domains (MODEL.DOMAIN_BN.DATASETS): reading them, marking images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    for group in groups:
        if not isinstance(group, (list, tuple)) or not all(isinstance(n, str) for n in group):
            raise ValueError(f"{key} must be a list of groups, each a list of data set names")
        if not group:
            raise ValueError(f"{key} has an empty group")
    names = [name for group in groups for name in group]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{key} names {name!r} twice: a data set has one domain")
    return tuple(tuple(group) for group in groups)


def domain_of(cfg: CfgNode, name: str) -> int:
    """Return the domain of a data set.

    Raises:
        ValueError: when it is in no group.
    """
    for domain, group in enumerate(domain_groups(cfg)):
        if name in group:
            return domain
    raise ValueError(
        f"data set {name!r} is in no group of MODEL.DOMAIN_BN.DATASETS "
        f"{[list(group) for group in domain_groups(cfg)]}: add it to the domain it is to be "
        "normalised as"
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
    marked: list[Sample] = []
    for index, name in enumerate(cfg.DATASETS.TRAIN):
        samples = get_detection_dataset_dicts(
            [name],
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=least,
            proposal_files=[cfg.DATASETS.PROPOSAL_FILES_TRAIN[index]]
            if cfg.MODEL.LOAD_PROPOSALS
            else None,
        )
        if not isinstance(samples, list):
            raise ValueError(
                f"{name} is a {type(samples).__name__}, but MODEL.DOMAIN_BN needs lists of dicts"
            )
        marked += mark(cfg, name, samples)
    check_metadata_consistency("thing_classes", cfg.DATASETS.TRAIN)
    return marked


class DomainMapper:
    """A mapper whose images are of one domain.

    Args:
        domain: of all images.
        mapper: turns a dataset dict into the model's input.
    """

    def __init__(self, domain: int, mapper: Callable[[Sample], Sample | None]) -> None:
        self.domain, self.mapper = domain, mapper

    def __call__(self, sample: Sample) -> Sample | None:
        mapped = self.mapper(sample)
        return None if mapped is None else {**mapped, DOMAIN: self.domain}


def build_test_loader(cfg: CfgNode, name: str) -> Iterable[list[Sample]]:
    """Build detectron2's loader of a test set, marking the images if there are domains."""
    if not domain_groups(cfg):
        return build_detection_test_loader(cfg, name)
    mapper = DomainMapper(domain_of(cfg, name), DatasetMapper(cfg, is_train=False))
    return build_detection_test_loader(cfg, name, mapper=mapper)

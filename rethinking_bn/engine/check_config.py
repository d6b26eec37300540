"""What is wrong with a run by its config and data sets alone, each a one-line error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import chain, product
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet

from rethinking_bn.config import (
    check_divides,
    check_statistics,
    check_thaw,
    check_transforms,
    images_per_pass,
    needs_population_loader,
)
from rethinking_bn.data.domains import domain_groups, domain_of
from rethinking_bn.data.register import ShapesMetadata, read_classes
from rethinking_bn.engine.load_config import scale_to_ranks
from rethinking_bn.engine.weight_average import average_options


def check_values(cfg: CfgNode, ranks: int, *, training: bool = True) -> None:
    """Raise a ValueError for a value that its key cannot have, by itself or beside others."""
    estimates = needs_population_loader(cfg, training=training)
    least = {"SOLVER.CHECKPOINT_PERIOD": 1, "DATALOADER.NUM_WORKERS": 0}
    least["TEST.PRECISE_BN.NUM_WORKERS"] = 0
    if estimates:
        least["TEST.PRECISE_BN.NUM_ITER"] = 1
    if training:
        least |= {"SOLVER.MAX_ITER": 1, "SOLVER.BASE_LR": 0, "TEST.DIAGNOSE.PERIOD": 0}
    for key, bound in least.items():
        value = _leaf(cfg, key)
        if not bound <= value < math.inf:
            more = "; --eval-only evaluates without training" if "MAX_ITER" in key else ""
            raise ValueError(f"{key} must be at least {bound}, got {value}{more}")
    if cfg.SEED >= 2**32 - ranks:  # numpy's generators take 32 bits, and each rank another seed
        raise ValueError(f"SEED must be below 2 ** 32 - {ranks}, or negative, got {cfg.SEED}")
    needed = {"OUTPUT_DIR": cfg.OUTPUT_DIR}
    if training or estimates:
        needed["INPUT.MIN_SIZE_TRAIN"] = cfg.INPUT.MIN_SIZE_TRAIN
    for name in ("SIZES", "ASPECT_RATIOS"):
        anchors = cfg.MODEL.ANCHOR_GENERATOR[name]
        needed[f"MODEL.ANCHOR_GENERATOR.{name}"] = anchors and all(
            level or isinstance(level, (int, float)) for level in anchors
        )
    for key, filled in needed.items():
        if not filled:
            raise ValueError(f"{key} is empty")
    prior = cfg.MODEL.RETINANET.PRIOR_PROB
    if not 0 < prior < 1:
        raise ValueError(f"MODEL.RETINANET.PRIOR_PROB must be above 0 and below 1, got {prior}")
    check_statistics(cfg)
    check_transforms(cfg)
    check_batch_size(cfg, ranks, training=training)
    if training:
        number = cfg.TEST.PRECISE_BN.NUM_ITER
        if cfg.TEST.DIAGNOSE.PERIOD and number < 2:
            raise ValueError(
                f"TEST.DIAGNOSE.PERIOD {cfg.TEST.DIAGNOSE.PERIOD} needs at least 2 batches, but "
                f"TEST.PRECISE_BN.NUM_ITER is {number}"
            )
        check_thaw(cfg)
        check_freezing(cfg, ranks)
        average_options(cfg)


def check_device(cfg: CfgNode) -> None:
    """Raise a ValueError for a MODEL.DEVICE that is not here; CUDA without a GPU is the CPU."""
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"MODEL.DEVICE {name!r} is no device here; take cuda or cpu") from error
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and gpus and (device.index or 0) >= gpus:
        raise ValueError(f"MODEL.DEVICE {name!r}: this machine has {gpus} GPU(s), from cuda:0 on")


def check_freezing(cfg: CfgNode, ranks: int) -> None:
    """Raise a ValueError if SOLVER.FREEZE_BN.START is no iteration of the run, nor -1."""
    solver = scale_to_ranks(cfg, ranks).SOLVER
    start = solver.FREEZE_BN.START
    if start < -1 or start >= solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.FREEZE_BN.START {start} is neither an iteration in [0, {solver.MAX_ITER}) "
            "(SOLVER.MAX_ITER) nor -1 (never)"
        )


def check_batch_size(cfg: CfgNode, ranks: int, *, training: bool = True) -> None:
    """Raise a ValueError unless images divide into ranks, passes and normalisation batches."""
    cfg = scale_to_ranks(cfg, ranks)
    is_estimated = needs_population_loader(cfg, training=training)
    estimates = cfg.TEST.PRECISE_BN.IMS_PER_BATCH if is_estimated else 0
    sizes = {}  # (on all ranks, per forward on one rank)
    if training or (is_estimated and not estimates):
        images = images_per_pass(cfg, ranks)
        sizes["SOLVER.IMS_PER_BATCH"] = (cfg.SOLVER.IMS_PER_BATCH, images)
    if estimates:
        key = "TEST.PRECISE_BN.IMS_PER_BATCH"
        check_divides(key, estimates, ranks)
        sizes[key] = (estimates, estimates // ranks)
    for part, (key, (size, images)) in product(("BACKBONE", "ROI_HEADS"), sizes.items()):
        together = cfg.MODEL[part].NORM_IMAGES
        if together > 0 and images % together:
            raise ValueError(
                f"MODEL.{part}.NORM_IMAGES {together} does not divide the {images} images per "
                f"process and pass ({key} {size}, {ranks} process(es))"
            )


def check_data_sets(cfg: CfgNode, *, training: bool = True) -> None:
    """Check that the data sets of a run are registered, and on disk unless they are generated.

    Raises:
        ValueError: for a name that is not registered, or that is in no group of
            MODEL.DOMAIN_BN.DATASETS where there are some; for more classes than the model has.
        FileNotFoundError: saying where the data set was looked for, and what moves that place.
    """
    names = list(cfg.DATASETS.TEST)
    if training:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty")
        names += cfg.DATASETS.TRAIN
    labelled = list(names)
    if needs_population_loader(cfg, training=training):
        names += cfg.TEST.PRECISE_BN.DATASETS or cfg.DATASETS.TRAIN
    groups = domain_groups(cfg)
    for name in names if groups else ():
        domain_of(cfg, name)
    for name in (*names, *chain.from_iterable(groups)):
        known = DatasetCatalog.list()
        if name not in known:
            close = get_close_matches(name, known, n=5)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ValueError(f"no data set is registered as {name!r}{hint}")
        metadata = MetadataCatalog.get(name)
        if name not in names or isinstance(metadata, ShapesMetadata):  # generated on first use
            continue
        for attribute in ("json_file", "image_root"):
            path = metadata.get(attribute, "")
            if path and "://" not in path and not os.path.exists(path):
                folder = os.environ.get("DETECTRON2_DATASETS", "datasets")
                raise FileNotFoundError(
                    f"data set {name!r} is missing: looked for {os.path.abspath(path)}; the "
                    f"variable DETECTRON2_DATASETS (now {folder!r}) says where data sets are"
                )
    for name, key, classes, there in _class_counts(cfg, labelled):
        if classes < there:
            raise ValueError(f"{key} {classes} is less than the {there} classes of {name!r}")


def warnings_of(cfg: CfgNode, *, training: bool, resumes: bool) -> Iterator[str]:
    """Yield what is likely to be a mistake but may be meant, a sentence each."""
    names = dict.fromkeys((*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if training else ())))
    for name, key, classes, there in _class_counts(cfg, list(names)):
        if classes > there:
            yield f"{key} is {classes}, but {name!r} has {there} classes: the others never occur"
    keys = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.RETINANET.NORM")
    frozen = [f"{key} FrozenBN" for key in keys if _leaf(cfg, key) == "FrozenBN"]
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        frozen.append(f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}")
    if training and frozen and not resumes and not cfg.MODEL.WEIGHTS:
        yield (
            f"MODEL.WEIGHTS is empty, so what {' and '.join(frozen)} freeze stays at its random "
            "initialisation: set MODEL.WEIGHTS, or FREEZE_AT 0 and another norm"
        )


def _class_counts(cfg: CfgNode, names: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """Yield (data set, key, the model's classes, the data's) where both are known."""
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else object
    if issubclass(architecture, RetinaNet):
        key = "MODEL.RETINANET.NUM_CLASSES"
    elif issubclass(architecture, GeneralizedRCNN):
        key = "MODEL.ROI_HEADS.NUM_CLASSES"
    else:
        return
    for name in names:
        metadata = MetadataCatalog.get(name)
        classes = metadata.get("thing_classes")
        if metadata.get("coco_format") and "://" not in metadata.json_file:
            classes = read_classes(name, evaluated=name in cfg.DATASETS.TEST)  # checks it, too
        elif classes is None:  # until detectron2 has read the file
            with suppress(OSError, ValueError, TypeError, KeyError):
                with open(metadata.get("json_file", ""), encoding="utf-8") as file:
                    classes = json.load(file)["categories"]
        if classes:
            yield name, key, _leaf(cfg, key), len(classes)


def _leaf(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg

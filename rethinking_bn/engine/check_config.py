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
from rethinking_bn.engine.load_config import flat, scale_to_ranks


def check_values(cfg: CfgNode, ranks: int, *, training: bool = True) -> None:
    """Raise a ValueError for a value that its key cannot have, by itself or beside others."""
    values, estimates = flat(cfg), needs_population_loader(cfg, training=training)

    def at_least(bound: int, key: str, more: str = "") -> tuple[str, Any, str]:
        return key, bound <= values[key] < math.inf, f"be at least {bound}{more}"

    rows = [  # key, whether its value is good, what it must
        at_least(1, "SOLVER.CHECKPOINT_PERIOD"),
        at_least(0, "DATALOADER.NUM_WORKERS"),
        at_least(0, "TEST.PRECISE_BN.NUM_WORKERS"),
        # numpy's generators take 32 bits, and each rank another seed
        ("SEED", cfg.SEED < 2**32 - ranks, f"be below 2 ** 32 - {ranks}, or negative"),
        ("MODEL.RETINANET.PRIOR_PROB", 0 < cfg.MODEL.RETINANET.PRIOR_PROB < 1, "be in (0, 1)"),
        ("OUTPUT_DIR", cfg.OUTPUT_DIR, "not be empty"),
    ]
    for key in ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"):
        filled = all(level or isinstance(level, (int, float)) for level in values[key])
        rows.append((key, values[key] and filled, "not be empty"))
    if training or estimates:
        rows.append(("INPUT.MIN_SIZE_TRAIN", cfg.INPUT.MIN_SIZE_TRAIN, "not be empty"))
    if training:
        iterations = scale_to_ranks(cfg, ranks).SOLVER.MAX_ITER
        start = cfg.SOLVER.FREEZE_BN.START
        rows += [
            at_least(1, "SOLVER.MAX_ITER", "; --eval-only evaluates without training"),
            at_least(0, "SOLVER.BASE_LR"),
            at_least(0, "TEST.DIAGNOSE.PERIOD"),
            ("SOLVER.FREEZE_BN.START", -1 <= start < iterations, f"be -1 or in [0, {iterations})"),
        ]
    if estimates:
        diagnoses = training and cfg.TEST.DIAGNOSE.PERIOD
        rows.append(at_least(2 if diagnoses else 1, "TEST.PRECISE_BN.NUM_ITER"))
    for key, is_good, must in rows:
        if not is_good:
            raise ValueError(f"{key} must {must}, got {values[key]!r}")
    check_statistics(cfg)
    check_transforms(cfg)
    check_batch_size(cfg, ranks, training=training)
    if training:
        check_thaw(cfg)


def check_device(cfg: CfgNode, local_ranks: int) -> None:
    """Raise a ValueError unless MODEL.DEVICE is here; CUDA without a GPU stands for the CPU."""
    name, gpus = cfg.MODEL.DEVICE, torch.cuda.device_count()
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"MODEL.DEVICE {name!r} is no device here; take cuda or cpu") from error
    asked = max(local_ranks, (device.index or 0) + 1)
    if device.type == "cuda" and 0 < gpus < asked:
        raise ValueError(f"{asked} GPUs asked for, but this machine has {gpus}")


def check_batch_size(cfg: CfgNode, ranks: int, *, training: bool = True) -> None:
    """Raise a ValueError unless images divide into ranks, passes and normalisation batches."""
    cfg = scale_to_ranks(cfg, ranks)
    is_estimated = needs_population_loader(cfg, training=training)
    key = "TEST.PRECISE_BN.IMS_PER_BATCH"
    estimates = cfg.TEST.PRECISE_BN.IMS_PER_BATCH if is_estimated else 0
    sizes = {}  # images per forward on one rank
    if training or (is_estimated and not estimates):
        sizes["SOLVER.IMS_PER_BATCH"] = images_per_pass(cfg, ranks)
    if estimates:
        check_divides(key, estimates, ranks)
        sizes[key] = estimates // ranks
    for part, (key, images) in product(("BACKBONE", "ROI_HEADS"), sizes.items()):
        together = cfg.MODEL[part].NORM_IMAGES
        if together > 0 and images % together:
            raise ValueError(
                f"MODEL.{part}.NORM_IMAGES {together} does not divide the {images} images per "
                f"process and pass ({key} {flat(cfg)[key]}, {ranks} process(es))"
            )


def check_data_sets(cfg: CfgNode, *, training: bool = True) -> None:
    """Check that the data sets of a run are registered, and on disk unless they are generated.

    Raises:
        ValueError: for a name that is not registered or without a domain where there are domains;
            for more classes than the model has.
        FileNotFoundError: saying where the data set was looked for, and what moves that place.
    """
    if training and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty")
    labelled = [*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if training else ())]
    names = list(labelled)
    if needs_population_loader(cfg, training=training):
        names += cfg.TEST.PRECISE_BN.DATASETS or cfg.DATASETS.TRAIN
    groups, known = domain_groups(cfg), DatasetCatalog.list()
    for name in names if groups else ():
        domain_of(cfg, name)
    for name in (*names, *chain.from_iterable(groups)):
        if name not in known:
            close = get_close_matches(name, known, n=5)
            hint = f"; close names: {', '.join(close)}" if close else ""
            raise ValueError(f"no data set is registered as {name!r}{hint}")
        metadata = MetadataCatalog.get(name)
        if name not in names or isinstance(metadata, ShapesMetadata):  # generated on first use
            continue
        for path in (metadata.get("json_file", ""), metadata.get("image_root", "")):
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
    frozen = [
        f"MODEL.{part}.NORM FrozenBN"
        for part in ("RESNETS", "FPN", "RETINANET")
        if cfg.MODEL[part].NORM == "FrozenBN"
    ]
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
    kinds = {"RETINANET": RetinaNet, "ROI_HEADS": GeneralizedRCNN}
    part = next((part for part, kind in kinds.items() if issubclass(architecture, kind)), "")
    names = names if part else []
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
            yield name, f"MODEL.{part}.NUM_CLASSES", cfg.MODEL[part].NUM_CLASSES, len(classes)

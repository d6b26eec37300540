"""What can be found wrong with a run before it starts, each a one-line ValueError or OSError."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from itertools import chain, product
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_backbone, build_model
from detectron2.utils import comm
from torch import nn

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
from rethinking_bn.distributed import raise_together
from rethinking_bn.engine.load_config import load_config, scale_to_ranks, use_available_device
from rethinking_bn.engine.starting_weights import (
    check_loading,
    check_teacher,
    check_weights,
)
from rethinking_bn.engine.unread_keys import check_keys_are_read
from rethinking_bn.engine.weight_average import average_options
from rethinking_bn.files import check_unlocked, locked_folder, probe_folder
from rethinking_bn.layers import MABN2d
from rethinking_bn.modeling.domains import check_architecture
from rethinking_bn.population import train_only


def check_run(args: argparse.Namespace, local_ranks: int, ranks: int) -> CfgNode:
    """Check a command line, without starting a process or building what takes long.

    OUTPUT_DIR is made and probed when everything else is right; before, nothing is written.

    Args:
        args: as :func:`rethinking_bn.engine.launch.argument_parser` reads them. ``diagnosing``
            True: the run reads the images of population training and of the data set ``target``
            ("": none), and no test set.
        local_ranks: processes on this machine.
        ranks: processes on all machines.

    Returns:
        the config, not frozen, with ``MODEL.DEVICE`` cpu if no GPU is visible.

    Raises:
        ValueError, OSError: naming what is wrong and what is allowed, in one line.
    """
    cfg = load_config(args.config_file, args.opts, imports=args.imports)
    use_available_device(cfg)
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and local_ranks > gpus:
        raise ValueError(f"{local_ranks} GPUs asked for, but this machine has {gpus}")
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise ValueError(
            f"SOLVER.CHECKPOINT_PERIOD must be at least 1, got {cfg.SOLVER.CHECKPOINT_PERIOD}"
        )
    training = not args.eval_only
    if getattr(args, "diagnosing", False):
        cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, args.batches
        cfg.DATASETS.TEST = (args.target,) if args.target else ()
    if needs_population_loader(cfg, training=training) and cfg.TEST.PRECISE_BN.NUM_ITER < 1:
        raise ValueError(
            f"TEST.PRECISE_BN.NUM_ITER must be at least 1, got {cfg.TEST.PRECISE_BN.NUM_ITER}"
        )
    if training:
        _check_diagnosis(cfg)
    check_statistics(cfg)
    if cfg.SOLVER.MAX_ITER < 1 and training:
        raise ValueError(
            f"SOLVER.MAX_ITER must be at least 1, got {cfg.SOLVER.MAX_ITER}; --eval-only evaluates "
            "without training"
        )
    check_transforms(cfg)
    if training:
        check_thaw(cfg)
    check_keys_are_read(cfg)
    check_batch_size(cfg, ranks, training=training)
    if training:
        check_freezing(cfg, ranks)
    path = check_weights(cfg, resume=args.resume, training=training)
    check_data_sets(cfg, training=training)
    if training:
        check_teacher(cfg)
        average_options(cfg)
    model = check_model(cfg, ranks, training=training)
    check_loading(cfg, model or nn.Module(), path, training=training)
    if training and model is not None:
        apply_train_only(cfg, model)
    if "://" not in cfg.OUTPUT_DIR:
        if training:
            check_unlocked(cfg.OUTPUT_DIR, "OUTPUT_DIR")
        probe_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")  # last: it makes the folder
    return cfg


def _check_diagnosis(cfg: CfgNode) -> None:
    period, batches = cfg.TEST.DIAGNOSE.PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
    if period < 0:
        raise ValueError(f"TEST.DIAGNOSE.PERIOD must be at least 1, or 0 (never), got {period}")
    if period and batches < 2:
        raise ValueError(
            f"TEST.DIAGNOSE.PERIOD {period} needs at least 2 batches, but TEST.PRECISE_BN.NUM_ITER "
            f"is {batches}"
        )


@contextmanager
def hold_output_dir(cfg: CfgNode) -> Iterator[None]:
    """Let rank 0 make OUTPUT_DIR and hold it against another training, on every rank or on none.

    Raises:
        OSError: where rank 0 cannot; RuntimeError on the other ranks.
    """
    with ExitStack() as stack:
        error: OSError | None = None
        if comm.is_main_process() and "://" not in cfg.OUTPUT_DIR:
            try:
                os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
                stack.enter_context(locked_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR"))
            except OSError as caught:
                error = caught
        raise_together(error)
        yield


def check_freezing(cfg: CfgNode, ranks: int) -> None:
    """Raise a ValueError if SOLVER.FREEZE_BN.START is no iteration of the run, nor -1."""
    solver = scale_to_ranks(cfg, ranks).SOLVER
    start = solver.FREEZE_BN.START
    if start < -1 or start >= solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.FREEZE_BN.START {start} is neither an iteration in [0, {solver.MAX_ITER}) "
            "(SOLVER.MAX_ITER) nor -1 (never)"
        )


def apply_train_only(cfg: CfgNode, model: nn.Module) -> None:
    """Leave gradients to what SOLVER.TRAIN_ONLY names alone; a ValueError names that key."""
    if cfg.SOLVER.TRAIN_ONLY:
        try:
            train_only(model, cfg.SOLVER.TRAIN_ONLY)
        except ValueError as error:
            said = str(error).removeprefix("train_only: ")
            raise ValueError(f"SOLVER.TRAIN_ONLY: {said}") from error


def check_batch_size(cfg: CfgNode, ranks: int, *, training: bool = True) -> None:
    """Raise a ValueError unless the images of an iteration can be divided among the ranks, those
    of a rank among its passes, and those of a pass into normalisation batches."""
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
        ValueError: for a name that is not registered, in a group of MODEL.DOMAIN_BN.DATASETS,
            too (close names are listed); for a data set that is in no group where there are some.
        FileNotFoundError: saying where the data set was looked for, and what moves that place.
    """
    names = list(cfg.DATASETS.TEST)
    if training:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty")
        names += cfg.DATASETS.TRAIN
    if needs_population_loader(cfg, training=training):
        names += cfg.TEST.PRECISE_BN.DATASETS or cfg.DATASETS.TRAIN
    described = [entry[0] for entry in cfg.DATASETS.get("COCO_FORMAT", ())]
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
        if name in described and "://" not in metadata.json_file:
            read_classes(name)


def check_model(cfg: CfgNode, ranks: int = 1, *, training: bool = True) -> nn.Module | None:
    """Raise a ValueError if the model's keys contradict each other or name what is not there.

    The model is built for that, on torch's meta device: without memory or initialisation.

    Args:
        cfg: not modified.
        ranks: processes of the run, for norm layers that must know the images of each.
        training: whether the run trains.

    Returns:
        that model; None for one that cannot be built there.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    check_architecture(cfg)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_model(cfg)
    except (ValueError, KeyError) as error:
        said = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(_explained(cfg, said) if isinstance(error, KeyError) else said) from error
    except (NotImplementedError, RuntimeError):
        # a model that computes with values while it is built cannot be checked this way
        return None
    if training and any(isinstance(module, MABN2d) for module in model.modules()):
        _check_mabn_batch(cfg, ranks)
    return model


def _explained(cfg: CfgNode, name: str) -> str:
    """Say which keys hold a name that detectron2 has not found, and what there is."""
    places = [
        f"{key} {value!r}"
        for key, value in _leaves(cfg.MODEL, "MODEL.")
        if value == name or (isinstance(value, (list, tuple)) and name in value)
    ]
    if not places:
        return name
    if all(".NORM " in place for place in places):
        there = (
            "detectron2's parts know BN, SyncBN, FrozenBN, GN and LN; for another norm set "
            "MODEL.RETINANET.HEAD_NAME, MODEL.ROI_BOX_HEAD.NAME, MODEL.ROI_MASK_HEAD.NAME or "
            "MODEL.BACKBONE.NAME to a part of this package"
        )
    else:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                features = ", ".join(build_backbone(cfg).output_shape())
        except Exception:  # it is the backbone itself that does not find the name
            features = "others"
        there = f"{cfg.MODEL.BACKBONE.NAME} has {features}"
    return f"there is no {name!r}, which {' and '.join(places)} ask for; {there}"


def _leaves(cfg: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _check_mabn_batch(cfg: CfgNode, ranks: int) -> None:
    if cfg.MODEL.MABN.BATCH_SIZE:
        return  # building has checked it
    simulated = cfg.MODEL.MABN.SIMULATED_BATCH_SIZE
    cfg = scale_to_ranks(cfg, ranks)
    images = images_per_pass(cfg, ranks)
    if simulated < 1 or simulated % images:
        raise ValueError(
            f"MODEL.MABN.SIMULATED_BATCH_SIZE {simulated} is not a multiple of the {images} images "
            f"per process and pass (SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}, {ranks} "
            f"process(es), SOLVER.ACCUMULATION_STEPS {cfg.SOLVER.get('ACCUMULATION_STEPS', 1)})"
        )

"""What can be found wrong with a run before it starts: its command line, model and weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.config import images_per_pass
from rethinking_bn.distributed import raise_together
from rethinking_bn.engine.check_config import check_data_sets, check_device, check_values
from rethinking_bn.engine.load_config import (
    changed,
    flat,
    load_config,
    one_line,
    scale_to_ranks,
    use_available_device,
)
from rethinking_bn.engine.unread_keys import check_keys_are_read
from rethinking_bn.engine.weight_average import WeightAverage
from rethinking_bn.files import check_unlocked, locked_folder, probe_folder
from rethinking_bn.layers import MABN2d
from rethinking_bn.modeling.distilled import teacher_config
from rethinking_bn.modeling.domains import check_architecture
from rethinking_bn.population import train_only


def check_run(args: argparse.Namespace, local_ranks: int, ranks: int) -> CfgNode:
    """Check a command line, without starting a process or building what takes long.

    OUTPUT_DIR is made when everything else is right; before, nothing is written.

    Args:
        args: of a tool. ``diagnosing`` True: the run reads the images of population training and
            of the data set ``target`` ("": none), and no test set.
        local_ranks, ranks: processes on this machine and on all.

    Returns:
        the config, not frozen, with ``MODEL.DEVICE`` cpu if no GPU is visible.

    Raises:
        ValueError, OSError: naming what is wrong and what is allowed, in one line.
    """
    cfg = load_config(args.config_file, args.opts, imports=args.imports)
    check_device(cfg, local_ranks)
    use_available_device(cfg)
    training = not args.eval_only
    if getattr(args, "diagnosing", False):
        cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, args.batches
        cfg.DATASETS.TEST = (args.target,) if args.target else ()
    check_keys_are_read(cfg)
    check_values(cfg, ranks, training=training)
    check_data_sets(cfg, training=training)
    path = check_weights(cfg, resume=args.resume, training=training)
    if training:
        check_teacher(cfg)
    model = check_model(cfg, ranks, training=training)
    check_loading(cfg, model or nn.Module(), path, training=training)
    if training and model is not None:
        WeightAverage.from_config(cfg, model, list)
        if cfg.SOLVER.TRAIN_ONLY:
            train_only(model, cfg.SOLVER.TRAIN_ONLY)
    if "://" not in cfg.OUTPUT_DIR:
        if training:
            check_unlocked(cfg.OUTPUT_DIR, "OUTPUT_DIR")
        probe_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")  # last: it makes the folder
    return cfg


@contextmanager
def hold_output_dir(cfg: CfgNode) -> Iterator[None]:
    """Let rank 0 make OUTPUT_DIR and hold it against another training, or raise on all ranks."""
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


def check_model(cfg: CfgNode, ranks: int = 1, *, training: bool = True) -> nn.Module | None:
    """Return the model on torch's meta device, without memory; None if it cannot be built there.

    Raises:
        ValueError: if its keys contradict each other or name what is not there.
    """
    check_architecture(cfg)
    cfg = changed(cfg, "MODEL.DEVICE", "meta")
    cfg = scale_to_ranks(cfg, ranks) if training else cfg
    try:
        with _nothing_computed():
            model = build_model(cfg)
    except KeyError as error:
        raise ValueError(_explained(cfg, one_line(error.args[0]))) from error
    except ValueError as error:
        raise ValueError(one_line(error)) from error
    except (NotImplementedError, RuntimeError):
        # a model that computes with values while it is built cannot be checked this way
        return None
    simulated = cfg.MODEL.MABN.SIMULATED_BATCH_SIZE
    has_mabn = any(isinstance(module, MABN2d) for module in model.modules())
    if training and has_mabn and not cfg.MODEL.MABN.BATCH_SIZE:  # building has checked that one
        images = images_per_pass(cfg, ranks)
        if simulated < 1 or simulated % images:
            raise ValueError(
                f"MODEL.MABN.SIMULATED_BATCH_SIZE {simulated} is not a multiple of the {images} "
                f"images per process and pass (SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}, "
                f"{ranks} process(es), SOLVER.ACCUMULATION_STEPS {cfg.SOLVER.ACCUMULATION_STEPS})"
            )
    return model


@contextmanager
def _nothing_computed() -> Iterator[None]:
    """Build on torch's meta device, and leave the random generator alone."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def _explained(cfg: CfgNode, name: str) -> str:
    """Say which keys hold a name that detectron2 has not found, and what there is."""
    places = [
        f"{key} {value!r}"
        for key, value in flat(cfg.MODEL, "MODEL.").items()
        if value == name or (isinstance(value, (list, tuple)) and name in value)
    ]
    if not places:
        return name
    features, backbone = "others", cfg.MODEL.BACKBONE.NAME
    with suppress(Exception), _nothing_computed():  # the backbone itself may not find the name
        features = ", ".join(build_backbone(cfg).output_shape())
    return (
        f"there is no {name!r}, which {' and '.join(places)} ask for; {backbone} has "
        f"{features}; detectron2's norms are BN, SyncBN, FrozenBN, GN and LN (MODEL.BACKBONE.NAME, "
        "MODEL.RETINANET.HEAD_NAME and MODEL.ROI_*_HEAD.NAME may be parts that know others)"
    )


def check_weights(cfg: CfgNode, *, resume: bool = False, training: bool = True) -> str:
    """Return the path of what the run starts from, "" without one; fetch weights behind a URL.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for no weights where some are needed, or a URL that cannot be fetched.
    """
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if resume and PathManager.isfile(last):
        with PathManager.open(last) as file:
            path = os.path.join(cfg.OUTPUT_DIR, file.read().strip())
        if not PathManager.isfile(path):
            raise FileNotFoundError(f"{last} names {path}, which does not exist")
        return path
    path = cfg.MODEL.WEIGHTS.partition("?")[0]  # "?matching_heuristics=True" may follow
    if training:
        check_required_weights(cfg)
    elif not path:
        more = f", and {cfg.OUTPUT_DIR} has no last checkpoint" if resume else ""
        raise ValueError(
            f"MODEL.WEIGHTS is empty{more}: the model would be evaluated as it is initialised"
        )
    if "://" in path:
        try:
            PathManager.get_local_path(path)
        except Exception as error:  # of any kind of network, or its absence
            said = one_line(f"{type(error).__name__}: {error}")
            raise ValueError(f"MODEL.WEIGHTS {path!r} cannot be fetched ({said})") from error
    elif path and not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS {path!r} does not exist")
    return cfg.MODEL.WEIGHTS if path else ""


def check_loading(cfg: CfgNode, model: nn.Module, path: str, *, training: bool = True) -> None:
    """Load the file of :func:`check_weights` into the model of :func:`check_model`.

    Raises:
        ValueError: if the file cannot be read, the model refuses it, nothing of it fits, or, to
            evaluate, no head.
    """
    if not path:
        return
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=False)
    try:
        checkpointer.load(path, checkpointables=[])
    except NotImplementedError:  # a layer that looks at values which the meta device does not have
        return
    except RuntimeError as error:
        raise ValueError(f"MODEL.WEIGHTS {path!r} does not load: {one_line(error)}") from error
    misfit = checkpointer.misfit
    if misfit and (not training or "none of its" in misfit):
        raise ValueError(
            f"{misfit}: MODEL.WEIGHTS {path!r}; take weights of {cfg.MODEL.META_ARCHITECTURE}"
        )


def check_teacher(cfg: CfgNode) -> None:
    """Raise a ValueError or FileNotFoundError if a model to be distilled has no teacher."""
    if cfg.MODEL.META_ARCHITECTURE != "DistilledRetinaNet":
        return
    config, path = cfg.MODEL.DISTILL.TEACHER_CONFIG, cfg.MODEL.DISTILL.TEACHER_WEIGHTS
    if not (config and path):
        name = "TEACHER_WEIGHTS" if config else "TEACHER_CONFIG"
        raise ValueError(f"MODEL.DISTILL.{name} is empty, which training needs")
    teacher_config(config)
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.DISTILL.TEACHER_WEIGHTS {path!r} does not exist")


def check_required_weights(cfg: CfgNode) -> None:
    """Raise a ValueError if a fine-tuning config of MABN has no weights to start from."""
    if cfg.MODEL.MABN.REQUIRE_WEIGHTS and not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "MODEL.WEIGHTS is empty, but this config fine-tunes: it needs an ImageNet model "
            "trained with MABN (rethinking_bn.checkpoint.convert_mabn_checkpoint converts one of "
            "the official code); to train without weights, take a config from scratch or set "
            "MODEL.MABN.REQUIRE_WEIGHTS False"
        )

"""What can be found wrong with a run before it starts: its command line, model and weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from rethinking_bn.checkpoint import read_weights
from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.config import images_per_pass
from rethinking_bn.distributed import raise_together
from rethinking_bn.engine.check_config import check_data_sets, check_device, check_values
from rethinking_bn.engine.load_config import load_config, scale_to_ranks, use_available_device
from rethinking_bn.engine.unread_keys import check_keys_are_read
from rethinking_bn.files import check_unlocked, locked_folder, probe_folder
from rethinking_bn.layers import MABN2d
from rethinking_bn.layers.bn_like import BatchNormLike
from rethinking_bn.modeling.distilled import teacher_config
from rethinking_bn.modeling.domains import check_architecture
from rethinking_bn.population import train_only


def check_run(args: argparse.Namespace, local_ranks: int, ranks: int) -> CfgNode:
    """Check a command line, without starting a process or building what takes long.

    OUTPUT_DIR is made and probed when everything else is right; before, nothing is written.

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
    check_device(cfg)
    use_available_device(cfg)
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and local_ranks > gpus:
        raise ValueError(f"{local_ranks} GPUs asked for, but this machine has {gpus}")
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
        apply_train_only(cfg, model)
    if "://" not in cfg.OUTPUT_DIR:
        if training:
            check_unlocked(cfg.OUTPUT_DIR, "OUTPUT_DIR")
        probe_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")  # last: it makes the folder
    return cfg


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


def apply_train_only(cfg: CfgNode, model: nn.Module) -> None:
    """Leave gradients to what SOLVER.TRAIN_ONLY names alone; a ValueError names that key."""
    if cfg.SOLVER.TRAIN_ONLY:
        try:
            train_only(model, cfg.SOLVER.TRAIN_ONLY)
        except ValueError as error:
            said = str(error).removeprefix("train_only: ")
            raise ValueError(f"SOLVER.TRAIN_ONLY: {said}") from error


def check_model(cfg: CfgNode, ranks: int = 1, *, training: bool = True) -> nn.Module | None:
    """Raise a ValueError if the model's keys contradict each other or name what is not there.

    The model is built for that, on torch's meta device: without memory or initialisation.

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
    keys = cfg.MODEL.MABN  # building has checked BATCH_SIZE
    has_mabn = any(isinstance(module, MABN2d) for module in model.modules())
    if training and has_mabn and not keys.BATCH_SIZE:
        cfg = scale_to_ranks(cfg, ranks)
        images = images_per_pass(cfg, ranks)
        if keys.SIMULATED_BATCH_SIZE < 1 or keys.SIMULATED_BATCH_SIZE % images:
            raise ValueError(
                f"MODEL.MABN.SIMULATED_BATCH_SIZE {keys.SIMULATED_BATCH_SIZE} is not a multiple of "
                f"the {images} images per process and pass (SOLVER.IMS_PER_BATCH "
                f"{cfg.SOLVER.IMS_PER_BATCH}, {ranks} process(es), SOLVER.ACCUMULATION_STEPS "
                f"{cfg.SOLVER.ACCUMULATION_STEPS})"
            )
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
    there = (
        "detectron2's parts know BN, SyncBN, FrozenBN, GN and LN; for another norm set "
        "MODEL.RETINANET.HEAD_NAME, MODEL.ROI_BOX_HEAD.NAME, MODEL.ROI_MASK_HEAD.NAME or "
        "MODEL.BACKBONE.NAME to a part of this package"
    )
    if not all(".NORM " in place for place in places):
        features = "others"
        # otherwise the backbone itself does not find the name
        with suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"):
            features = ", ".join(build_backbone(cfg).output_shape())
        there = f"{cfg.MODEL.BACKBONE.NAME} has {features}"
    return f"there is no {name!r}, which {' and '.join(places)} ask for; {there}"


def _leaves(cfg: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_weights(cfg: CfgNode, *, resume: bool = False, training: bool = True) -> str:
    """Return the path of what the run starts from, "" without one; fetch weights behind a URL.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: as :func:`check_required_weights`, if the run trains; if it does not, for no
            weights at all; for a URL that cannot be fetched.
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
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"MODEL.WEIGHTS {path!r} cannot be fetched ({said})") from error
    elif path and not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS {path!r} does not exist")
    return cfg.MODEL.WEIGHTS if path else ""


def check_loading(cfg: CfgNode, model: nn.Module, path: str, *, training: bool = True) -> None:
    """Load the file of :func:`check_weights` into the model of :func:`check_model`, on meta.

    Raises:
        ValueError: in one line, if the file cannot be read, the model refuses it, or it is of
            another architecture: one of which nothing fits, or, to evaluate, no head.
    """
    if not path:
        return
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=False)
    try:
        checkpointer.load(path, checkpointables=[])
    except NotImplementedError:  # a layer that looks at values which the meta device does not have
        return
    except RuntimeError as error:  # of load_state_dict, one message per line
        first, *messages = (line.strip() for line in str(error).splitlines())
        said = "; ".join(dict.fromkeys(messages[:1] + messages[-1:])) or first
        more = f"; {len(messages) - 2} more like these" if len(messages) > 2 else ""
        raise ValueError(f"MODEL.WEIGHTS {path!r} does not load: {said}{more}") from error
    misfit = checkpointer.misfit
    if misfit and (not training or "none of its" in misfit):
        raise ValueError(
            f"{misfit}: MODEL.WEIGHTS {path!r}; take weights of {cfg.MODEL.META_ARCHITECTURE}"
        )


def without_statistics(cfg: CfgNode, layers: Iterable[BatchNormLike]) -> list[str]:
    """Return the names of the layers that MODEL.WEIGHTS, if a .pth, leaves at mean 0, variance 1.

    Raises:
        ValueError: for a file that cannot be read.
    """
    path = cfg.MODEL.WEIGHTS
    if not (path.endswith(".pth") and os.path.isfile(path)):
        return []
    try:
        state = read_weights(path)
    except ValueError as error:
        raise ValueError(f"MODEL.WEIGHTS: {error}") from error

    start = {"running_mean": 0.0, "running_mean_square": 1.0}

    def is_known(layer: BatchNormLike) -> bool:
        own = ((k, v) for k, v in state.items() if k.startswith(f"{layer.name}."))
        values = ((start.get(k.rpartition(".")[2]), v) for k, v in own if isinstance(v, Tensor))
        return any(first is not None and bool((v != first).any()) for first, v in values)

    return [layer.name for layer in layers if layer.keeps_statistics and not is_known(layer)]


def check_teacher(cfg: CfgNode) -> None:
    """Raise a ValueError or FileNotFoundError if a model to be distilled has no teacher."""
    if cfg.MODEL.META_ARCHITECTURE != "DistilledRetinaNet":
        return
    keys = cfg.MODEL.DISTILL
    for name in ("TEACHER_CONFIG", "TEACHER_WEIGHTS"):
        if not keys[name]:
            raise ValueError(f"MODEL.DISTILL.{name} is empty, which training needs")
    teacher_config(keys.TEACHER_CONFIG)
    path = keys.TEACHER_WEIGHTS
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.DISTILL.TEACHER_WEIGHTS {path!r} does not exist")


def check_required_weights(cfg: CfgNode) -> None:
    """Raise a ValueError if a fine-tuning config of MABN has no weights to start from."""
    if cfg.MODEL.MABN.REQUIRE_WEIGHTS and not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "MODEL.WEIGHTS is empty, but this config fine-tunes: it needs an ImageNet model "
            "trained with MABN and centred convolutions (one of the official MABN code loads after "
            "rethinking_bn.checkpoint.convert_mabn_checkpoint; BN weights give AP far too low); to "
            "train without weights, take a config from scratch or set "
            "MODEL.MABN.REQUIRE_WEIGHTS False"
        )

"""Are the weights that a run starts from there, whole, and of its model? Asked before it starts."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.modeling.distilled import teacher_config


def check_weights(cfg: CfgNode, *, resume: bool = False, training: bool = True) -> str:
    """Check that what the run starts from is there.

    Weights behind a URL or another scheme ("detectron2://") are not looked up.

    Returns:
        its path; "" without one, or for what is elsewhere.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: as :func:`check_required_weights`, if the run trains.
    """
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if resume and PathManager.isfile(last):
        with PathManager.open(last) as file:
            path = os.path.join(cfg.OUTPUT_DIR, file.read().strip())
        if not PathManager.isfile(path):
            raise FileNotFoundError(f"{last} names {path}, which does not exist")
        return path
    if training:
        check_required_weights(cfg)
    path = cfg.MODEL.WEIGHTS.partition("?")[0]  # "?matching_heuristics=True" may follow
    if not path or "://" in path:
        return ""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS {path!r} does not exist")
    return cfg.MODEL.WEIGHTS


def check_loading(cfg: CfgNode, model: nn.Module, path: str, *, training: bool = True) -> None:
    """Load the weights that a run starts from into a model on the meta device.

    Args:
        model: what :func:`check_model` returns; its parameters stay as they are.
        path: what :func:`check_weights` returns.

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
        first, *messages = str(error).splitlines()
        said = (
            "; ".join(message.strip() for message in (*messages[:1], *messages[1:][-1:])) or first
        )
        more = f"; {len(messages) - 2} more like these" if len(messages) > 2 else ""
        raise ValueError(f"MODEL.WEIGHTS {path!r} does not load: {said}{more}") from error
    misfit = checkpointer.misfit
    if misfit and (not training or "none of its" in misfit):
        raise ValueError(
            f"{misfit}: MODEL.WEIGHTS {path!r}; take weights of {cfg.MODEL.META_ARCHITECTURE}"
        )


def check_teacher(cfg: CfgNode) -> None:
    """Check that a model to be distilled has a teacher.

    Raises:
        FileNotFoundError: if its weights, where they are a file, are missing.
        ValueError: if its config is missing, or one of the two keys is empty.
    """
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

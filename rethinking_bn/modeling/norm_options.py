"""What the config says about a norm layer beyond its name."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from rethinking_bn.config import check_has_keys, images_per_pass


def norm_options(cfg: CfgNode, norm: str) -> dict[str, Any]:
    """Return the keyword arguments that the config has for layers of a norm.

    Args:
        cfg: with ``MODEL.MABN`` and ``MODEL.GN``.
        norm: a name that :func:`rethinking_bn.layers.get_norm` knows.

    Returns:
        arguments of ``get_norm(norm, channels, ...)``: those of MODEL.MABN for "MABN", num_groups
        for "GN", otherwise none. ``batch_size`` is in images, for layers that see RoIs as well. It
        is None where MODEL.MABN.BATCH_SIZE is 0 and the images per pass, as many as the ranks now
        running make of SOLVER.IMS_PER_BATCH, do not fit: a model trained on other ranks can be
        evaluated here, and in training its first layer finds the size unfit (rethinking_bn.engine
        checks that before it starts).

    Raises:
        ValueError: naming the keys, when MODEL.MABN.BATCH_SIZE does not divide
            MODEL.MABN.SIMULATED_BATCH_SIZE, or the config lacks this project's keys.
    """
    if norm in ("GN", "MABN"):
        check_has_keys(cfg)
    if norm == "GN":
        return {"num_groups": cfg.MODEL.GN.NUM_GROUPS}
    if norm != "MABN":
        return {}
    keys = cfg.MODEL.MABN
    simulated, batch_size = keys.SIMULATED_BATCH_SIZE, keys.BATCH_SIZE
    if batch_size:
        if batch_size < 0 or simulated < 1 or simulated % batch_size:
            raise ValueError(
                f"MODEL.MABN.SIMULATED_BATCH_SIZE {simulated} is not a multiple of "
                f"MODEL.MABN.BATCH_SIZE {batch_size}"
            )
    else:
        try:
            batch_size = images_per_pass(cfg, comm.get_world_size())
        except ValueError:
            batch_size = None
        if batch_size and simulated % batch_size:
            batch_size = None
    return {
        "simulated_batch_size": simulated,
        "batch_size": batch_size,
        "momentum": keys.MOMENTUM,
        "warmup_iters": keys.WARMUP_ITERS,
        "r_max": keys.R_MAX,
    }

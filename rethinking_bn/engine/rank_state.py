"""Before saving: merge the ranks' statistics, then collect what each rank has of its own.

A checkpoint holds the model of rank 0. Under unsynced BN every rank has moving averages of its own,
so :func:`merge_statistics` makes them one; what must stay each rank's for an exact resume travels
beside the model (:func:`gather_rank_state`). The data-parallel wrapper leaves both alone.
"""

# Without "from __future__ import annotations": torch compares the annotations of a communication
# hook with its own classes.

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup

from rethinking_bn.distributed import all_gather, collective_device, data_parallel, get_world_size
from rethinking_bn.layers import PopulationLayer, mix_statistics
from rethinking_bn.layers.bn_like import find_bn_like
from rethinking_bn.population.model_state import unwrap

logger = logging.getLogger(__name__)

# {"normalizers": {module: float, or one per pass}, "buffers": {name: Tensor}}
RankState = dict[str, Any]

_OF_PASSES = "loss_normalizers"  # a dense detector's loss_normalizer of each pass of an iteration


@torch.no_grad()
def merge_statistics(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Replace the ranks' population statistics by their equal-weight mixture, in place.

    The mixture of W ranks has

        mean = Σ meanᵣ / W,    var = Σ varᵣ / W + Σ (meanᵣ - mean)² / W,

    and a mean square (MABN) is averaged. Statistics that are equal on all ranks stay bit for bit
    what they are. Frozen layers are left alone. One collective: every rank must call it.

    Args:
        model: its BN-like layers are found by :func:`~rethinking_bn.layers.bn_like.find_bn_like`.
    """
    world = get_world_size(group)
    found = find_bn_like(model).layers if world > 1 else ()
    layers = [layer for layer in found if layer.keeps_statistics and not layer.frozen]
    if not layers:
        return
    # float64: the mean of W equal float32 values is then that value
    own = [torch.stack(layer.read()) for layer in layers]  # each (2, D, C)
    packed = torch.cat([statistics.flatten() for statistics in own]).to(collective_device(group))
    ranks = all_gather(packed, group).cpu()
    parts = ranks.split([statistics.numel() for statistics in own], dim=1)
    for layer, statistics, part in zip(layers, own, parts, strict=True):
        layer.write_statistics(*mix_statistics(*part.view(world, *statistics.shape).unbind(1)))


class MergeStatistics(HookBase):
    """Merge the ranks' statistics before every checkpoint and every evaluation, on all ranks.

    Then a trainer with ``gather_rank_states()``, as ours has, collects what each rank has of its
    own. Belongs after population training and before the checkpointer.

    State read: the model. State changed: its running statistics, to the same values on all ranks.
    """

    def __init__(self, model: nn.Module, *periods: int) -> None:
        """
        Args:
            model: what :func:`merge_statistics` takes.
            periods: of checkpoints and of evaluations, in iterations; 0: at the end alone.
        """
        self._model = model
        self._periods = periods

    @classmethod
    def from_config(cls, cfg: Any, model: nn.Module, _: Any) -> "MergeStatistics | None":
        """Return the hook where there are several processes."""
        periods = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
        return cls(model, *periods) if comm.get_world_size() > 1 else None

    def after_step(self) -> None:
        """Merge and collect if something is about to read the statistics."""
        if is_due(self.trainer, *self._periods):
            merge_statistics(self._model)
            if hasattr(self.trainer, "gather_rank_states"):
                self.trainer.gather_rank_states()


def is_due(trainer: Any, *periods: int) -> bool:
    """Return whether an iteration is the last one, or ends one of the periods (0: none)."""
    done = trainer.iter + 1
    return done >= trainer.max_iter or any(p > 0 and done % p == 0 for p in periods)


@contextmanager
def normalizers_of_pass(model: nn.Module, index: int, passes: int) -> Iterator[None]:
    """Let detectron2's dense detectors use the moving loss normaliser of one pass, and move it.

    So each of the ``passes`` of an iteration, counted by ``index``, keeps its own, as each process
    does. They are kept beside detectron2's, and all start where that one is.
    """
    if passes == 1:
        yield
        return
    detectors = [module for _, module in _dense_detectors(unwrap(model))]
    for module in detectors:
        kept = vars(module)
        if len(kept.get(_OF_PASSES, ())) != passes:
            kept[_OF_PASSES] = [kept.get("loss_normalizer")] * passes
        own = kept[_OF_PASSES][index]
        if own is not None:
            module.loss_normalizer = own
        else:  # detectron2's starts with the first forward
            kept.pop("loss_normalizer", None)
    yield
    for module in detectors:
        vars(module)[_OF_PASSES][index] = vars(module).get("loss_normalizer")


def gather_rank_state(model: nn.Module) -> list[RankState]:
    """Return every rank's own state, rank 0 first: what a bit-exact resume needs beside the model.

    These are the loss normalisers of detectron2's dense detectors (one for each pass), the buffers
    that differ between ranks, and those that layers of ours keep out of the state dict. Collective.
    """
    model = unwrap(model)
    buffers = dict(model.named_buffers())
    ours = (n for n, m in model.named_modules() if isinstance(m, PopulationLayer))
    layers = tuple(f"{name}." if name else "" for name in ours)
    saved = model.state_dict().keys()
    unsaved = {name for name in buffers if name.startswith(layers) and name not in saved}
    normalizers: dict[str, Any] = {}  # one number, or one for each pass
    for name, module in _dense_detectors(model):
        now = vars(module).get("loss_normalizer")
        if now is not None:
            each = [float(now if own is None else own) for own in vars(module).get(_OF_PASSES, ())]
            normalizers[name] = each or float(now)
    names = sorted(unsaved | _differing(buffers))
    own = {name: buffers[name].detach().cpu().clone() for name in names}
    return comm.all_gather({"normalizers": normalizers, "buffers": own})


def load_rank_state(model: nn.Module, states: list[RankState], passes: int = 1) -> None:
    """Give this rank its own part of :func:`gather_rank_state`'s result.

    With another number of ranks it gets the part of one that there was, but keeps the buffers that
    the model's state dict has; with another number of ``passes`` per iteration, the mean over them.
    The log says so.
    """
    model, world = unwrap(model), comm.get_world_size()
    state, saved = states[comm.get_rank() % len(states)], {}
    if len(states) != world:
        saved = model.state_dict()
        said = (
            "The checkpoint was saved by %d process(es) and is resumed by %d: another run goes on."
        )
        logger.warning(said, len(states), world)
    modules, buffers = dict(model.named_modules()), dict(model.named_buffers())
    for name, value in state["normalizers"].items():
        if name in modules:
            _set_normalizer(modules[name], value, passes)
    with torch.no_grad():
        for name, value in state["buffers"].items():
            if name in buffers and name not in saved and buffers[name].shape == value.shape:
                buffers[name].copy_(value)


def _dense_detectors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules whose loss normaliser moves (the keypoint head's is a constant)."""
    for name, module in model.named_modules():
        if hasattr(type(module), "_ema_update"):
            yield name, module


def _set_normalizer(module: Any, value: float | list[float], passes: int) -> None:
    values = value if isinstance(value, list) else [value]
    if len(values) != passes:
        said = "The checkpoint was saved with %d pass(es) per iteration and is resumed with %d."
        logger.warning(said, len(values), passes)
        values = [sum(values) / len(values)] * passes
    module.loss_normalizer = values[-1]
    vars(module)[_OF_PASSES] = values if passes > 1 else ()


def _differing(buffers: dict[str, Tensor]) -> set[str]:
    """Return the names of the buffers that are not the same, bit for bit, on all ranks."""
    flat = {name: x.detach().cpu().contiguous().flatten() for name, x in buffers.items()}
    raw = {name: x.view(torch.uint8).numpy().tobytes() for name, x in flat.items()}
    digests = {name: hashlib.sha1(x).digest() for name, x in raw.items()}
    ranks = comm.all_gather(digests)
    return {name for name in digests if any(rank.get(name) != digests[name] for rank in ranks)}


def wrap_data_parallel(model: nn.Module) -> nn.Module:
    """Wrap a model on the CPU if there are several ranks; buffers stay each rank's own.

    The gradients of three or more ranks are added up in the order of the ranks. gloo's order
    depends on the place in a bucket, and torch lays buckets out anew after the first step of a
    process, so a resumed run would round differently.
    """
    if comm.get_world_size() == 1:
        return model
    wrapped = data_parallel(model)
    if comm.get_world_size() > 2:  # a sum of two has no order
        wrapped.register_comm_hook(None, _mean_in_rank_order)
    return wrapped


def _mean_in_rank_order(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    gathered = all_gather(bucket.buffer())  # (W, elements)
    total = gathered[0].clone()
    for rank in gathered[1:]:
        total += rank
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(total / len(gathered))
    return future

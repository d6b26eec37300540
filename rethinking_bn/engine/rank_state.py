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

    Under unsynced BN every rank's moving averages follow its own data. The mixture of W ranks has

        mean = Σ meanᵣ / W,    var = Σ varᵣ / W + Σ (meanᵣ - mean)² / W,

    and a mean square (MABN) is averaged. Statistics that are equal on all ranks stay bit for bit
    what they are. Layers in eval mode are frozen, and left alone.

    A collective (one, whatever the number of layers): every rank must call it.

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
    """Merge the ranks' statistics before every checkpoint and every evaluation.

    So every rank evaluates what is saved. Then a trainer with ``gather_rank_states()``, as ours
    has, collects what each rank has of its own. Belongs after population training and before the
    checkpointer, on all ranks.

    State read: the model. State changed: its running statistics, to the same values on all ranks.
    """

    def __init__(self, model: nn.Module, *periods: int) -> None:
        """
        Args:
            model: what :func:`merge_statistics` takes.
            periods: of checkpoints and of evaluations, in iterations; 0: at the end alone.
        """
        self._model = model
        self._periods = [period for period in periods if period > 0]

    @classmethod
    def from_config(cls, cfg: Any, model: nn.Module, loader: Any) -> "MergeStatistics | None":
        """Return the hook; None for one process, which has nothing to merge."""
        if comm.get_world_size() == 1:
            return None
        return cls(model, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)

    def after_step(self) -> None:
        """Merge and collect if something is about to read the statistics."""
        if self.is_due(self.trainer.iter + 1):
            merge_statistics(self._model)
            if hasattr(self.trainer, "gather_rank_states"):
                self.trainer.gather_rank_states()

    def is_due(self, iterations_done: int) -> bool:
        """Return whether a checkpoint or an evaluation follows this iteration."""
        if iterations_done >= self.trainer.max_iter:
            return True
        return any(iterations_done % period == 0 for period in self._periods)


@contextmanager
def normalizers_of_pass(model: nn.Module, index: int, passes: int) -> Iterator[None]:
    """Let detectron2's dense detectors use the moving loss normaliser of one pass, and move it.

    So each of the ``passes`` of an iteration keeps its own, as each process does. They are kept
    beside detectron2's, and all start where that one is. With one pass nothing happens. ``index``
    counts passes from 0; ``model`` may be wrapped in DistributedDataParallel.
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
    that differ between ranks, and those that layers of ours keep out of the state dict. A
    collective: every rank must call it.
    """
    model = unwrap(model)
    buffers = dict(model.named_buffers())
    ours = (n for n, m in model.named_modules() if isinstance(m, PopulationLayer))
    layers = tuple(f"{name}." if name else "" for name in ours)
    saved = model.state_dict().keys()
    unsaved = {name for name in buffers if name.startswith(layers) and name not in saved}
    names = unsaved | _differing(buffers)
    own: RankState = {
        "normalizers": {
            # one number, or one for each pass
            name: [
                float(module.loss_normalizer if n is None else n)
                for n in vars(module).get(_OF_PASSES, ())
            ]
            or float(module.loss_normalizer)
            for name, module in _dense_detectors(model)
            if "loss_normalizer" in vars(module)
        },
        "buffers": {name: buffers[name].detach().cpu().clone() for name in sorted(names)},
    }
    return comm.all_gather(own)


def load_rank_state(model: nn.Module, states: list[RankState], passes: int = 1) -> None:
    """Give this rank its own part of :func:`gather_rank_state`'s result.

    For another number of ranks there is no own part: every rank then takes the mean over the
    ranks there were, and the log says so. The same goes for the ``passes`` of an iteration.
    """
    world = comm.get_world_size()
    if len(states) == world:
        state = states[comm.get_rank()]
    else:
        logger.warning(
            "The checkpoint was saved by %d process(es) and is resumed by %d: loss normalisers and "
            "rank-local buffers are set to their mean, so this continues another run.",
            *(len(states), world),
        )
        state = _mean(states)
    model = unwrap(model)
    modules = dict(model.named_modules())
    for name, value in state["normalizers"].items():
        if name in modules:
            _set_normalizer(modules[name], value, passes)
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in state["buffers"].items():
            if name in buffers and buffers[name].shape == value.shape:
                buffers[name].copy_(value)


def _dense_detectors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules whose loss normaliser moves (the keypoint head's is a constant)."""
    for name, module in model.named_modules():
        if hasattr(type(module), "_ema_update"):
            yield name, module


def _set_normalizer(module: Any, value: float | list[float], passes: int) -> None:
    values = value if isinstance(value, list) else [value]
    if len(values) != passes:
        logger.warning(
            "The checkpoint was saved with %d pass(es) per iteration and is resumed with %d: the "
            "loss normalisers are set to their mean, so this continues another run.",
            *(len(values), passes),
        )
        values = [sum(values) / len(values)] * passes
    module.loss_normalizer = values[-1]
    vars(module).pop(_OF_PASSES, None)
    if passes > 1:
        setattr(module, _OF_PASSES, values)


def _differing(buffers: dict[str, Tensor]) -> set[str]:
    """Return the names of the buffers that are not the same, bit for bit, on all ranks."""
    if comm.get_world_size() == 1:
        return set()
    flat = {name: x.detach().cpu().contiguous().flatten() for name, x in buffers.items()}
    digests = {
        name: hashlib.sha1(x.view(torch.uint8).numpy().tobytes()).digest()
        for name, x in flat.items()
    }
    ranks = comm.all_gather(digests)
    return {name for name in digests if any(rank.get(name) != digests[name] for rank in ranks)}


def _mean(states: list[RankState]) -> RankState:
    """Return the mean over ranks; of what cannot be averaged, rank 0's."""
    first = states[0]
    normalizers = {}
    for name in first["normalizers"]:
        ranks = [state["normalizers"][name] for state in states if name in state["normalizers"]]
        if len(ranks) == len(states):  # numbers, or lists of them
            normalizers[name] = torch.tensor(ranks, dtype=torch.float64).mean(0).tolist()
    buffers = {}
    for name, value in first["buffers"].items():
        if value.is_floating_point():
            values = torch.stack([state["buffers"][name].double() for state in states])
            value = values.mean(0).to(value.dtype)
        buffers[name] = value
    return {"normalizers": normalizers, "buffers": buffers}


def wrap_data_parallel(model: nn.Module) -> nn.Module:
    """Wrap a model on the CPU for data-parallel training, if there are several processes.

    Buffers stay each rank's own, see :func:`rethinking_bn.distributed.data_parallel`.

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

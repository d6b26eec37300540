"""State that every rank has its own of, and that a checkpoint of rank 0's model leaves out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from rethinking_bn.layers import PopulationLayer
from rethinking_bn.population.model_state import unwrap

# {"normalizers": {module: float, or one per pass}, "buffers": {name: Tensor}}
RankState = dict[str, Any]

_OF_PASSES = "loss_normalizers"  # a dense detector's loss_normalizer of each pass of an iteration


@contextmanager
def normalizers_of_pass(model: nn.Module, index: int, passes: int) -> Iterator[None]:
    """Let detectron2's dense detectors use the moving loss normaliser of one pass, and move it.

    So each of the ``passes`` of an iteration keeps its own, as each process does. They are kept
    beside detectron2's, and all start where that one is. With one pass nothing happens.

    Args:
        model: may be wrapped in DistributedDataParallel.
        index: of the pass, from 0.
        passes: of an iteration.
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

    It holds the loss normalisers of detectron2's dense detectors (a float attribute that appears
    with the first training step; where an iteration has several passes, one for each), every
    buffer that differs between ranks, and the buffers that layers of ours keep out of the state
    dict. A collective: every rank must call it.
    """
    model = unwrap(model)
    buffers = dict(model.named_buffers())
    names = set(_unsaved_buffers(model)) | _differing(buffers)
    own: RankState = {
        "normalizers": {
            name: _normalizer(module)
            for name, module in _dense_detectors(model)
            if "loss_normalizer" in vars(module)
        },
        "buffers": {name: buffers[name].detach().cpu().clone() for name in sorted(names)},
    }
    return comm.all_gather(own)


def load_rank_state(model: nn.Module, states: list[RankState], passes: int = 1) -> None:
    """Give this rank its own part of :func:`gather_rank_state`'s result.

    For another number of ranks there is no own part: every rank then takes the mean over the
    ranks there were, and the log says so. The same goes for the passes of an iteration.

    Args:
        passes: of an iteration from now on.
    """
    world = comm.get_world_size()
    if len(states) == world:
        state = states[comm.get_rank()]
    else:
        logging.getLogger(__name__).warning(
            "The checkpoint was saved by %d process(es) and is resumed by %d: loss normalisers and "
            "rank-local buffers are set to their mean, so this continues another run.",
            len(states),
            world,
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


def _normalizer(module: Any) -> float | list[float]:
    """Return what a detector normalises its loss by: one number, or one for each pass."""
    own = float(module.loss_normalizer)
    return [
        own if value is None else float(value) for value in vars(module).get(_OF_PASSES, ())
    ] or own


def _set_normalizer(module: Any, value: float | list[float], passes: int) -> None:
    values = value if isinstance(value, list) else [value]
    if len(values) != passes:
        logging.getLogger(__name__).warning(
            "The checkpoint was saved with %d pass(es) per iteration and is resumed with %d: the "
            "loss normalisers are set to their mean, so this continues another run.",
            len(values),
            passes,
        )
        values = [sum(values) / len(values)] * passes
    module.loss_normalizer = values[-1]
    vars(module).pop(_OF_PASSES, None)
    if passes > 1:
        setattr(module, _OF_PASSES, values)


def _unsaved_buffers(model: nn.Module) -> Iterator[str]:
    """Yield the names of buffers that layers of ours keep out of the state dict."""
    layers: dict[str, Any] = dict(model.named_modules())
    for prefix, layer in layers.items():
        if not isinstance(layer, PopulationLayer):
            continue
        for name, module in layers[prefix].named_modules(prefix=prefix):
            for buffer in module._non_persistent_buffers_set:
                if isinstance(getattr(module, buffer), Tensor):
                    yield f"{name}.{buffer}" if name else buffer


def _differing(buffers: dict[str, Tensor]) -> set[str]:
    """Return the names of the buffers that are not the same, bit for bit, on all ranks."""
    if comm.get_world_size() == 1:
        return set()
    digests = {
        name: hashlib.sha1(
            buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).digest()
        for name, buffer in buffers.items()
    }
    ranks = comm.all_gather(digests)
    return {name for name in digests if any(rank.get(name) != digests[name] for rank in ranks)}


def _mean(states: list[RankState]) -> RankState:
    """Return the mean over ranks; of what cannot be averaged, rank 0's."""
    first = states[0]
    normalizers = {
        name: _mean_normalizer([state["normalizers"][name] for state in states])
        for name in first["normalizers"]
        if all(name in state["normalizers"] for state in states)
    }
    buffers = {}
    for name, value in first["buffers"].items():
        if value.is_floating_point():
            ranks = torch.stack([state["buffers"][name].double() for state in states])
            value = ranks.mean(0).to(value.dtype)
        buffers[name] = value
    return {"normalizers": normalizers, "buffers": buffers}


def _mean_normalizer(ranks: list[Any]) -> float | list[float]:
    if not isinstance(ranks[0], list):
        return sum(ranks) / len(ranks)
    return [sum(values) / len(values) for values in zip(*ranks, strict=True)]

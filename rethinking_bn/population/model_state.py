"""Put a model back after forwards that were not meant to move it: buffers, modes, attributes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

_lock = threading.Lock()
_in_use: WeakSet[nn.Module] = WeakSet()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside data-parallel wrappers and torch.compile's."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put the mode of every module back at the end, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        _set_modes(modes)


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Refuse a second estimate or diagnosis of a model while one runs, nested or in a thread.

    Both set momentum and buffers of the same layers, so that neither's numbers would be right.

    Raises:
        RuntimeError: when a module of the model is in use; nothing has changed then.
    """
    modules = set(model.modules())
    with _lock:
        if any(module in _in_use for module in modules):
            raise RuntimeError(
                "another population training or diagnosis of this model is running: one within "
                "the other, or in two threads, would mix up the statistics of both"
            )
        _in_use.update(modules)
    try:
        yield
    finally:
        with _lock:
            _in_use.difference_update(modules)


class ModelState:
    """What a forward may change in a model, as it is now; weights are not part of it.

    Kept are the values and the identity of every buffer (NaN included), every module's mode, and
    what each of its attributes is bound to: a number kept by assignment, such as RetinaNet's
    ``loss_normalizer``, comes back, and an attribute that did not exist goes. The inside of an
    attribute that is itself a container is not kept.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        # In-place changes of these containers are register_buffer's and its kin.
        self._registries = [
            (registry, registry.copy())
            for module in modules
            for name in ("_buffers", "_non_persistent_buffers_set")
            if isinstance(registry := vars(module).get(name), (dict, set))
        ]
        # there are constant layers whose statistics are parameters
        statistics = [p for name, p in model.named_parameters() if "running_" in name]
        self._values: list[tuple[Tensor, Tensor]] = [
            (tensor, tensor.detach().clone()) for tensor in [*model.buffers(), *statistics]
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring everything back, in place; calling it again does no harm."""
        for attributes, bound in self._attributes:
            _replace(attributes, bound)
        for registry, members in self._registries:
            _replace(registry, members)
        _set_modes(self._modes)
        for buffer, value in self._values:
            if not torch.equal(buffer, value):  # NaN counts as unequal
                buffer.copy_(value)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:  # a scripted module keeps its mode elsewhere
            module.training = training


def _replace(container: Any, before: Any) -> None:
    """Make the content of a dictionary or set what it was, without a moment of emptiness."""
    for key in [key for key in container if key not in before]:
        if isinstance(container, set):
            container.discard(key)
        else:
            container.pop(key)
    container.update(before)

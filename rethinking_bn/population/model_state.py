"""Put a model back after forwards that were not meant to move it: buffers, modes, attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside data-parallel wrappers and torch.compile's."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrap(model.module)
    if "_orig_mod" in model._modules:  # torch.compile's wrapper
        return unwrap(model._modules["_orig_mod"])  # type: ignore[arg-type]
    return model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put the mode of every module back at the end, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        set_modes(modes)


@contextmanager
def changed(dictionary: dict[str, Any], values: dict[str, Any]) -> Iterator[None]:
    """Change entries of a dictionary for a while."""
    before = {key: dictionary[key] for key in values if key in dictionary}
    dictionary.update(values)
    try:
        yield
    finally:
        dictionary.update(before)
        for key in values.keys() - before.keys():
            del dictionary[key]


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
        names = ("_buffers", "_non_persistent_buffers_set")
        registries = [vars(module).get(name) for module in modules for name in names]
        self._registries = [(r, r.copy()) for r in registries if r is not None]
        # there are constant layers whose statistics are parameters
        statistics = [p for name, p in model.named_parameters() if "running_" in name]
        self._values = [(t, t.detach().clone()) for t in [*model.buffers(), *statistics]]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring everything back, in place; calling it again does no harm."""
        for attributes, bound in self._attributes:
            _replace(attributes, bound)
        for registry, members in self._registries:
            _replace(registry, members)
        set_modes(self._modes)
        for buffer, value in self._values:
            if not torch.equal(buffer, value):  # NaN counts as unequal
                buffer.copy_(value)


def set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Set the modes of modules."""
    for module, training in modes:
        if module.training != training:  # a scripted module keeps its mode elsewhere
            module.training = training


def _replace(container: Any, before: Any) -> None:
    """Make the content of a dictionary or set what it was, without a moment of emptiness."""
    remove = container.discard if isinstance(container, set) else container.pop
    for key in [key for key in container if key not in before]:
        remove(key)
    container.update(before)

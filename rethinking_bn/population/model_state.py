"""Put a model back after forwards that were not meant to move it: buffers, modes, attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside data-parallel wrappers and torch.compile's."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


class ModelState:
    """What a forward may change in a model, as it is now; parameters are not part of it.

    Kept are the values and the identity of every buffer (persistent or not, NaN included), every
    module's mode, and what each of its plain attributes is bound to: a number kept by assignment,
    such as RetinaNet's ``loss_normalizer``, comes back, and an attribute that did not exist goes.
    The inside of an attribute that is itself a container is not kept.

    Args:
        model: its submodules included. The copies of the buffers take their memory once more.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        # In-place changes of these containers are register_buffer's and its kin.
        self._registries = [
            (registry, registry.copy())
            for module in modules
            for registry in (
                vars(module).get("_buffers"),
                vars(module).get("_non_persistent_buffers_set"),
            )
            if isinstance(registry, (dict, set))
        ]
        self._values: list[tuple[Tensor, Tensor]] = [
            (buffer, buffer.detach().clone()) for buffer in model.buffers()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring everything back, in place; calling it again does no harm."""
        for attributes, bound in self._attributes:
            _replace(attributes, bound)
        for registry, members in self._registries:
            _replace(registry, members)
        for module, training in self._modes:
            if module.training != training:  # a scripted module keeps its mode elsewhere
                module.training = training
        for buffer, value in self._values:
            if not torch.equal(buffer, value):  # NaN counts as unequal
                buffer.copy_(value)


def _replace(container: Any, before: Any) -> None:
    """Make the content of a dictionary or set what it was, without a moment of emptiness."""
    for key in [key for key in container if key not in before]:
        if isinstance(container, set):
            container.discard(key)
        else:
            container.pop(key)
    container.update(before)

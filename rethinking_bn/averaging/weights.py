"""Weights averaged over a training, and the population statistics that belong to them.

EMA as in Tarvainen and Valpola, "Mean teachers" (arXiv 1703.01780), SWA as in Izmailov et al.,
"Averaging weights leads to wider optima" (arXiv 1803.05407). The statistics of any single model of
the training belong to its weights and not to their average, which is why SWA estimates them anew;
by exact moments here (arXiv 2105.07576, section 3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from rethinking_bn.averaging.follow import copy_buffers, follow
from rethinking_bn.layers.frozen import freeze_layer, is_frozen
from rethinking_bn.population import PopulationReport, estimate_population_statistics
from rethinking_bn.population.model_state import unwrap

KINDS = ("ema", "swa")
STATISTICS = ("estimate", "average", "copy")
_RUNNING = ("running_mean", "running_var", "running_mean_square")

logger = logging.getLogger(__name__)


class AveragedWeights:
    """The average of a model's weights over its training: EMA or SWA.

    With w the model's weights and n the updates before this one, ``update`` makes of the average a

        EMA:  a ← d·a + (1 − d)·w,  d = min(decay, (1 + n) / (10 + n)), or decay without warmup
        SWA:  a ← a + (w − a) / (n + 1), the mean of the w of all updates

    and a starts as a copy of the model; SWA forgets that start with the first update. Averages of
    half-precision weights are kept in float32. A parameter used in several places is averaged once.

    The average has a model of its own (:attr:`module`): nothing here ever changes the one that is
    trained, but for ``copy_to`` when it is given that one. It can be evaluated at any time.

    Args:
        model: its architecture and first weights. Data-parallel and compile wrappers are looked
            through, here and in every method.
        kind: "ema" or "swa".
        decay: d of the EMA, in [0, 1].
        warmup: whether the EMA's decay grows from 0.1 to ``decay``, so that it forgets its start.
        statistics: the BatchNorm statistics that go with the average. "copy": those the model had
            at the last update; "average": averaged as the weights are; "estimate": those that
            :meth:`estimate_statistics` finds, and the model's until it is called. All other buffers
            are copied.

    Raises:
        ValueError: for another kind or statistics, or a decay outside [0, 1].

    Attributes:
        updates: how many there were.
        estimated: whether the statistics were estimated since the last update.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["ema", "swa"] = "ema",
        *,
        decay: float = 0.999,
        warmup: bool = True,
        statistics: Literal["estimate", "average", "copy"] = "copy",
    ) -> None:
        for name, value, choices in (
            ("kind", kind, KINDS),
            ("statistics", statistics, STATISTICS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.kind, self.decay, self.warmup, self.statistics = kind, decay, warmup, statistics
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        """Begin anew: a copy of ``model`` and no update."""
        self._hold(deepcopy(unwrap(model)).requires_grad_(False))
        self.updates = 0
        self.estimated = False

    def _hold(self, module: nn.Module) -> None:
        """Take ``module``, whose float32 tensors are the averages; narrower types get their own."""
        self._module = module
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        self._held: dict[str, Tensor] = dict(module.named_parameters())
        if self.statistics == "average":
            self._held.update(
                (name, buffer)
                for name, buffer in module.named_buffers()
                if name.rpartition(".")[2] in _RUNNING
            )
        self._averages = {
            name: tensor.detach()
            if not tensor.is_floating_point() or tensor.element_size() >= 4
            else tensor.detach().float()
            for name, tensor in self._held.items()
        }
        self._groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, average in self._averages.items():
            key = (average.device, average.dtype)
            self._groups.setdefault(key, []).append(name)

    @property
    def module(self) -> nn.Module:
        """The averaged model: averaged weights in the model's types, and their statistics."""
        for name, average in self._averages.items():
            if average.dtype != self._held[name].dtype:
                self._held[name].detach().copy_(average)
        return self._module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average.

        The modes of the model's layers, frozen or not, are taken over too, and with "copy" and
        "estimate" its statistics.

        Raises:
            ValueError: when the model's parameters are not those of the first model any more.
        """
        model = unwrap(model)
        weights: dict[str, Tensor] = dict(model.named_parameters())
        self._check(weights)
        follow(self._module, model, averaged=self._held)
        if self.statistics == "average":
            weights.update(model.named_buffers())
        n = self.updates
        step: Any = get_swa_multi_avg_fn() if self.kind == "swa" else self._ema(n)
        for (device, dtype), names in self._groups.items():
            averages = [self._averages[name] for name in names]
            new = [weights[name].detach().to(device, dtype) for name in names]
            if dtype.is_floating_point or dtype.is_complex:
                step(averages, new, n)
            else:  # an integer has no mean
                torch._foreach_copy_(averages, new)
        self.updates += 1
        self.estimated = False

    def _ema(self, n: int) -> Any:
        return get_ema_multi_avg_fn(
            min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        )

    def estimate_statistics(
        self, batches: Iterable[Any], num_batches: int | None = None, **options: Any
    ) -> PopulationReport:
        """Estimate the population statistics of the averaged model, until the next update.

        Layers that the model had frozen (in eval mode while the model was in training mode) keep
        the model's statistics.

        Args:
            batches, num_batches, options: as in
                :func:`rethinking_bn.population.estimate_population_statistics`.

        Raises:
            ValueError: with ``statistics="average"``, and as that function.
        """
        if self.statistics == "average":
            raise ValueError(
                'statistics="average" averages the statistics; to estimate them, make the averaged '
                'weights with statistics="estimate"'
            )
        module = self.module
        modes = [(child, child.training) for child in module.modules()]
        try:
            if not module.training:
                module.train()
            report = estimate_population_statistics(module, batches, num_batches, **options)
        finally:
            for child, mode in modes:
                child.training = mode
        self.estimated = True
        return report

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and their statistics into ``model``, in place.

        With ``statistics="estimate"`` and no estimate since the last update the statistics are
        those of the last model, which do not belong to the average: a warning says so.

        Raises:
            ValueError: when the parameters of ``model`` are others; nothing is written then.
        """
        model = unwrap(model)
        self._check(dict(model.named_parameters()))
        if self.statistics == "estimate" and not self.estimated:
            logger.warning(
                "averaged weights: no estimate of the statistics since the last update; the last "
                "model's are copied (estimate_statistics finds those of the average)"
            )
        source = self.module
        # by way of the state dict: layers that count beside their buffers load what they need
        model.load_state_dict(source.state_dict())
        targets: dict[str, Tensor] = dict(model.named_buffers())
        copy_buffers(targets, dict(source.named_buffers()))
        targets.update(model.named_parameters())
        for name, average in self._averages.items():
            if average.dtype != self._held[name].dtype:
                targets[name].copy_(average)  # the target may be wider than the first model

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed training needs, and what can be loaded by ``torch.load``."""
        own = {
            name: average
            for name, average in self._averages.items()
            if average.dtype != self._held[name].dtype
        }
        return {
            "kind": self.kind,
            "updates": self.updates,
            "estimated": self.estimated,
            "model": self.module.state_dict(),
            "float32": own,
            "frozen": [name for name, part in self._module.named_modules() if is_frozen(part)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s; on an exception nothing has changed.

        Raises:
            ValueError: when it is of another kind or of another model.
        """
        if state["kind"] != self.kind:
            raise ValueError(f"the averaged weights saved are {state['kind']!r}, not {self.kind!r}")
        module = deepcopy(self._module)
        try:
            module.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"the averaged weights saved are of another model: {error}") from error
        if any(name not in self._averages for name in state["float32"]):
            raise ValueError("the averaged weights saved are of a model of other types")
        for name in state.get("frozen", ()):  # not in a module's own state
            freeze_layer(module.get_submodule(name))
        self._hold(module)
        for name, average in state["float32"].items():
            self._averages[name].copy_(average)
        self.updates, self.estimated = state["updates"], state["estimated"]

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse a model whose parameters are not, by name and shape, those of the average."""
        if weights.keys() != self._shapes.keys():
            added = [name for name in weights if name not in self._shapes]
            missing = [name for name in self._shapes if name not in weights]
            raise ValueError(
                "the model's parameters are not those that are averaged: "
                f"added {_shorten(added)}, missing {_shorten(missing)}; begin anew with restart()"
            )
        for name, weight in weights.items():
            if weight.shape != self._shapes[name]:
                raise ValueError(
                    f"the parameter {name} is {tuple(weight.shape)} now, but its average is "
                    f"{tuple(self._shapes[name])}; begin anew with restart()"
                )


def _shorten(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

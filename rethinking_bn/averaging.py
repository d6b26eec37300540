"""Weights averaged over a training, and the population statistics that belong to them.

EMA as in Tarvainen and Valpola, "Mean teachers" (arXiv 1703.01780), SWA as in Izmailov et al.,
"Averaging weights leads to wider optima" (arXiv 1803.05407). The statistics of a single model
belong to its weights and not to their average: SWA estimates them anew, here by exact moments
(arXiv 2105.07576, section 3).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from rethinking_bn.layers.bn_like import find_bn_like
from rethinking_bn.layers.frozen import freeze_layer, is_frozen, thaw_layer
from rethinking_bn.population import PopulationReport, estimate_population_statistics
from rethinking_bn.population.model_state import modes_kept, unwrap
from rethinking_bn.population.report import shorten

KINDS = ("ema", "swa")
STATISTICS = ("estimate", "average", "copy")
_RUNNING = ("running_mean", "running_var", "running_mean_square")
_PLAIN = (bool, int, float, type(None))

AvgFn = Callable[[Tensor, Tensor, int], Tensor]  # (average, new weights, updates before) -> average

logger = logging.getLogger(__name__)


class AveragedWeights:
    """The average of a model's weights over its training: EMA or SWA.

    With w the model's weights and n the updates before this one, ``update`` makes of the average a

        EMA:  a ← d·a + (1 − d)·w,  d = min(decay, (1 + n) / (10 + n)), or decay without warmup
        SWA:  a ← a + (w − a) / (n + 1), the mean of the w of all updates

    and a starts as a copy of the model; SWA forgets that start with the first update. Averages of
    half-precision weights are kept in float32. A parameter used in several places is averaged once.

    The average has a model of its own, ``module``, whose tensors are the average. It may be moved,
    loaded, copied or pickled like any other; what is there is averaged on. Only ``copy_to`` ever
    changes the model that is trained.

    Args:
        model: its architecture and first weights; wrappers are looked through, here and below.
        kind: "ema" or "swa".
        decay: d of the EMA, in [0, 1].
        warmup: whether the EMA's decay grows from 0.1 to ``decay``, so that it forgets its start.
        avg_fn: (average, model's tensor, n) -> average, as torch's AveragedModel takes it; in place
            of what ``kind`` stands for.
        device: where the average is kept; None: where the model is. It can be moved at any time.
        statistics: the BatchNorm statistics of the average. "copy": the model's at the last update;
            "average": averaged as the weights are; "estimate": those that
            :meth:`estimate_statistics` finds, and until then the model's. All other buffers are
            copied.

    Raises:
        ValueError: for another kind or statistics, a decay outside [0, 1], a lazy layer, or a model
            that cannot be copied, naming the module.

    Attributes:
        module: the averaged model: averaged weights in the model's types, and their statistics.
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
        avg_fn: AvgFn | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value, choices in (("kind", kind, KINDS), ("statistics", statistics, STATISTICS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.kind, self.decay, self.warmup, self.statistics = kind, decay, warmup, statistics
        self.avg_fn, self.device = avg_fn, device
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        """Begin anew: a copy of ``model`` and no update."""
        module = _copy(unwrap(model)).requires_grad_(False)
        self.module = module if self.device is None else module.to(self.device)
        parts = {p for layer in find_bn_like(module).layers for p in layer.module.modules()}
        self._parts = {name for name, part in module.named_modules() if part in parts}
        # narrow types: float32 averages, and the tensor's place and version when they were written
        self._wide: dict[str, Tensor] = {}
        self._written: dict[str, tuple[int, int]] = {}
        self.updates = 0
        self.estimated = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_written": {}}  # a copy has other tensors in these places

    def _widened(self, name: str, tensor: Tensor) -> Tensor:
        """Return the average behind a tensor of the module: itself, or in float32."""
        if not tensor.is_floating_point() or tensor.element_size() >= 4:
            if name in self._wide:  # the module was widened
                tensor.copy_(self._wide.pop(name))
            return tensor
        if self._written.get(name) != (tensor.data_ptr(), tensor._version):
            wide = self._wide.get(name)
            # somebody else has written the tensor, unless it only changed places
            if wide is None or not torch.equal(wide.to(tensor), tensor):
                self._wide[name] = tensor.detach().float()
            self._wide[name] = self._wide[name].to(tensor.device)
        return self._wide[name]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average.

        The average also takes over which layers are frozen, the modes, and with "copy" and
        "estimate" the statistics.

        Raises:
            ValueError: when the model's parameters are not those of the first model any more.
        """
        tensors = self._follow(unwrap(model))
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        average = get_swa_multi_avg_fn() if self.kind == "swa" else get_ema_multi_avg_fn(decay)
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name, (held, theirs) in tensors.items():
            mine = self._widened(name, held).detach()
            old, new = groups.setdefault((mine.device, mine.dtype), ([], []))
            old.append(mine)
            new.append(theirs.detach().to(mine.device, mine.dtype))
        for (_, dtype), (old, new) in groups.items():
            if not (dtype.is_floating_point or dtype.is_complex):  # an integer has no mean
                torch._foreach_copy_(old, new)
            elif self.avg_fn is None:
                average(old, new, n)
            else:
                for mine, theirs in zip(old, new, strict=True):
                    mine.copy_(self.avg_fn(mine, theirs, n))
        for name, wide in self._wide.items():
            held = tensors[name][0].detach()
            held.copy_(wide)
            self._written[name] = held.data_ptr(), held._version
        self.updates += 1
        self.estimated = False

    def _follow(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Follow modes and buffers of ``model``; return what is averaged: name -> (own, model's).

        With the buffers of BN-like layers go their plain attributes (the clock of a ring of MABN).
        """
        self._check(model)
        named, targets = list(model.named_modules()), list(self.module.modules())
        tensors: dict[str, tuple[Tensor, Tensor]] = {}
        buffers: list[tuple[Tensor, Tensor]] = []
        for (_, source), target in zip(named, targets, strict=False):
            if is_frozen(source):
                freeze_layer(target)
            elif is_frozen(target):
                thaw_layer(target)
                target.requires_grad_(False)  # what unfreezing gives back is the trained layer's
        if [type(source) for _, source in named] != [type(target) for target in targets]:
            raise ValueError("the model's modules are not those it had; begin anew with restart()")
        seen: set[Tensor] = set()  # a parameter in several places is averaged once
        for (prefix, source), target in zip(named, targets, strict=True):
            target.training = source.training
            if prefix in self._parts:
                vars(target).update({n: v for n, v in vars(source).items() if type(v) in _PLAIN})
            _adopt(target, source, self.device)
            averages = self.statistics == "average" and prefix in self._parts
            for name, theirs in [*source._parameters.items(), *source._buffers.items()]:
                mine = target._parameters.get(name, target._buffers.get(name))
                if theirs is None or mine is None or mine in seen:
                    continue
                seen.add(mine)
                if name in source._parameters or (averages and name in _RUNNING):
                    tensors[f"{prefix}.{name}" if prefix else name] = mine, theirs
                else:
                    buffers.append((mine, theirs.detach()))
        if buffers:
            own, models = map(list, zip(*buffers, strict=True))
            torch._foreach_copy_(own, models)
        return tensors

    def estimate_statistics(
        self, batches: Iterable[Any], num_batches: int | None = None, **options: Any
    ) -> PopulationReport:
        """Estimate the population statistics of the averaged model, until the next update.

        Layers that the model had frozen (in eval mode while the model was in training mode) keep
        the model's statistics. Arguments are those of
        :func:`rethinking_bn.population.estimate_population_statistics`.

        Raises:
            ValueError: with ``statistics="average"``, and as that function.
        """
        if self.statistics == "average":
            raise ValueError('statistics="average" averages them: take statistics="estimate"')
        with modes_kept(self.module):
            if not self.module.training:
                self.module.train()  # all of it: a part in eval mode is frozen
            report = estimate_population_statistics(self.module, batches, num_batches, **options)
        self.estimated = True
        return report

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and their statistics into ``model``, in place.

        With ``statistics="estimate"`` and no estimate since the last update the statistics are
        the last model's: a warning says so.

        Raises:
            ValueError: when the parameters of ``model`` are others; nothing is written then.
        """
        model = unwrap(model)
        self._check(model)
        if self.statistics == "estimate" and not self.estimated:
            logger.warning(
                "averaged weights: no estimate of the statistics since the last update, the last "
                "model's are copied: call estimate_statistics"
            )
        # by way of the state dict: layers that count beside their buffers load what they need
        model.load_state_dict(self.module.state_dict())
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, buffer in self.module.named_buffers():  # those that no state dict holds, too
            if name in targets and targets[name].shape == buffer.shape:
                targets[name].copy_(buffer)
        for name, wide in self._wide.items():
            targets[name].copy_(wide)  # the target may be wider than the first model

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed training needs, and what can be loaded by ``torch.load``."""
        return {
            "kind": self.kind,
            "updates": self.updates,
            "estimated": self.estimated,
            "model": self.module.state_dict(),
            "float32": dict(self._wide),
            "frozen": [name for name, part in self.module.named_modules() if is_frozen(part)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s; on an exception nothing has changed.

        Raises:
            ValueError: for one of another kind or model.
        """
        if state["kind"] != self.kind:
            raise ValueError(f"the averaged weights saved are {state['kind']!r}, not {self.kind!r}")
        module = deepcopy(self.module)
        try:
            module.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"the averaged weights saved are of another model: {error}") from error
        for name in state.get("frozen", ()):  # not in a module's own state
            freeze_layer(module.get_submodule(name))
        self.module, self._written = module, {}
        self._wide = {name: wide.clone() for name, wide in state["float32"].items()}
        self.updates, self.estimated = state["updates"], state["estimated"]

    def _check(self, model: nn.Module) -> None:
        """Refuse a model whose parameters are not, by name and shape, those of the average."""
        new, old = ({n: p.shape for n, p in m.named_parameters()} for m in (model, self.module))
        changes = {
            "added": [name for name in new if name not in old],
            "missing": [name for name in old if name not in new],
            "resized": [f"{n} {(*new[n],)}" for n in new if new[n] != old.get(n, new[n])],
        }
        found = ", ".join(f"{what} {shorten(names)}" for what, names in changes.items() if names)
        if found:
            raise ValueError(
                f"the model's parameters are not those that are averaged: {found}; begin anew with "
                "restart()"
            )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except Exception:
        for name, module in reversed(list(model.named_modules())):  # parts before what holds them
            try:
                deepcopy(module)
            except Exception as error:
                what = f"{name or 'the model'} ({type(module).__name__}) cannot be copied"
                raise ValueError(f"{what}, so there is no average of it: {error}") from error
        raise


def _adopt(target: nn.Module, source: nn.Module, device: torch.device | str | None) -> None:
    """Register the buffers that ``source`` got, dropped or resized since the copy was made."""
    for name, buffer in source._buffers.items():
        own = target._buffers.get(name)
        if buffer is None:
            target._buffers[name] = None
        elif own is None or own.shape != buffer.shape:
            place = device if own is None else own.device
            target._buffers[name] = buffer.detach().clone().to(place)
    for name in target._buffers.keys() - source._buffers.keys():
        del target._buffers[name]
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)

"""Which layers of a model are like BatchNorm, and how: by structure, not by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from rethinking_bn.layers.frozen import FrozenStatistics, thaw_layer
from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.numerics.moments import Moments

Kind = Literal["ours", "torch", "own", "constant"]
FrozenBy = Literal["", "freeze_batch_norm", "constant", "eval mode"]

# modules of forwards that are known for what they are
_KNOWN = ("torch.nn.", "torchvision.", "detectron2.layers.", f"{__name__.partition('.')[0]}.")
# (N, C, ...) of the inputs that a copy is tried on
SPACES = ((2, 1), (), (2,), (2, 1, 1))
_TOLERANCE = 3e-5
_LAZY = "a lazy layer; run one forward first, so that it has a size"


@dataclass(frozen=True, eq=False)
class BatchNormLike:
    """One BN-like layer of a model, as it is when it is found.

    Attributes:
        name: its first name in the model; "" for the model itself.
        module: the layer.
        kind: "ours": a layer of this package. "torch": nn.BatchNorm*d, nn.SyncBatchNorm, or a
            subclass that runs their forward. "own": it trains by a forward of its own (other
            subclasses, nn.InstanceNorm*d with statistics, another project's BatchNorm).
            "constant": it normalises by its statistics in training (FrozenBatchNorm2d of anybody).
        frozen: what keeps it from training now: "freeze_batch_norm" (ours), "constant", "eval
            mode", or "".
        domains: names of its D sets of statistics; ("",) for one, () for a layer that keeps none.
        eps, momentum: as of nn.BatchNorm2d.
        pools_ranks: whether it normalises by the statistics of several ranks in training.
        mean_square: whether it keeps a mean square alone (MABN2d): a mean of 0 with that variance.
        is_batch_norm_2d: whether it is known to be BatchNorm of (N, C, H, W) and nothing else.
    """

    name: str
    module: Any
    kind: Kind
    frozen: FrozenBy
    domains: tuple[str, ...]
    eps: float
    momentum: float | None
    pools_ranks: bool
    mean_square: bool
    is_batch_norm_2d: bool

    @property
    def keeps_statistics(self) -> bool:
        """Whether it has population statistics."""
        return bool(self.domains)

    @property
    def by_batch(self) -> bool:
        """Whether inference normalises by the mini-batch."""
        return not self.domains or bool(getattr(self.module, "batch_stats_at_inference", False))

    def read(self) -> tuple[Tensor, Tensor]:
        """Return copies of mean and variance, (D, C) float64 on the CPU (zeros from "meta")."""
        if self.kind == "ours":
            mean, var = self.module.read_population()
        else:
            mean, var = self.module.running_mean[None], self.module.running_var[None]
        mean, var = _double(mean), _double(var)
        return (torch.zeros_like(mean), mean) if self.mean_square else (mean, var)

    @torch.no_grad()
    def write(self, moments: Moments) -> None:
        """Write D rows of moments in place; rows with count 0 keep theirs.

        The variance written is the unbiased one, for one value the one it had; of kind "own",
        whose moments are those of its batches, it is m2 / count.
        """
        if self.kind == "ours":
            device = next(self.module.buffers()).device  # MPS is the one without float64
            target = torch.device("cpu") if device.type == "mps" else device
            self.module.write_population(moments.to(target))
            return
        count, unbiased = float(moments.count[0]), self.kind != "own"
        if count > 0:
            self.module.running_mean.copy_(moments.mean[0])
        if count > unbiased:
            self.module.running_var.copy_(moments.variance(unbiased=unbiased)[0])

    def write_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Write a mean and a variance in place, each (D, C) in float64 on the CPU."""
        # of two values, m2 is the unbiased variance
        count = torch.full((len(mean),), 1.0 if self.kind == "own" else 2.0, dtype=mean.dtype)
        self.write(Moments(count, var if self.mean_square else mean, var))


class LeftAlone(NamedTuple):
    """A module with BatchNorm's statistics that is not known to be BatchNorm, and why."""

    name: str
    module: nn.Module
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__}): {self.reason}"


class BatchNormLikes(NamedTuple):
    """What a model has of BN-like layers, in the order of its modules."""

    layers: list[BatchNormLike]
    left: list[LeftAlone]


def find_bn_like(model: nn.Module, *, lazy: bool = False) -> BatchNormLikes:
    """Return the BN-like layers of a model, and the modules that look like one but are left alone.

    Found are subclasses of torch's norms that keep statistics or normalise by the mini-batch, this
    package's layers, and modules with ``running_mean`` and ``running_var`` (C,) whose output is
    BatchNorm's formula. The last is tried on a float64 copy, in training and eval mode, which also
    tells its eps. A copy that fails or answers otherwise (an activation that belongs to the layer,
    a scripted module) is left alone. A layer whose ``track_running_stats`` was switched off while
    it has statistics counts as one that keeps them: it infers by them.

    Raises:
        ValueError: for a lazy layer that has no size yet, by name, unless ``lazy`` leaves it alone.
    """
    found = BatchNormLikes([], [])
    parts: set[nn.Module] = set()  # of one layer of ours
    for name, module in model.named_modules():
        ours = isinstance(module, PopulationLayer)
        if module in parts or not (ours or isinstance(module, _BatchNorm) or _statistics(module)):
            continue
        if ours:
            parts.update(module.modules())
        result = _describe(name, module)
        if isinstance(result, LeftAlone):
            if result.reason == _LAZY and not lazy:
                raise ValueError(f"{name}: {_LAZY}")
            found.left.append(result)
        elif result is not None:
            found.layers.append(result)
    return found


def communicates(module: nn.Module) -> bool:
    """Return whether a module's forward in training may wait for other ranks.

    That is a SyncBatchNorm, or what says so by ``sync`` or ``communicates`` = True.
    """
    says_so = getattr(module, "sync", False) is True or getattr(module, "communicates", False)
    return bool(says_so) or any("SyncBatchNorm" in kind.__name__ for kind in type(module).__mro__)


def runs_foreign_forward(module: nn.Module) -> bool:
    """Return whether a norm runs a forward of neither a library's norm nor one of ours."""
    if "forward" in vars(module):
        return True
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return not owner.__module__.startswith(_KNOWN)


def _statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return ``running_mean`` and ``running_var`` of one shape, buffers or parameters."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    tensors.update(module.named_buffers(recurse=False))
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    if mean is None or var is None:
        return None
    return (mean, var) if is_lazy(mean) or mean.shape == var.shape else None


def _describe(name: str, module: Any) -> BatchNormLike | LeftAlone | None:
    statistics = _statistics(module)
    tensors = [*module.parameters(), *module.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        return LeftAlone(name, module, _LAZY)
    if isinstance(module, torch.jit.ScriptModule):
        return LeftAlone(name, module, "it is scripted or traced: do this before the export")
    domains: tuple[str, ...] = () if statistics is None else ("",)
    of_torch = isinstance(module, (_BatchNorm, _InstanceNorm))
    foreign = runs_foreign_forward(module)
    kind: Kind = "own"
    eps, maps = getattr(module, "eps", None), False
    if isinstance(module, PopulationLayer) and not (of_torch and foreign and domains):
        kind, maps = "ours", of_torch and not foreign
        domains = module.population_domains if domains or not of_torch else ()
    elif isinstance(module, _BatchNorm) and not foreign:
        kind, maps = "torch", not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d))
    elif statistics is not None and not isinstance(module, _InstanceNorm):
        try:
            kind, eps, maps = _try_copy(module, statistics[0])
        except _OtherAnswer as answer:
            if not of_torch:
                return LeftAlone(name, module, str(answer))
    if not tensors:
        return None  # neither affine nor statistics: nothing that could be wrong
    frozen: FrozenBy = "" if module.training else "eval mode"
    if isinstance(module, FrozenStatistics):
        frozen = "freeze_batch_norm"
    elif kind == "constant":
        frozen = "constant"
    return BatchNormLike(
        *(name, module, kind, frozen, domains, float(eps)),  # type: ignore[arg-type]
        momentum=getattr(module, "momentum", None),
        pools_ranks=communicates(module),
        mean_square=hasattr(module, "running_mean_square"),
        is_batch_norm_2d=maps,
    )


def _double(x: Tensor) -> Tensor:
    if x.is_meta:
        return torch.zeros(x.shape, dtype=torch.float64)
    return x.detach().cpu().double().clone()  # two steps: there are devices without float64


class _OtherAnswer(Exception):
    """Why a module is not known to be BatchNorm."""


def _try_copy(module: nn.Module, mean: Tensor) -> tuple[Kind, float, bool]:
    """Return kind, eps, and whether a copy takes (N, C, H, W), or raise an _OtherAnswer."""
    if communicates(module):
        raise _OtherAnswer("its forward waits for other ranks, so a copy of it cannot be tried")
    if mean.dim() != 1:
        raise _OtherAnswer(f"its statistics are {tuple(mean.shape)}, not one number per channel")
    failed = ""
    # the copy may draw random numbers; the caller's generator stays as it is
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        for space in SPACES:
            try:
                return *_answer(bare_copy(module), len(mean), space), space == SPACES[0]
            except _OtherAnswer:
                raise
            except Exception as error:
                failed = failed or f"{type(error).__name__}: {error}"
    raise _OtherAnswer(f"a copy of it cannot be tried ({failed})")


def bare_copy(module: nn.Module) -> Any:
    """Return a float64 copy on the CPU that runs nobody's hooks and is not frozen."""
    bare = object.__new__(type(module))
    for name, value in vars(module).items():
        hooks = "_hooks" in name and isinstance(value, dict)
        vars(bare)[name] = type(value)() if hooks else value
    copied = copy.deepcopy(bare)
    thaw_layer(copied)
    if any(tensor.is_meta for tensor in [*copied.parameters(), *copied.buffers()]):
        copied.to_empty(device="cpu")
    return copied.to("cpu", torch.float64).requires_grad_(False)


def _answer(copied: Any, channels: int, space: Sequence[int]) -> tuple[Kind, float]:
    """Fill a copy with known values, run it on (4, C, *space), and compare with the formula."""
    x = torch.arange(4 * channels * math.prod(space), dtype=torch.float64, device="cpu")
    x = 3 * (x.square() % 17.3).sin().view(4, channels, *space)  # any values that differ
    values = x.movedim(1, -1).flatten(0, -2)
    t = torch.arange(channels, dtype=torch.float64, device="cpu")
    mean, spread = t.cos(), 1 + 0.5 * (2 * t).sin()
    weight = _fill(copied, "weight", (0.5 * t.sin() - 1.5) * (1 - 2 * (t % 2)), other=1.0)
    bias = _fill(copied, "bias", (3 * t + 1).sin(), other=0.0)

    def run(var: Tensor) -> Tensor:
        _fill(copied, "running_mean", mean)
        _fill(copied, "running_var", var)
        out = copied.forward(x.clone())
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise _OtherAnswer("its output has another shape than its input")
        return out.double().movedim(1, -1).flatten(0, -2)

    def is_formula(out: Tensor, mean: Tensor, var: Tensor) -> bool:
        return _alike(out, (values - mean) * weight / (var + eps).sqrt() + bias)

    copied.eval()
    # with a variance of zero the steepness is 1 / sqrt(eps)
    steep = float(((run(0 * t) - bias) / ((values - mean) * weight)).median())
    eps = float(f"{steep**-2:.6g}") if 0 < steep < float("inf") else 0.0
    # the small variance tells eps under the root from eps elsewhere
    for var in (spread, 1e-3 * spread):
        if not is_formula(run(var), mean, var):
            raise _OtherAnswer("its output is not that of BatchNorm's formula")
    copied.train()
    if hasattr(copied, "momentum"):
        copied.momentum = 1.0
    out = run(spread)
    left_mean, left_var = copied.running_mean, copied.running_var
    if is_formula(out, mean, spread):
        if _alike(left_mean, mean) and _alike(left_var, spread):
            return "constant", eps
        raise _OtherAnswer("it moves the statistics that it normalises by in training")
    biased, of_batch = torch.var_mean(values, 0, correction=0)
    if not is_formula(out, of_batch, biased):
        raise _OtherAnswer("its output in training is not that of BatchNorm's formula")
    unbiased = biased * len(values) / (len(values) - 1)
    if _alike(left_mean, of_batch) and (_alike(left_var, biased) or _alike(left_var, unbiased)):
        return "own", eps
    raise _OtherAnswer("it does not leave a batch's statistics in its buffers with momentum 1.0")


def _fill(module: Any, name: str, values: Tensor, other: float = 0.0) -> Tensor:
    """Give a module's tensor these values; return them, or ``other`` where there is none."""
    target = getattr(module, name, None)
    if isinstance(target, Tensor) and target.numel() == values.numel():
        target.copy_(values.view(target.shape))
        return values
    return torch.full_like(values, other)


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)

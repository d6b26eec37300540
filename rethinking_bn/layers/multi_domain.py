"""BatchNorm over several domains at once, with the three choices of the paper's Table 5.

Shared tensors have the keys of nn.BatchNorm2d (``running_mean``, ``weight``), domain-specific ones
live in a child per domain (``0.running_mean``, ``0.weight``). As the two layouts share no key, a
checkpoint of one loads into the other by conversion, under any checkpointer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.fx import Proxy

from rethinking_bn.layers.population_layer import PopulationLayer, as_leaf, check_eps
from rethinking_bn.numerics.moments import (
    Moments,
    affine_normalize,
    exported_normalize,
    mix_statistics,
)
from rethinking_bn.numerics.running import write_statistics

logger = logging.getLogger(__name__)

Choice = Literal["shared", "domain_specific"]
CHOICES: tuple[Choice, ...] = ("shared", "domain_specific")
_S, _D = CHOICES
_ROWS = ((_S, _S, _S), (_S, _D, _S), (_D, _S, _S), (_D, _D, _S), (_D, _S, _D), (_D, _D, _D))
# Row of Table 5 -> the three choices, as keyword arguments.
TABLE_5: dict[int, dict[str, Choice]] = {
    row: dict(zip(("train_stats", "population_stats", "affine"), choices, strict=True))
    for row, choices in enumerate(_ROWS, start=1)
}


class DomainState(nn.Module):
    """Holder of one domain's tensors; the multi-domain layer computes with them."""


def add_affine(module: nn.Module, num_features: int, **factory: Any) -> None:
    """Give a module the affine of nn.BatchNorm2d: weight 1 and bias 0, each (C,)."""
    module.weight = nn.Parameter(torch.ones(num_features, **factory))
    module.bias = nn.Parameter(torch.zeros(num_features, **factory))


def add_statistics(module: nn.Module, num_features: int, **factory: Any) -> None:
    """Give a module the buffers of nn.BatchNorm2d: mean 0 and variance 1, each (C,)."""
    module.register_buffer("running_mean", torch.zeros(num_features, **factory))
    module.register_buffer("running_var", torch.ones(num_features, **factory))
    counter = torch.tensor(0, dtype=torch.long, device=factory.get("device"))
    module.register_buffer("num_batches_tracked", counter)


class DomainBatchNormBase(PopulationLayer, nn.Module):
    """What layers with several domains share; arguments as of :class:`MultiDomainBatchNorm2d`."""

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        weight: Any  # as the bias, on the layer itself where the domains share it
        bias: Any
        running_mean: Any
        running_var: Any
    __jit_unused_properties__ = ["population_domains"]
    batch_stats_at_inference = False

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        *,
        train_stats: Choice = "shared",
        population_stats: Choice = "shared",
        affine: Choice = "shared",
        sync: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_features", num_features), ("num_domains", num_domains)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        choices = {"train_stats": train_stats, "population_stats": population_stats}
        for name, choice in {**choices, "affine": affine}.items():
            if choice not in CHOICES:
                raise ValueError(f"{name} must be one of {CHOICES}, got {choice!r}")
        check_eps(eps)
        self.num_features, self.num_domains = num_features, num_domains
        self.population_stats, self.affine = population_stats, affine
        self.eps, self.momentum = eps, momentum
        self.train_stats, self.sync, self.process_group = train_stats, sync, process_group
        if "domain_specific" in (population_stats, affine):
            for level in range(num_domains):
                self.add_module(str(level), DomainState())
        for module in self._domains(affine):
            add_affine(module, num_features, device=device, dtype=dtype)
        for module in self._domains(population_stats):
            add_statistics(module, num_features, device=device, dtype=dtype)

    def _domains(self, choice: Choice) -> list[Any]:
        """Return the holders of the shared tensors (one) or of each domain's (L)."""
        if choice == "shared":
            return [self]
        return [self._modules[str(level)] for level in range(self.num_domains)]

    def infer_levels(self, xs: list[Tensor]) -> list[Tensor]:
        """Normalise L feature maps by the population statistics, as TorchScript can read it.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError("a scripted multi-domain BatchNorm is for inference only")
        # what hasattr denies is not compiled
        if hasattr(self, "running_mean"):
            statistics = [(self.running_mean, self.running_var)] * self.num_domains
        else:
            statistics = [(d.running_mean, d.running_var) for d in self.children()]
        if hasattr(self, "weight"):
            affine = [(self.weight, self.bias)] * self.num_domains
        else:
            affine = [(d.weight, d.bias) for d in self.children()]
        outputs: list[Tensor] = []
        for x, (mean, var), (weight, bias) in zip(xs, statistics, affine):  # noqa: B905
            outputs.append(exported_normalize(x, mean, var, weight, bias, self.eps))
        return outputs

    @property
    def population_domains(self) -> tuple[str, ...]:
        if self.population_stats == "shared":
            return ("",)
        return tuple(str(level) for level in range(self.num_domains))

    def read_population(self) -> tuple[Tensor, Tensor]:
        holders = self._domains(self.population_stats)
        mean = torch.stack([h.running_mean for h in holders])
        return mean, torch.stack([h.running_var for h in holders])

    def write_population(self, moments: Moments) -> None:
        write_statistics(self._domains(self.population_stats), moments)

    def reset_running_stats(self) -> None:
        """Set every population statistic to mean 0, variance 1, as nn.BatchNorm2d does."""
        for holder in self._domains(self.population_stats):
            holder.running_mean.zero_()
            holder.running_var.fill_(1)
            holder.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set the layer to what it was when built, as nn.BatchNorm2d does."""
        self.reset_running_stats()
        for holder in self._domains(self.affine):
            nn.init.ones_(holder.weight)
            nn.init.zeros_(holder.bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            _convert_layout(self, state_dict, prefix, error_msgs)
            # counters carry no statistics: a checkpoint without them is complete
            for name, buffer in self.named_buffers():
                if name.endswith("num_batches_tracked"):
                    state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_domains={self.num_domains}, train_stats={self.train_stats}, "
            f"population_stats={self.population_stats}, affine={self.affine}, sync={self.sync}, "
            f"eps={self.eps}, momentum={self.momentum}"
        )


class MultiDomainBatchNorm2d(DomainBatchNormBase):
    """Batch normalisation of L feature maps that share one layer, such as the FPN levels.

    The choices and the rows of Table 5 (arXiv 2105.07576, section 5.2), as
    train_stats / population_stats / affine:

    ===  ===============  ===============  ===============
    row  train_stats      population       affine
    ===  ===============  ===============  ===============
    1    shared           shared           shared
    2    shared           domain_specific  shared
    3    domain_specific  shared           shared
    4    domain_specific  domain_specific  shared
    5    domain_specific  shared           domain_specific
    6    domain_specific  domain_specific  domain_specific
    ===  ===============  ===============  ===============

    Shared train statistics equal nn.BatchNorm2d on the levels concatenated along space, without
    the concatenated copy. Row 3 equals one nn.BatchNorm2d called level after level, running
    statistics included; row 6 equals L separate ones. With domain-specific population statistics
    every level's EMA follows that level's own moments, whatever it was normalised by.

    Args:
        num_features: C.
        num_domains: L.
        train_stats: whose statistics normalise in training.
        population_stats: whose statistics normalise at inference.
        affine: whether the levels share weight and bias.
        sync: pool over the ranks of ``process_group``: one collective in the forward and one in
            the backward, however many levels. Every rank must run the layer equally often;
            any of its levels may be empty.
        eps: added to the variance.
        momentum: fraction of the new value in the EMA; None: cumulative average.
        process_group: None: the default group.

    Shape:
        list of L tensors (N, C, H_l, W_l) -> list of L tensors of the same shapes and type. Half
        types are normalised by float32 statistics. A level's domain is its place in the list.

    Raises:
        ValueError: for an unknown choice, fewer than one feature or domain, an eps of 0 or less, or
            an input that is not L tensors (N, C, H, W).
    """

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self.infer_levels(xs)
        else:  # not compiled by TorchScript
            for x in xs:
                if isinstance(x, Proxy):
                    return as_leaf(self, xs)
            self._check(xs)
            return self._run(list(xs))

    def _run(self, xs: list[Tensor]) -> list[Tensor]:
        if not (self.training or self.batch_stats_at_inference):
            return [self._infer(x, level) for level, x in enumerate(xs)]
        one, each = [0] * len(xs), list(range(len(xs)))
        # Population training normalises by what inference will use.
        train_stats = self.population_stats if self._is_observed() else self.train_stats
        all_shared = train_stats == self.population_stats == "shared"
        parts = one if all_shared else each
        pools = [0] if all_shared else one if train_stats == "shared" else each
        affine = self._domains(self.affine)
        weights, biases = [h.weight for h in affine], [h.bias for h in affine]
        holders = self._domains(self.population_stats)
        return self._normalize(xs, weights, biases, parts, pools, holders)

    def _infer(self, x: Tensor, level: int) -> Tensor:
        stats: Any = self if self.population_stats == "shared" else self._modules[str(level)]
        affine: Any = self if self.affine == "shared" else self._modules[str(level)]
        state = (stats.running_mean, stats.running_var, affine.weight, affine.bias)
        return affine_normalize(x, *state, self.eps)

    def _check(self, xs: Sequence[Tensor]) -> None:
        if isinstance(xs, Tensor) or len(xs) != self.num_domains:
            got = f"a tensor {tuple(xs.shape)}" if isinstance(xs, Tensor) else f"{len(xs)} tensors"
            raise ValueError(f"expected a list of {self.num_domains} tensors, got {got}")
        for level, x in enumerate(xs):
            shape = x.shape
            if len(shape) != 4 or shape[1] != self.num_features:
                raise ValueError(
                    f"level {level} must be (N, {self.num_features}, H, W), got {tuple(shape)}"
                )


def _convert_layout(layer: Any, state: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Rewrite the entries under ``prefix`` from the layout they have to that of a layer."""
    levels = layer.num_domains
    for name in ("running_mean", "weight"):
        extra = f"{prefix}{levels}.{name}"
        if extra in state:
            error_msgs.append(f"{extra}: the checkpoint has more domains than the layer's {levels}")
            return
    for what, choice, names in (
        ("statistics", layer.population_stats, ("running_mean", "running_var")),
        ("affine", layer.affine, ("weight", "bias")),
    ):
        shared = [prefix + name for name in names]
        separate = [[f"{prefix}{level}.{name}" for level in range(levels)] for name in names]
        flat = [key for keys in separate for key in keys]
        wanted, other = (shared, flat) if choice == "shared" else (flat, shared)
        absent = [key for key in wanted if key not in state]
        if not absent:
            continue
        counter = prefix + "num_batches_tracked"
        counters = [f"{prefix}{level}.num_batches_tracked" for level in range(levels)]
        if not all(key in state for key in other):
            error_msgs.append(f"{absent[0]} is not in the checkpoint, nor can it be converted")
            continue
        if choice == "domain_specific":
            if what == "statistics" and counter in state:
                shared, separate = [*shared, counter], [*separate, counters]
            for source, targets in zip(shared, separate, strict=True):
                value = state.pop(source)
                # clones: load_state_dict(assign=True) keeps the very tensors
                state.update((target, value.clone()) for target in targets)
            done = f"shared {what} of the checkpoint copied to {levels} domains"
        elif what == "affine":
            error_msgs.append(f"{absent[0]}: {levels} different affines cannot become a shared one")
            continue
        else:
            mean, variance = (torch.stack([state.pop(key) for key in keys]) for keys in separate)
            state.update(zip(shared, mix_statistics(mean, variance), strict=True))
            counts = [state.pop(key) for key in counters if key in state]
            if counts:
                state[counter] = counts[0]
            done = f"domain-specific {what} of the checkpoint mixed with equal weights"
        due = "; population training is due" if what == "statistics" else ""
        logger.info("%s: %s%s", prefix.rstrip("."), done, due)

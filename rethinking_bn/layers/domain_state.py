"""The state of a multi-domain BatchNorm: shared or per-domain statistics and affine.

Shared tensors have the keys of nn.BatchNorm2d (``running_mean``, ``weight``), domain-specific ones
live in a child per domain (``0.running_mean``, ``0.weight``). As the two layouts share no key, a
checkpoint of one loads into the other by conversion, under any checkpointer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rethinking_bn.layers.population_layer import PopulationLayer, check_eps
from rethinking_bn.numerics.moments import Moments, exported_normalize, mix_statistics
from rethinking_bn.numerics.running import write_statistics

Choice = Literal["shared", "domain_specific"]
CHOICES: tuple[Choice, ...] = ("shared", "domain_specific")

logger = logging.getLogger(__name__)


def check_choice(name: str, value: str) -> None:
    """Raise a ValueError that names the choices unless ``value`` is one of them."""
    if value not in CHOICES:
        raise ValueError(f"{name} must be one of {CHOICES}, got {value!r}")


class DomainState(nn.Module):
    """Holder of one domain's tensors; the multi-domain layer computes with them."""

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        weight: nn.Parameter
        bias: nn.Parameter
        running_mean: Tensor
        running_var: Tensor
        num_batches_tracked: Tensor


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
    """Parameters, population statistics and checkpoint conversion of multi-domain BatchNorm.

    Args:
        num_features: C.
        num_domains: L, how many domains (feature levels) there are.
        population_stats, affine: "shared" or "domain_specific".
        momentum: fraction of the new value in the EMA; None: cumulative average.

    Raises:
        ValueError: for other choices, fewer than one feature or domain, or an eps of 0 or less.
    """

    __jit_unused_properties__ = ["population_domains"]

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        *,
        population_stats: Choice,
        affine: Choice,
        eps: float,
        momentum: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_features", num_features), ("num_domains", num_domains)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        check_choice("population_stats", population_stats)
        check_choice("affine", affine)
        check_eps(eps)
        self.num_features, self.num_domains = num_features, num_domains
        self.population_stats, self.affine = population_stats, affine
        self.eps, self.momentum = eps, momentum
        factory = {"device": device, "dtype": dtype}
        if "domain_specific" in (population_stats, affine):
            for level in range(num_domains):
                self.add_module(str(level), DomainState())
        for module in self._affine_holders():
            add_affine(module, num_features, **factory)
        for module in self._statistics_holders():
            add_statistics(module, num_features, **factory)

    def _domains(self, choice: Choice) -> list[Any]:
        if choice == "shared":
            return [self]
        return [self._modules[str(level)] for level in range(self.num_domains)]

    def _affine_holders(self) -> list[Any]:
        return self._domains(self.affine)

    def _statistics_holders(self) -> list[Any]:
        return self._domains(self.population_stats)

    def _affine_rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights and biases (C,): one when shared, L when domain-specific."""
        if self.affine == "shared":
            return [self.weight], [self.bias]  # type: ignore[list-item]
        holders = self._affine_holders()
        return [h.weight for h in holders], [h.bias for h in holders]

    def _statistics_of(self, level: int) -> Any:
        return self if self.population_stats == "shared" else self._modules[str(level)]

    def _affine_of(self, level: int) -> Any:
        return self if self.affine == "shared" else self._modules[str(level)]

    def infer_levels(self, xs: list[Tensor]) -> list[Tensor]:
        """Normalise L feature maps by the population statistics, as TorchScript can read it.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError("a scripted multi-domain BatchNorm is for inference only")
        means: list[Tensor] = []
        variances: list[Tensor] = []
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        # the loops are unrolled, and what hasattr denies is not compiled
        if hasattr(self, "running_mean"):
            for _ in range(self.num_domains):
                means.append(self.running_mean)  # type: ignore[arg-type]
                variances.append(self.running_var)  # type: ignore[arg-type]
        else:
            for domain in self.children():
                means.append(domain.running_mean)  # type: ignore[arg-type]
                variances.append(domain.running_var)  # type: ignore[arg-type]
        if hasattr(self, "weight"):
            for _ in range(self.num_domains):
                weights.append(self.weight)  # type: ignore[arg-type]
                biases.append(self.bias)  # type: ignore[arg-type]
        else:
            for domain in self.children():
                weights.append(domain.weight)  # type: ignore[arg-type]
                biases.append(domain.bias)  # type: ignore[arg-type]
        outputs: list[Tensor] = []
        for i, x in enumerate(xs):
            outputs.append(
                exported_normalize(x, means[i], variances[i], weights[i], biases[i], self.eps)
            )
        return outputs

    @property
    def population_domains(self) -> tuple[str, ...]:
        if self.population_stats == "shared":
            return ("",)
        return tuple(str(level) for level in range(self.num_domains))

    def read_population(self) -> tuple[Tensor, Tensor]:
        holders = self._statistics_holders()
        mean = torch.stack([h.running_mean for h in holders])
        return mean, torch.stack([h.running_var for h in holders])

    def write_population(self, moments: Moments) -> None:
        write_statistics(self._statistics_holders(), moments)

    def reset_running_stats(self) -> None:
        """Set every population statistic to mean 0, variance 1, as nn.BatchNorm2d does."""
        for holder in self._statistics_holders():
            holder.running_mean.zero_()
            holder.running_var.fill_(1)
            holder.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set the layer to what it was when built, as nn.BatchNorm2d does."""
        self.reset_running_stats()
        for holder in self._affine_holders():
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
            _convert(self, state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _convert(
    layer: DomainBatchNormBase, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
) -> None:
    """Rewrite the entries under ``prefix`` from the layout they have to the one the layer has."""
    levels = layer.num_domains
    per_level = {
        name: [f"{prefix}{level}.{name}" for level in range(levels)]
        for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
    }
    for name in ("running_mean", "weight"):
        extra = f"{prefix}{levels}.{name}"
        if extra in state_dict:
            error_msgs.append(f"{extra}: the checkpoint has more domains than the layer's {levels}")
            return
    for names, choice in (
        (("running_mean", "running_var"), layer.population_stats),
        (("weight", "bias"), layer.affine),
    ):
        is_affine = names[0] == "weight"
        shared = [prefix + name for name in names]
        separate = [key for name in names for key in per_level[name]]
        wanted, other = (shared, separate) if choice == "shared" else (separate, shared)
        if all(key in state_dict for key in wanted):
            continue
        absent = next(key for key in wanted if key not in state_dict)
        if not all(key in state_dict for key in other):
            error_msgs.append(f"{absent} is not in the checkpoint, nor can it be converted")
        elif choice == "domain_specific":
            for name in (*names, *(() if is_affine else ("num_batches_tracked",))):
                _copy_to_levels(state_dict, prefix + name, per_level[name])
            _log(prefix, "shared", f"copied to {levels} domains", is_affine)
        elif is_affine:
            error_msgs.append(f"{absent}: {levels} different affines cannot become a shared one")
        else:
            mean, variance = (
                torch.stack([state_dict.pop(key) for key in per_level[name]]) for name in names
            )
            mixed = mix_statistics(mean, variance)
            state_dict[prefix + names[0]], state_dict[prefix + names[1]] = mixed
            counters = [state_dict.pop(k, None) for k in per_level["num_batches_tracked"]]
            if counters[0] is not None:
                state_dict[prefix + "num_batches_tracked"] = counters[0]
            _log(prefix, "domain-specific", "mixed with equal weights", is_affine)
    # counters carry no statistics: a checkpoint without them is complete
    for level, holder in enumerate(layer._statistics_holders()):
        name = "" if holder is layer else f"{level}."
        state_dict.setdefault(f"{prefix}{name}num_batches_tracked", holder.num_batches_tracked)


def _copy_to_levels(state_dict: dict[str, Any], source: str, targets: list[str]) -> None:
    value = state_dict.pop(source, None)
    if value is not None:
        # clones: load_state_dict(assign=True) keeps the very tensors
        state_dict.update((target, value.clone()) for target in targets)


def _log(prefix: str, source: str, action: str, is_affine: bool) -> None:
    what = "affine" if is_affine else "statistics"
    due = "" if is_affine else "; population training is due"
    logger.info("%s: %s %s of the checkpoint %s%s", prefix.rstrip("."), source, what, action, due)

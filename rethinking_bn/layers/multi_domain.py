"""BatchNorm over several domains at once, with the three choices of the paper's Table 5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import Proxy

from rethinking_bn.layers.domain_state import Choice, DomainBatchNormBase, check_choice
from rethinking_bn.layers.population_layer import as_leaf
from rethinking_bn.numerics.moments import affine_normalize
from rethinking_bn.numerics.normalize import normalize

_S: Choice = "shared"
_D: Choice = "domain_specific"
_ROWS = ((_S, _S, _S), (_S, _D, _S), (_D, _S, _S), (_D, _D, _S), (_D, _S, _D), (_D, _D, _D))
# Row of Table 5 -> the three choices, as keyword arguments.
TABLE_5: dict[int, dict[str, Choice]] = {
    row: dict(zip(("train_stats", "population_stats", "affine"), choices, strict=True))
    for row, choices in enumerate(_ROWS, start=1)
}


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
        ValueError: for an unknown choice, or an input that is not L tensors (N, C, H, W).
    """

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
        check_choice("train_stats", train_stats)
        super().__init__(
            num_features,
            num_domains,
            population_stats=population_stats,
            affine=affine,
            eps=eps,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.train_stats, self.sync, self.process_group = train_stats, sync, process_group

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
        by_batch = self.training or self.batch_stats_at_inference
        return self._normalize_batch(xs) if by_batch else self._infer(xs)

    def _infer(self, xs: list[Tensor]) -> list[Tensor]:
        outputs = []
        for level, x in enumerate(xs):
            stats, affine = self._statistics_of(level), self._affine_of(level)
            outputs.append(
                affine_normalize(
                    x, stats.running_mean, stats.running_var, affine.weight, affine.bias, self.eps
                )
            )
        return outputs

    def _normalize_batch(self, xs: list[Tensor]) -> list[Tensor]:
        one, each = [0] * len(xs), list(range(len(xs)))
        # Population training normalises by what inference will use.
        observed = self._is_observed()
        train_stats = self.population_stats if observed else self.train_stats
        all_shared = train_stats == self.population_stats == "shared"
        parts = one if all_shared else each
        pools = [0] if all_shared else one if train_stats == "shared" else each
        weight, bias = self._affine_rows()
        outputs, local = normalize(
            xs,
            weight,
            bias,
            parts=parts,
            pools=pools,
            eps=self.eps,
            sync=self.sync and self.training,
            group=self.process_group,
            holders=self._statistics_holders() if self.training and not observed else (),
            momentum=self.momentum,
            report=observed,
        )
        self._report(local)
        return outputs

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

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_domains={self.num_domains}, train_stats={self.train_stats}, "
            f"population_stats={self.population_stats}, affine={self.affine}, sync={self.sync}, "
            f"eps={self.eps}, momentum={self.momentum}"
        )

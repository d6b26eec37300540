"""Drop-in replacements for nn.BatchNorm2d on the package's numeric core."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.fx import Proxy

from rethinking_bn.distributed import get_world_size
from rethinking_bn.layers.population_layer import PopulationLayer, as_leaf, check_eps
from rethinking_bn.numerics.moments import Moments, affine_normalize, exported_normalize, merged
from rethinking_bn.numerics.running import write_statistics

logger = logging.getLogger(__name__)


@cache
def _say_alone() -> None:
    logger.info("SyncBN in one process: normalising by its own batch, as BN does")


class BatchNorm2d(PopulationLayer, nn.BatchNorm2d):
    """nn.BatchNorm2d that takes every input of a detection head, with the same state dict.

    An empty batch leaves the statistics alone, a single value per channel has variance 0 and leaves
    running_var alone, and a batch that is not finite, after an overflow in mixed precision, moves
    nothing. The layer can be told which rows form a normalisation batch, see :meth:`row_groups` and
    ``rows_at_a_time``. Otherwise values, gradients and buffers equal nn.BatchNorm2d's.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as nn.BatchNorm2d.

    Shape:
        (N, C, H, W) -> (N, C, H, W), in the input's type; float32 statistics for half types.

    Raises:
        ValueError: for an eps that is not positive, and for an input of another shape.
    """

    __constants__ = [*nn.BatchNorm2d.__constants__, "batch_stats_at_inference", "rows_at_a_time"]
    __jit_unused_properties__ = ["population_domains"]

    sync = False
    _scripts_batch_statistics = True
    batch_stats_at_inference = False
    #: k > 0: normalise k consecutive rows at a time in training (each row by itself where
    #: inference takes mini-batch statistics), unless ``row_groups`` says otherwise; 0: all rows
    rows_at_a_time = 0
    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        process_group: ProcessGroup | None
        _groups: tuple[int, ...] | None
    process_group = None
    _groups = None

    def __init__(self, num_features: int, eps: float = 1e-5, *args: Any, **options: Any) -> None:
        super().__init__(num_features, eps, *args, **options)
        check_eps(eps)

    @contextmanager
    def row_groups(self, sizes: Sequence[int] | None) -> Iterator[None]:
        """Normalise consecutive groups of rows apart, such as the RoIs of one image each.

        The normalisation batch size (NBS) of section 4 of arXiv 2105.07576. The groups share
        population statistics: the EMA takes one step per group that has a row. A forward that
        activation checkpointing recomputes is normalised as the context says that holds then, so
        the backward belongs inside it, too.

        Args:
            sizes: rows of each group, their sum the batch size; None: all rows together.

        Raises:
            ValueError: in the forward, for a batch of another size.
        """
        before = self._groups
        self._groups = None if sizes is None else tuple(sizes)
        try:
            yield
        finally:
            self._groups = before

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._infer_exported(input)
        else:  # not compiled by TorchScript
            if isinstance(input, Proxy):
                return as_leaf(self, input)
            if input.dim() != 4 or input.shape[1] != self.num_features:
                raise ValueError(
                    f"expected (N, {self.num_features}, H, W), got {tuple(input.shape)}"
                )
            if self.training or self.batch_stats_at_inference or self.running_mean is None:
                return self._normalize_batch(input)
            mean, var = self.running_mean, self.running_var
            assert mean is not None and var is not None  # for the type checker
            return affine_normalize(input, mean, var, self.weight, self.bias, self.eps)

    def _infer_exported(self, input: Tensor) -> Tensor:
        """Inference whose graph holds for every input size; read by TorchScript, too."""
        if self.training:
            raise RuntimeError("a scripted BatchNorm2d is for inference only")
        mean, var = self.running_mean, self.running_var
        if self.batch_stats_at_inference:
            mean, var = None, None
        if mean is None and self.rows_at_a_time > 0:  # each row by itself
            return torch.instance_norm(
                input, self.weight, self.bias, None, None, True, 0.0, self.eps, True
            )
        return exported_normalize(input, mean, var, self.weight, self.bias, self.eps)

    def _normalize_batch(self, x: Tensor) -> Tensor:
        if not self.training:
            rows_apart = self.rows_at_a_time > 0 and self._groups is None and len(x) > 0
            if rows_apart or torch.jit.is_tracing() or torch.compiler.is_compiling():
                # in one pass; what follows makes constants of the input's size
                if not self._groups or len(self._groups) == 1:
                    return self._infer_exported(x)
                return torch.cat([self._infer_exported(part) for part in x.split(self._groups)])
        groups = self._groups_of(x)
        apart = groups is not None and len(groups) != 1 and (len(groups) > 0 or len(x) > 0)
        xs = x.split(groups) if groups is not None and apart else [x]
        each = list(range(len(xs)))
        kept = self.track_running_stats and self.running_mean is not None
        counted = self.momentum is not None or self.num_batches_tracked is not None
        holders = [self] if kept and counted else []
        outputs = self._normalize(xs, self.weight, self.bias, each, each, holders)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _report(self, moments: Moments) -> None:
        super()._report(merged(moments))

    def _groups_of(self, x: Tensor) -> tuple[int, ...] | None:
        if self._groups is not None:
            if sum(self._groups) != len(x):
                raise ValueError(
                    f"row groups {self._groups} do not sum up to the {len(x)} rows given"
                )
            return self._groups
        if not self.rows_at_a_time:
            return None
        if self.sync and self.training:
            raise ValueError("rows_at_a_time: a synchronised layer pools all rows of all ranks")
        k = self.rows_at_a_time if self.training else 1
        if len(x) % k:
            raise ValueError(f"{len(x)} rows cannot be normalised {k} at a time")
        return (k,) * (len(x) // k)

    def read_population(self) -> tuple[Tensor, Tensor]:
        if self.running_mean is None or self.running_var is None:
            raise ValueError("a layer with track_running_stats=False has no population statistics")
        return self.running_mean.clone()[None], self.running_var.clone()[None]

    def write_population(self, moments: Moments) -> None:
        write_statistics([self], moments)


class SyncBatchNorm2d(BatchNorm2d):
    """BatchNorm whose train statistics are pooled over ranks, weighted by count.

    It equals BatchNorm on all ranks' data at once whatever each rank holds, nothing included; the
    affine's gradients are rank-local sums. Over any backend it takes one all_gather in the forward
    and one all_reduce in the backward. With one process it is plain BatchNorm (a log line says so).

    Args:
        process_group: the ranks to pool over; None: the default group.
        num_features, eps, momentum, affine, track_running_stats, options: as nn.BatchNorm2d.

    Shape:
        (N, C, H, W) -> (N, C, H, W); N may be 0. Every rank must call it equally often.
    """

    sync = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.process_group = process_group

    @contextmanager
    def row_groups(self, sizes: Sequence[int] | None) -> Iterator[None]:
        """Refuse groups: pooled over ranks, rows cannot also be kept apart.

        Raises:
            ValueError: for more than one group.
        """
        if sizes is not None and len(sizes) > 1:
            raise ValueError("SyncBatchNorm2d pools all rows of all ranks, row groups do not apply")
        yield

    def _normalize_batch(self, x: Tensor) -> Tensor:
        # a compiler cannot trace logging
        if self.training and not torch.compiler.is_compiling():
            if get_world_size(self.process_group) == 1:
                _say_alone()
        return super()._normalize_batch(x)


class BatchStatNorm2d(BatchNorm2d):
    """BatchNorm that normalises by the mini-batch at inference too.

    Table 3 and Figure 5 of arXiv 2105.07576: at small normalisation batch sizes, mini-batch
    statistics at inference agree with training where population statistics do not. Buffers are
    kept up in training, so checkpoints are those of nn.BatchNorm2d in both directions.

    Shape:
        (N, C, H, W) -> (N, C, H, W). An empty batch gives an empty result; a single value per
        channel has variance 0 and gives the bias.
    """

    batch_stats_at_inference = True

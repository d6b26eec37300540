"""Moving average batch normalisation (MABN) for mini-batches of one or two images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from rethinking_bn.layers.mabn.functional import Statistics, mabn_normalize, mean_square
from rethinking_bn.layers.mabn.state import MABNState
from rethinking_bn.numerics.channel_ops import affine_normalize
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.recomputation import is_recomputing


class MABN2d(MABNState):
    """Moving average batch normalisation (Yan et al., ICLR 2020, arXiv 2001.06838).

    Normalises by the root mean square and centres nothing: the convolution before it should be a
    :class:`CenConv2d`. With m = simulated_batch_size / batch_size, iterations t from 1 and means
    over N, H and W per channel:

        s = mean(x²)
        S = s while t <= m or t < warmup_iters, then the mean of the last m values of s
        r = 1 while t <= max(correction_start, warmup_iters),
            then sqrt(S + eps) / sqrt(R + eps), clipped to [1 / r_max, r_max]
        R = (1 - momentum) · R + momentum · S
        y = weight · r · x / sqrt(S + eps) + bias

    In the backward the mean of g · z (g = dy · weight · r, z = x / sqrt(S + eps)) is replaced in
    the same way by its mean over the last m backward passes, so after the warm-up the gradient is
    not the derivative of the forward, on purpose. In evaluation mode y is one affine per channel,
    weight · x / sqrt(R + eps) + bias.

    **What one iteration is.** One call in training mode. A layer cannot see where a forward of
    the model begins, and a guess (after every backward, say) would make the statistics depend on
    the training loop, so a layer called L times per forward counts L iterations, as
    ``nn.BatchNorm2d`` moves its statistics L times. To count one, pass all inputs in one call:
    ``forward([x_1, ..., x_L])`` pools them into one s, one S and one p, and returns a list. The
    mean over the last m values of p counts backward passes: a forward without one (under
    ``torch.no_grad``) is an iteration, and its p is simply absent. A call whose inputs are all
    empty returns empty and is no iteration.

    **Activation checkpointing.** A training forward inside a backward pass is taken for a
    recomputation: it counts nothing, writes nothing and normalises by what its first pass used.

    **Several processes.** Statistics are those of this rank; nothing is exchanged. Population
    training (``rethinking_bn.population``) makes ``running_mean_square`` equal on all ranks.

    **Mixed precision.** Half types come back as they went in; statistics and state are float32
    (float64 in a float64 module), also after ``.half()``. A value that is not finite enters no
    statistic. The p of a gradient scaler's scaled gradients are averaged as they come, so for m
    backward passes after the scale changed their average is a little off.

    **Freezing.** ``eval()`` stops every update until the next ``train()``; :meth:`freeze` stops
    them for good.

    Checkpoints load whatever m was: the averages keep their newest values. Without the values (an
    inference-only checkpoint) t starts at 0 again with the R of the checkpoint. What the official
    code saved (``running_var`` of shape (1, C, 1, 1), ``buffer_x2``, ...) is recognised.

    Args:
        num_features: C.
        simulated_batch_size: images whose statistics are averaged.
        batch_size: images per call and rank. None reads N off the first training input, which is
            right only where N counts images: give it for layers that see RoIs.
        eps: added to the mean square.
        momentum: fraction of the new value in R, in (0, 1].
        warmup_iters: iterations before moving averages are used.
        r_max: r is kept within [1 / r_max, r_max].
        correction_start: iterations, if more than ``warmup_iters``, with r = 1.
        affine: whether there are a weight and a bias.

    Raises:
        ValueError: when ``batch_size`` does not divide ``simulated_batch_size``, or an argument is
            out of its range.

    State dict: ``weight``, ``bias``, ``running_mean_square`` (C,), and for resuming
    ``mean_square_ring.{count, last_<m>}``, ``gradient_ring.{count, last_<m>}``.
    """

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Normalise one tensor (N, C, H, W), or several that share their statistics.

        Returns:
            the same shapes and type; a list for several.

        Raises:
            ValueError: when an input is not (N, C, H, W), or ``batch_size`` was to be read off
                an input and does not divide the simulated one.
        """
        if isinstance(x, Tensor):
            return self._forward([x])[0]
        return self._forward(list(x))

    def _forward(self, xs: list[Tensor]) -> list[Tensor]:
        for x in xs:
            if x.dim() != 4 or x.shape[1] != self.num_features:
                raise ValueError(
                    f"MABN2d({self.num_features}) expects (N, {self.num_features}, H, W), "
                    f"got {tuple(x.shape)}"
                )
        if not self.training:
            running = self.running_mean_square
            zero = torch.zeros_like(running)
            return [
                affine_normalize(x, zero, running, self.weight, self.bias, self.eps) for x in xs
            ]
        return self._train_forward(xs)

    def _train_forward(self, xs: list[Tensor]) -> list[Tensor]:
        if getattr(self, "_is_replica", False):
            raise RuntimeError("MABN2d does not work in nn.DataParallel: use one process per GPU")
        present = [x for x in xs if x.numel() > 0]
        if self._observer is not None:
            return self._observed_forward(xs, present)
        if not present:
            return self._empty(xs)
        recomputing = is_recomputing()
        with torch.no_grad():
            _, own = mean_square(present)
            statistics = self._records.recall(own) if recomputing else None
            known = statistics is not None
            if statistics is None:
                statistics = self.advance(own, len(present[0]))
        outputs = mabn_normalize(
            xs, self.weight, self.bias, statistics, self.eps, self.average_gradient
        )
        if not known and not torch.is_inference_mode_enabled():
            self._records.remember(statistics, hold=not outputs[0].requires_grad)
        return outputs

    def _observed_forward(self, xs: list[Tensor], present: list[Tensor]) -> list[Tensor]:
        """Normalise by the input itself with r = 1, report it, and leave all state alone."""
        with torch.no_grad():
            nothing = (0, torch.zeros_like(self.running_mean_square))
            n, own = mean_square(present) if present else nothing
            if self._observer is not None and not is_recomputing():
                mean = own[None]
                count = mean.new_full((1,), float(n))
                # A population of mean squares: its mean is what R estimates, without a spread.
                self._observer(Moments(count, mean, torch.zeros_like(mean)))
        if not present:
            return self._empty(xs)
        statistics = Statistics(own, own, torch.ones_like(own), moving=False)
        return mabn_normalize(xs, self.weight, self.bias, statistics, self.eps, _no_average)

    def _empty(self, xs: list[Tensor]) -> list[Tensor]:
        one = torch.ones_like(self.running_mean_square)
        return [affine_normalize(x, one, one, self.weight, self.bias, self.eps) for x in xs]


def _no_average(p: Tensor, moving: bool | Tensor) -> Tensor:
    return p

"""Moving average batch normalisation (MABN) and its centred convolution, arXiv 2001.06838."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from rethinking_bn.layers.multi_domain import add_affine
from rethinking_bn.layers.population_layer import PopulationLayer, as_leaf, check_eps
from rethinking_bn.layers.ring import FullPrecisionBuffers, ValueRing, convert_official
from rethinking_bn.numerics.moments import Moments, affine_normalize, exported_normalize
from rethinking_bn.numerics.moving_average import Statistics, mabn_normalize, mean_square
from rethinking_bn.randomness import Forwards, is_recomputing


class MABN2d(PopulationLayer, FullPrecisionBuffers):
    """Moving average batch normalisation (Yan et al., ICLR 2020), for one or two images a batch.

    It normalises by the root mean square; the convolution before it, a :class:`CenConv2d`, centres.
    With m = simulated_batch_size / batch_size, iterations t from 1, and means
    over N, H and W per channel:

        s = mean(x²)
        S = s while t <= m or t < warmup_iters, then the mean of the last m values of s
        r = 1 while t <= max(correction_start, warmup_iters),
            then sqrt(S + eps) / sqrt(R + eps), clipped to [1 / r_max, r_max]
        R = (1 - momentum) · R + momentum · S
        y = weight · r · x / sqrt(S + eps) + bias

    In the backward the mean of g · z (g = dy · weight · r, z = x / sqrt(S + eps)) is replaced in
    the same way by its mean over the last m backward passes. So after the warm-up the gradient is
    not the derivative of the forward, on purpose. In evaluation mode S and r give way to R and 1.

    **One iteration** is one call in training mode. A call with a list pools all its inputs and
    returns a list. A forward without a backward is an iteration without a p. A call with only
    empty inputs counts nothing, nor does a forward that activation checkpointing recomputes: it
    normalises by what its first pass used.

    **Types.** Half types come back as they went in. Statistics and state are float32 (float64 in
    a float64 module), also after ``.half()``. A value that is not finite enters no statistic.

    Statistics are this rank's; population training (``rethinking_bn.population``) makes R equal on
    all ranks. A checkpoint of another m loads: the averages keep their newest values. One without
    these values (for inference) sets R and starts t at 0. The official code's checkpoints load.

    Args:
        num_features: C.
        simulated_batch_size: images whose statistics are averaged.
        batch_size: images per call and rank. None: the N of the first training input, which is
            right only where N counts images. Layers that see RoIs need it.
        eps: added to the mean square.
        momentum: fraction of the new value in R, in (0, 1].
        warmup_iters, correction_start: see above.
        r_max: r is kept within [1 / r_max, r_max].
        affine: whether there are a weight and a bias.

    Raises:
        ValueError: when ``batch_size`` does not divide ``simulated_batch_size``, or an argument is
            out of its range.

    State dict: ``weight``, ``bias``, ``running_mean_square`` (C,), and for resuming
    ``mean_square_ring.{count, last_<m>}``, ``gradient_ring.{count, last_<m>}``.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        running_mean_square: Tensor
        weight: nn.Parameter  # None, as the bias, without affine
        bias: nn.Parameter
    __jit_unused_properties__ = ["population_domains", "iterations"]

    batch_stats_at_inference = False

    def __init__(
        self,
        num_features: int,
        *,
        simulated_batch_size: int = 32,
        batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.02,
        warmup_iters: int = 100,
        r_max: float = 5.0,
        correction_start: int = 1000,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_eps(eps)
        for name, value, least in (
            ("num_features", num_features, 1),
            ("simulated_batch_size", simulated_batch_size, 1),
            ("r_max", r_max, 1),
            ("warmup_iters", warmup_iters, 0),
            ("correction_start", correction_start, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.num_features = num_features
        self.simulated_batch_size, self.batch_size = simulated_batch_size, batch_size
        self.eps, self.momentum, self.r_max = eps, momentum, r_max
        self.warmup_iters, self.correction_start = warmup_iters, correction_start
        self.affine = affine
        if affine:
            add_affine(self, num_features, device=device, dtype=dtype)
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        full = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        running = torch.ones(num_features, device=device, dtype=full)
        self.register_buffer("running_mean_square", running)
        self.mean_square_ring = ValueRing(num_features, device)
        self.gradient_ring = ValueRing(num_features, device)
        if batch_size is not None:
            self._set_batch_size(batch_size)
        self._forwards: Forwards[Statistics] = Forwards()

    def _set_batch_size(self, images: int) -> None:
        """Average over m iterations, or raise a ValueError if ``images`` are no m-th part."""
        if images < 1 or self.simulated_batch_size % images:
            raise ValueError(
                f"the simulated batch size {self.simulated_batch_size} is not a multiple of the "
                f"batch size {images} (images per rank)"
            )
        self.batch_size = images
        for ring in (self.mean_square_ring, self.gradient_ring):
            ring.set_length(self.simulated_batch_size // images, self.running_mean_square)

    @property
    def iterations(self) -> int:
        """t, the training iterations so far."""
        return self.mean_square_ring.pushed

    def reset_running_stats(self) -> None:
        """Start again at iteration 0 with R = 1."""
        self.running_mean_square.fill_(1)
        self.restart_warmup()

    def restart_warmup(self) -> None:
        """Start again at iteration 0, keeping R: for weights whose training starts anew."""
        self.mean_square_ring.clear()
        self.gradient_ring.clear()

    def reset_parameters(self) -> None:
        """Set the layer to what it was when built, but for a batch size read off an input."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x):  # type: ignore[no-untyped-def]
        """Normalise one tensor (N, C, H, W), or several that share their statistics.

        Returns:
            the same shapes and type; a list for several.

        Raises:
            ValueError: when an input is not (N, C, H, W), or the batch size is to be read off an
                input and does not divide the simulated one.
        """
        if torch.jit.is_scripting():
            return self._infer_exported(x)
        else:  # not compiled by TorchScript
            if isinstance(x, Tensor):
                return self._forward([x])[0]
            if isinstance(x, Proxy) or any(isinstance(level, Proxy) for level in x):
                return as_leaf(self, x)
            return self._forward(list(x))

    def _infer_exported(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("a scripted MABN2d is for inference only")
        state = torch.zeros_like(self.running_mean_square), self.running_mean_square
        return exported_normalize(x, state[0], state[1], self.weight, self.bias, self.eps)

    def _forward(self, xs: list[Tensor]) -> list[Tensor]:
        for x in xs:
            if x.dim() != 4 or x.shape[1] != self.num_features:
                raise ValueError(
                    f"MABN2d({self.num_features}) expects (N, {self.num_features}, H, W), "
                    f"got {tuple(x.shape)}"
                )
        if "_is_replica" in vars(self) and self.training:
            raise RuntimeError("MABN2d does not work in nn.DataParallel: use one process per GPU")
        present = [x for x in xs if x.numel() > 0]
        if self._is_observed() or (self.batch_stats_at_inference and not self.training):
            return self._observed_forward(xs, present)
        if not (self.training and present):
            running = self.running_mean_square
            state = (torch.zeros_like(running), running, self.weight, self.bias, self.eps)
            return [affine_normalize(x, *state) for x in xs]
        if self.batch_size is None:
            self._set_batch_size(len(present[0]))
        with torch.no_grad():
            statistics = self._advance(mean_square(present))
        return mabn_normalize(xs, self.weight, self.bias, statistics, self.eps, self._average)

    def _observed_forward(self, xs: list[Tensor], present: list[Tensor]) -> list[Tensor]:
        """Normalise by the input itself with r = 1, and report it; the state stays as it is."""
        own = mean_square(present) if present else torch.zeros_like(self.running_mean_square)
        if self._is_observed():
            # A population of mean squares: its mean is what R estimates, and it has no spread.
            n = sum(x.numel() for x in present) // self.num_features
            zeros = torch.zeros_like(own[None])
            self._report(Moments(own.new_full((1,), float(n)), own[None], zeros))
        statistics = Statistics(own, own, torch.ones_like(own), own.new_zeros(()) > 0)
        return mabn_normalize(xs, self.weight, self.bias, statistics, self.eps, lambda p, moving: p)

    def _advance(self, own: Tensor) -> Statistics:
        """Make one iteration of the state, unless the forward is recomputed."""
        if is_recomputing():
            values, index = self._forwards.recall(own)
            if values:  # chosen on the device, without waiting for it
                each = zip(*values, strict=True)
                return Statistics(*(torch.stack(v).index_select(0, index[None])[0] for v in each))
        running, ring = self.running_mean_square, self.mean_square_ring
        t = ring.push(own)
        moving = t >= max(len(ring.values) + 1, self.warmup_iters)
        smoothed = torch.where(moving, ring.mean().to(own.dtype), own)
        r = ((smoothed + self.eps) / (running + self.eps)).sqrt()
        corrected = t > max(self.correction_start, self.warmup_iters)
        correction = torch.where(corrected, r.clamp(1 / self.r_max, self.r_max), 1.0)
        if torch.compiler.is_compiling():
            # A compiler recomputes in the backward what is cheap, here from an R that has moved on.
            correction = correction.flip(0).flip(0)
        moved = running.lerp(smoothed.to(running.dtype), self.momentum)
        running.copy_(torch.where(moved.isfinite(), moved, running))
        statistics = Statistics(own, smoothed, correction, moving)
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            self._forwards.remember(own, statistics)
        return statistics

    def _average(self, p: Tensor, moving: Tensor) -> Tensor:
        """Take in p (C,) of one backward pass and return P (C,)."""
        self.gradient_ring.push(p)
        return torch.where(moving, self.gradient_ring.mean().to(p.dtype), p)

    def read_population(self) -> tuple[Tensor, Tensor]:
        """Return copies of R (1, C), and zeros in place of a variance."""
        mean = self.running_mean_square[None].clone()
        return mean, torch.zeros_like(mean)

    def write_population(self, moments: Moments) -> None:
        """Write R, the mean of ``moments`` (one row of them), unless the count is 0."""
        new = moments.mean[0].to(self.running_mean_square)
        present = moments.count[0].to(new.device) > 0
        with torch.no_grad():
            self.running_mean_square.copy_(torch.where(present, new, self.running_mean_square))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        convert_official(state_dict, prefix)
        rings = (prefix + "mean_square_ring.count", prefix + "gradient_ring.count")
        if prefix + "running_mean_square" in state_dict and not all(k in state_dict for k in rings):
            # saved for inference: its mean square with the averages of other weights would be wrong
            self.restart_warmup()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, simulated_batch_size={self.simulated_batch_size}, "
            f"batch_size={self.batch_size}, eps={self.eps}, momentum={self.momentum}, "
            f"warmup_iters={self.warmup_iters}, r_max={self.r_max}, affine={self.affine}"
        )


class CenConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose filters are used without their mean (MABN, arXiv 2001.06838).

    The convolution uses w - mean(w), the mean taken per output channel over input channels (of
    its group) and kernel, so that :class:`MABN2d` sees features near mean zero. The parameter keeps
    its mean, which nothing depends on: the gradient is centred too. The state dict is that of the
    convolution it replaces. MABN's recipe has no bias; one is allowed.

    Args:
        norm, activation: detectron2's: applied to the result, in this order; or None.
        args, kwargs: as nn.Conv2d.

    Raises:
        ValueError: when a filter has a single weight, which minus its mean is always 0.
    """

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() == 1:
            raise ValueError(
                f"a filter of {self.in_channels} / {self.groups} input channels and kernel "
                f"{self.kernel_size} has one weight: centred, it is always 0"
            )
        self.norm, self.activation = norm, activation

    def centred_weight(self) -> Tensor:
        """Return the weight (C_out, C_in / groups, kh, kw) as the convolution uses it."""
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(norm(conv(x))) for x (N, C_in, H, W); N may be 0."""
        x = self._conv_forward(x, self.centred_weight(), self.bias)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)

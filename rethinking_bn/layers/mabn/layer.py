"""Moving average batch normalisation (MABN) for mini-batches of one or two images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from rethinking_bn.layers.mabn.official import convert_official
from rethinking_bn.layers.mabn.replay import ForwardRecords
from rethinking_bn.layers.mabn.ring import FullPrecisionBuffers, ValueRing, window
from rethinking_bn.layers.population_layer import PopulationLayer, as_leaf
from rethinking_bn.numerics.channels import affine_normalize, exported_normalize
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.numerics.moving_average import (
    Statistics,
    Truth,
    choose,
    mabn_normalize,
    mean_square,
)
from rethinking_bn.randomness import is_recomputing


class MABN2d(PopulationLayer, FullPrecisionBuffers):
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

    **What one iteration is.** One call in training mode: a layer cannot see where a forward of the
    model begins, so a layer called L times per forward counts L iterations, as ``nn.BatchNorm2d``
    moves its statistics L times. ``forward([x_1, ..., x_L])`` counts one: it pools all inputs into
    one s, one S and one p, and returns a list. A forward without a backward is an iteration whose
    p is absent. A call whose inputs are all empty is none. Nor is a training forward inside a
    backward pass: it is taken for activation checkpointing's recomputation, writes nothing, and
    normalises by what its first pass used.

    **Types.** Half types come back as they went in; statistics and state are float32 (float64 in
    a float64 module), also after ``.half()``. A value that is not finite enters no statistic. The
    p of a gradient scaler's scaled gradients are averaged as they come, so for m backward passes
    after the scale changed their average is a little off.

    Statistics are those of this rank; population training (``rethinking_bn.population``) makes
    ``running_mean_square`` equal on all ranks. Checkpoints load whatever m was: the averages keep
    their newest values. Without the values (an inference-only checkpoint) t starts at 0 again with
    the R of the checkpoint. What the official code saved is recognised.

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
        if num_features < 1:
            raise ValueError(f"num_features must be positive, got {num_features}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        if r_max < 1:
            raise ValueError(f"r_max must be at least 1, got {r_max}")
        for name, value in (("warmup_iters", warmup_iters), ("correction_start", correction_start)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.num_features = num_features
        self.simulated_batch_size = simulated_batch_size
        self.batch_size = batch_size
        self.eps, self.momentum, self.r_max = eps, momentum, r_max
        self.warmup_iters, self.correction_start = warmup_iters, correction_start
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        half = dtype in (torch.float16, torch.bfloat16)
        statistics: dict[str, Any] = {"device": device, "dtype": torch.float32 if half else dtype}
        self.register_buffer("running_mean_square", torch.ones(num_features, **statistics))
        length = window(simulated_batch_size, 1 if batch_size is None else batch_size)
        self.mean_square_ring = ValueRing(num_features, None, **statistics)
        self.gradient_ring = ValueRing(num_features, None, **statistics)
        if batch_size is not None:
            self.mean_square_ring.set_length(length, self.running_mean_square)
            self.gradient_ring.set_length(length, self.running_mean_square)
        self._records = ForwardRecords()

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

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, x):  # type: ignore[no-untyped-def]
        """Normalise one tensor (N, C, H, W), or several that share their statistics.

        Returns:
            the same shapes and type; a list for several.

        Raises:
            ValueError: when an input is not (N, C, H, W), or ``batch_size`` was to be read off
                an input and does not divide the simulated one.
        """
        if torch.jit.is_scripting():  # where x is one tensor
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
        running = self.running_mean_square
        zero = torch.zeros_like(running)
        return exported_normalize(x, zero, running, self.weight, self.bias, self.eps)

    def _forward(self, xs: list[Tensor]) -> list[Tensor]:
        for x in xs:
            if x.dim() != 4 or x.shape[1] != self.num_features:
                raise ValueError(
                    f"MABN2d({self.num_features}) expects (N, {self.num_features}, H, W), "
                    f"got {tuple(x.shape)}"
                )
        if not self.training and self.batch_stats_at_inference:
            return self._observed_forward(xs, [x for x in xs if x.numel() > 0])
        if not self.training:
            running = self.running_mean_square
            state = (torch.zeros_like(running), running, self.weight, self.bias, self.eps)
            return [affine_normalize(x, *state) for x in xs]
        return self._train_forward(xs)

    def _train_forward(self, xs: list[Tensor]) -> list[Tensor]:
        if "_is_replica" in vars(self):
            raise RuntimeError("MABN2d does not work in nn.DataParallel: use one process per GPU")
        present = [x for x in xs if x.numel() > 0]
        if self._observer is not None:
            return self._observed_forward(xs, present)
        if not present:
            one = torch.ones_like(self.running_mean_square)
            return [affine_normalize(x, one, one, self.weight, self.bias, self.eps) for x in xs]
        self._know_batch_size(len(present[0]))
        weight, bias = self.weight, self.bias
        with torch.no_grad():
            statistics = None
            if is_recomputing():
                statistics = self._records.recall(mean_square(present)[1])
            known = statistics is not None
            if statistics is None:
                statistics = self._advance(present)
        arguments = (xs, weight, bias, statistics, self.eps)
        outputs = mabn_normalize(*arguments, self._average_gradient)
        if not (known or torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            self._records.remember(statistics, hold=not outputs[0].requires_grad)
        return outputs

    def _observed_forward(self, xs: list[Tensor], present: list[Tensor]) -> list[Tensor]:
        """Normalise by the input itself with r = 1, report it to an observer, leave state alone."""
        with torch.no_grad():
            nothing = (0, torch.zeros_like(self.running_mean_square))
            n, own = mean_square(present) if present else nothing
            if self.training and self._observer is not None and not is_recomputing():
                # A population of mean squares: its mean is what R estimates, without a spread.
                count = own.new_full((1,), float(n))
                self._observer(Moments(count, own[None], torch.zeros_like(own[None])))
        statistics = Statistics(own, own, 1.0, moving=False)
        return mabn_normalize(xs, self.weight, self.bias, statistics, self.eps, lambda p, moving: p)

    def _know_batch_size(self, images: int) -> None:
        """Take the batch size from the first input's N, unless it was given."""
        if self.batch_size is None:
            length = window(self.simulated_batch_size, images)
            self.batch_size = images
            for ring in (self.mean_square_ring, self.gradient_ring):
                ring.set_length(length, self.running_mean_square)

    def _advance(self, present: list[Tensor]) -> Statistics:
        """Make one iteration of the state."""
        ring, running = self.mean_square_ring, self.running_mean_square
        first_moving = max(len(ring.values) + 1, self.warmup_iters)
        last_uncorrected = max(self.correction_start, self.warmup_iters)
        own = mean_square(present)[1]
        t = ring.push(own, own < math.inf)  # NaN is not less either
        moving = t >= first_moving
        smoothed = choose(moving, lambda: ring.mean(t).to(own.dtype), own)

        spread = smoothed + self.eps

        def ratio() -> Tensor:
            r = (spread / (running + self.eps)).sqrt_()
            return r.clamp_(1 / self.r_max, self.r_max)

        correction = choose(t > last_uncorrected, ratio, 1.0)
        if torch.compiler.is_compiling():
            # A compiler recomputes in the backward what is cheap, here from an R that has moved on.
            correction = correction.flip(0).flip(0)
        moved = running.lerp(smoothed.to(running.dtype), self.momentum)
        torch.where(moved < math.inf, moved, running, out=running)
        return Statistics(own, smoothed, correction, moving, spread=spread)

    def _average_gradient(self, p: Tensor, moving: Truth) -> Tensor:
        """Take in p (C,) of one backward pass and return P (C,)."""
        ring = self.gradient_ring
        t = ring.push(p)
        return choose(moving, lambda: ring.mean(t), p)

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

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no graph that could ask for this layer's forwards
        return {**super().__getstate__(), "_records": ForwardRecords()}

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, simulated_batch_size={self.simulated_batch_size}, "
            f"batch_size={self.batch_size}, eps={self.eps}, momentum={self.momentum}, "
            f"warmup_iters={self.warmup_iters}, r_max={self.r_max}, affine={self.affine}"
        )

"""What moving average batch normalisation keeps, and how an iteration moves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rethinking_bn.layers.mabn.functional import Statistics
from rethinking_bn.layers.mabn.official import convert_official
from rethinking_bn.layers.mabn.replay import ForwardRecords
from rethinking_bn.layers.mabn.ring import FullPrecisionBuffers, ValueRing
from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.numerics.moments import Moments

if TYPE_CHECKING:
    from typing_extensions import Self


class MABNState(PopulationLayer, FullPrecisionBuffers):
    """What :class:`MABN2d` holds; arguments and state dict are described there."""

    running_mean_square: Tensor
    weight: nn.Parameter  # None, as the bias, without affine
    bias: nn.Parameter

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
        if warmup_iters < 0 or correction_start < 0:
            raise ValueError(
                "warmup_iters and correction_start must not be negative, "
                f"got {warmup_iters} and {correction_start}"
            )
        self.num_features = num_features
        self.simulated_batch_size = simulated_batch_size
        self.batch_size = batch_size
        self.eps, self.momentum, self.r_max = eps, momentum, r_max
        self.warmup_iters, self.correction_start = warmup_iters, correction_start
        self.affine = affine
        self.frozen = False
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

    def freeze(self) -> Self:
        """Stay in evaluation mode from now on, whatever ``train()`` says, without gradients."""
        self.frozen = True
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen layer stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def advance(self, own: Tensor, images: int) -> Statistics:
        """Make one iteration of the state.

        Args:
            own: (C,), the input's mean square.
            images: its N, for a batch size that is not known yet.

        Returns:
            What the input is to be normalised by.

        Raises:
            ValueError: as :func:`window`; nothing has changed then.
        """
        if self.batch_size is None:
            length = window(self.simulated_batch_size, images)
            self.batch_size = images
            for ring in (self.mean_square_ring, self.gradient_ring):
                ring.set_length(length, self.running_mean_square)
        ring, running = self.mean_square_ring, self.running_mean_square
        ring.push(own)
        t, m = ring.pushed, len(ring.values)
        moving = t > m and t >= self.warmup_iters
        smoothed = ring.mean().to(own.dtype) if moving else own
        if t <= max(self.correction_start, self.warmup_iters):
            correction = torch.ones_like(own)
        else:
            correction = ((smoothed + self.eps) / (running.to(own.dtype) + self.eps)).sqrt()
            correction.clamp_(1 / self.r_max, self.r_max)
        moved = running.lerp(smoothed.to(running.dtype), self.momentum)
        running.copy_(torch.where(moved.isfinite(), moved, running))
        return Statistics(own, smoothed, correction, moving)

    def average_gradient(self, p: Tensor, moving: bool | Tensor) -> Tensor:
        """Take in p (C,) of one backward pass and return P (C,)."""
        self.gradient_ring.push(p)
        if moving is False:
            return p
        average = self.gradient_ring.mean().to(p.dtype)
        return average if moving is True else torch.where(moving, average, p)

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


def window(simulated_batch_size: int, batch_size: int) -> int:
    """Return m, the iterations whose statistics simulate the larger batch.

    Raises:
        ValueError: naming both sizes, when the batch size does not divide the simulated one.
    """
    if batch_size < 1 or simulated_batch_size < 1 or simulated_batch_size % batch_size:
        raise ValueError(
            f"the simulated batch size {simulated_batch_size} is not a multiple of the batch size "
            f"{batch_size} (images per rank)"
        )
    return simulated_batch_size // batch_size

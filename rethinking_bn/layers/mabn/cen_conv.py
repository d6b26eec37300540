"""Convolution with centred filters, the other half of moving average batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class CenConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose filters are used without their mean (MABN, arXiv 2001.06838).

    The convolution uses w - mean(w), the mean taken per output channel over input channels (of
    its group) and kernel, so that :class:`MABN2d`, which centres nothing, sees features near mean
    zero. The parameter keeps its mean, which nothing depends on: the gradient is centred too. The
    state dict is that of the convolution it replaces. MABN's recipe has no bias, as nothing
    after the convolution removes it; one is allowed.

    Takes detectron2's extra keyword arguments besides ``nn.Conv2d``'s, and empty inputs.

    Args:
        norm: module applied to the result, or None.
        activation: function applied after ``norm``, or None.

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
        self.norm = norm
        self.activation = activation

    def centred_weight(self) -> Tensor:
        """Return the weight (C_out, C_in / groups, kh, kw) as the convolution uses it."""
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(norm(conv(x))) for x (N, C_in, H, W); N may be 0."""
        x = self._conv_forward(x, self.centred_weight(), self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

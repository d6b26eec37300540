"""Convolution with centred filters, the other half of moving average batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


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
        self.folded = False

    def centred_weight(self) -> Tensor:
        """Return the weight (C_out, C_in / groups, kh, kw) as the convolution uses it."""
        weight = self.weight
        if self.folded:
            if not (torch.is_grad_enabled() and weight.requires_grad):
                return weight
            # These zeros leave the value as it is, bit for bit, and centre the gradient.
            return weight - (weight - weight.detach()).mean((1, 2, 3), keepdim=True)
        return weight - weight.mean((1, 2, 3), keepdim=True)

    @torch.no_grad()
    def fold(self) -> Self:
        """Centre the weight in place, so that inference does not do it at every forward.

        Outputs stay the same, bit for bit. The fold ends when training mode or loading a state
        dict may change the weight; as centring again changes nothing, no weight is lost.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("folding is for inference: call eval() before fold()")
        if not self.folded:
            self.weight.copy_(self.centred_weight())
            self.folded = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(norm(conv(x))) for x (N, C_in, H, W); N may be 0."""
        x = self._conv_forward(x, self.centred_weight(), self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training ends a fold."""
        if mode:
            self.folded = False
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.folded = False
        super()._load_from_state_dict(*args, **kwargs)


def fold_centring(model: nn.Module) -> nn.Module:
    """Fold every :class:`CenConv2d` of a model for inference, in place; see CenConv2d.fold.

    Raises:
        ValueError: when such a layer is in training mode.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CenConv2d)}
    training = [name for name, layer in layers.items() if layer.training]
    if training:
        raise ValueError(f"folding is for inference, call eval() first: {training} are training")
    for layer in layers.values():
        layer.fold()
    return model

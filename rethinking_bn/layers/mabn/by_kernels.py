"""An iteration of MABN2d in the Triton kernels: the state is the layer's, the passes are theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rethinking_bn.layers.mabn.functional import Statistics
from rethinking_bn.numerics.triton.choice import takes_triton

if TYPE_CHECKING:
    from rethinking_bn.layers.mabn.layer import MABN2d


def takes_kernels(layer: MABN2d, xs: list[Tensor]) -> bool:
    """Return whether a training step on these tensors runs in the kernels; see takes_triton."""
    affine = ([layer.weight], [layer.bias]) if layer.affine else (None, None)
    single = layer.running_mean_square.dtype == torch.float32  # the rings' type as well
    return single and takes_triton(xs, *affine)


def advance(layer: MABN2d, xs: list[Tensor]) -> Statistics:
    """Make one iteration of the state; its count is left to :func:`normalize`."""
    from rethinking_bn.numerics.triton import mabn  # imports Triton

    ring = layer.mean_square_ring
    return Statistics(
        *mabn.advance(
            xs,
            layer.running_mean_square,
            ring.values,
            ring.count,
            eps=layer.eps,
            momentum=layer.momentum,
            r_max=layer.r_max,
            first_moving=max(len(ring.values) + 1, layer.warmup_iters),
            last_uncorrected=max(layer.correction_start, layer.warmup_iters),
        )
    )


def normalize(
    layer: MABN2d, xs: list[Tensor], statistics: Statistics, *, count: bool
) -> list[Tensor]:
    """Normalise with MABN's backward; ``count`` the iteration unless it is a recomputation."""
    from rethinking_bn.numerics.triton import mabn

    gradients = layer.gradient_ring
    return mabn.normalize(
        xs,
        layer.weight,
        layer.bias,
        statistics,
        layer.eps,
        layer.mean_square_ring.count if count else None,
        gradients.values,
        gradients.count,
    )

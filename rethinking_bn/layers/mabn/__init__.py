"""Moving average batch normalization (Yan et al., arXiv 2001.06838) and its centred convolution."""

from __future__ import annotations

from rethinking_bn.layers.mabn.cen_conv import CenConv2d
from rethinking_bn.layers.mabn.layer import MABN2d

__all__ = ["CenConv2d", "MABN2d"]

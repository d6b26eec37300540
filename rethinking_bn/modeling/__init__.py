"""Components for detectron2; importing this package registers them."""

from __future__ import annotations

from rethinking_bn._detectron2 import require_detectron2

require_detectron2("rethinking_bn.modeling")

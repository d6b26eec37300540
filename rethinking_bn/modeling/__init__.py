"""Components for detectron2; importing this package registers them."""

from __future__ import annotations

from rethinking_bn._detectron2 import require_detectron2

require_detectron2("rethinking_bn.modeling")

from rethinking_bn.layers.convert import centre_convolutions, convert_norms  # noqa: E402
from rethinking_bn.modeling import backbone  # noqa: E402, F401
from rethinking_bn.modeling.distilled import DistilledRetinaNet  # noqa: E402
from rethinking_bn.modeling.domains import DomainRCNN, FollowsDomains  # noqa: E402
from rethinking_bn.modeling.retinanet import (  # noqa: E402
    RETINANET_HEAD,
    ConfigurableHeadRetinaNet,
    CycleBNRetinaNetHead,
    DomainBNRetinaNetHead,
    MultiDomainBNRetinaNetHead,
    SharedBNRetinaNetHead,
    build_retinanet_head,
)
from rethinking_bn.modeling.roi_heads import (  # noqa: E402
    NormBoxHead,
    NormImagesCascadeROIHeads,
    NormImagesROIHeads,
    NormMaskHead,
    ShuffleBNBoxHead,
    ShuffleBNMaskHead,
)

__all__ = [
    "RETINANET_HEAD",
    "ConfigurableHeadRetinaNet",
    "CycleBNRetinaNetHead",
    "DistilledRetinaNet",
    "DomainBNRetinaNetHead",
    "DomainRCNN",
    "FollowsDomains",
    "MultiDomainBNRetinaNetHead",
    "NormBoxHead",
    "NormImagesCascadeROIHeads",
    "NormImagesROIHeads",
    "NormMaskHead",
    "SharedBNRetinaNetHead",
    "ShuffleBNBoxHead",
    "ShuffleBNMaskHead",
    "build_retinanet_head",
    "centre_convolutions",
    "convert_norms",
]

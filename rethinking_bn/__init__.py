"""BatchNorm in detectors where the batch is a choice (Wu and Johnson, arXiv 2105.07576).

Importing the package registers its heads, backbones and data sets with detectron2. Without
detectron2, or with one that fails to import, ``rethinking_bn.layers`` and
``rethinking_bn.population`` work all the same, and whatever needs detectron2 raises an
ImportError that says so.
"""

from __future__ import annotations

import logging
from typing import Any

from rethinking_bn import command_line  # noqa: F401, I001  # first: see the end of its ranks
from rethinking_bn._detectron2 import detectron2_failure, detectron2_installed, require_detectron2
from rethinking_bn.config import get_config_file

__version__ = "0.2.0"

if not detectron2_installed():
    pass
elif (_failure := detectron2_failure()) is not None:
    logging.getLogger(__name__).warning(
        "detectron2 is installed but fails to import, nothing is registered with it (%s: %s)",
        *(type(_failure).__name__, _failure),
    )
else:
    from rethinking_bn import modeling  # registers heads and backbones
    from rethinking_bn.config import add_rethinking_bn_config
    from rethinking_bn.data.register import register_shapes

    register_shapes()

__all__ = ["__version__", "add_rethinking_bn_config", "get_config_file", "modeling"]


def __getattr__(name: str) -> Any:
    """Explain a missing detectron2 instead of a missing attribute; import the engine on demand."""
    if name in ("add_rethinking_bn_config", "engine", "modeling"):
        require_detectron2(f"rethinking_bn.{name}")
    if name == "engine":
        import rethinking_bn.engine

        return rethinking_bn.engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Is detectron2 here? The one place that knows, and that says what to do when it is not."""

from __future__ import annotations

from importlib.util import find_spec

INSTALL_GUIDE = "https://detectron2.readthedocs.io/tutorials/install.html"


def detectron2_installed() -> bool:
    """Return whether a package named detectron2 can be found (it is not imported)."""
    return find_spec("detectron2") is not None


def require_detectron2(name: str) -> None:
    """Refuse the use of a name that is built on detectron2 when that is not installed.

    A detectron2 that is installed but broken is not this function's business: its own ImportError
    says more than ours could.

    Args:
        name: what was asked for, for example ``"rethinking_bn.engine"``.

    Raises:
        ImportError: saying what to install and where its installation guide is.
    """
    if not detectron2_installed():
        raise ImportError(
            f"{name} needs detectron2, which is not installed. Install it as its own guide "
            f"describes ({INSTALL_GUIDE}). rethinking_bn.layers and rethinking_bn.population "
            "work without it.",
            name="detectron2",
        )

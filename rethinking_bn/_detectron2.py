"""Is detectron2 here? The one place that knows, and that says what to do when it is not."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

INSTALL_GUIDE = "https://detectron2.readthedocs.io/tutorials/install.html"


def detectron2_installed() -> bool:
    """Return whether a package named detectron2 can be found (it is not imported)."""
    return find_spec("detectron2") is not None


@cache
def detectron2_failure() -> Exception | None:
    """Import the installed detectron2 and return what that raised, None where it works."""
    try:
        # the rest of it needs no more than these: its compiled code and its dependencies
        import_module("detectron2.data")
        import_module("detectron2.modeling")
    except Exception as error:  # a library that is missing, of another version, without a symbol
        return error
    return None


def require_detectron2(name: str) -> None:
    """Refuse the use of a name that is built on detectron2, such as ``"rethinking_bn.engine"``.

    Raises:
        ImportError: saying what to install and where its installation guide is; of an installed
            detectron2 that fails to import, what that raises, chained.
    """
    rest = "rethinking_bn.layers and rethinking_bn.population work without it."
    if not detectron2_installed():
        raise ImportError(
            f"{name} needs detectron2, which is not installed. Install it as its own guide "
            f"describes ({INSTALL_GUIDE}). {rest}",
            name="detectron2",
        )
    failure = detectron2_failure()
    if failure is not None:
        raise ImportError(
            f"{name} needs detectron2, which is installed but fails to import "
            f"({type(failure).__name__}: {failure}). {rest}",
            name=getattr(failure, "name", None),
        ) from failure

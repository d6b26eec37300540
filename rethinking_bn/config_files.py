"""Finding the YAML files of configs/, from a checkout, an editable install or a wheel."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

_PACKAGE = Path(__file__).parent


def _config_folder() -> Path:
    """Return configs/: beside the package in a checkout, inside it in a wheel."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def list_config_files() -> list[str]:
    """Return the names that :func:`get_config_file` knows, sorted, with forward slashes."""
    folder = _config_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))


def get_config_file(name: str) -> str:
    """Return the absolute path of one of the project's config files.

    Args:
        name: relative to ``configs/``, for example ``"retinanet_bn_row1.yaml"`` or
            ``"shapes/retinanet_bn_row1.yaml"``.

    Raises:
        ValueError: if there is no such file; the message lists close names.
    """
    known = list_config_files()
    if name not in known:
        close = get_close_matches(name, known, n=8, cutoff=0.5) or known
        raise ValueError(
            f"no config file {name!r} in {_config_folder()}; close names: {', '.join(close)}"
        )
    return str((_config_folder() / name).resolve())

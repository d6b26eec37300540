"""Comparators that are other packages' code, where those are installed."""

from __future__ import annotations

from importlib.util import find_spec


def missing(*packages: str) -> str | None:
    """Return why something that needs these packages is skipped, or None if all are there."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"needs {' and '.join(absent)}, not installed" if absent else None

"""The version of the package; setup.py reads this line."""

__version__ = "0.1.0"

"""The files of a wheel; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# configs/ lives at the root, where people look for it; in a wheel it becomes package data.
setup(
    packages=[*find_packages(include=["rethinking_bn*"]), "rethinking_bn.configs"],
    package_dir={"rethinking_bn.configs": "configs"},
    package_data={"rethinking_bn.configs": ["*.yaml", "*/*.yaml"], "rethinking_bn": ["py.typed"]},
    zip_safe=False,
)

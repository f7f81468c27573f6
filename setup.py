"""What pyproject.toml cannot say: folders beside the package that are inside it once installed."""

from setuptools import find_packages, setup

BESIDE = {"megapromoe.ds_configs": "ds_configs", "megapromoe.launchers": "launchers"}

setup(packages=[*find_packages(include=["megapromoe", "megapromoe.*"]), *BESIDE], package_dir=BESIDE)

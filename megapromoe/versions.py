"""Versions of packages, for the records of a run and for comparing ranks."""

from collections.abc import Iterable
from importlib import metadata

import megapromoe

NOT_INSTALLED = "not installed"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package name -> version.

    megapromoe may be imported from a source tree that is not installed, so its version is that of the imported package.
    Other packages without metadata, such as a source tree on PYTHONPATH, are "not installed".
    """
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    if package == megapromoe.__name__:
        return megapromoe.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED

"""Routers that users define: a class in a file that `model.router` names, or an entry point of an installed package.

    model.router=my_router.py:MyRouter      the class of that file
    model.router=name                       the entry point `name` of the group "megapromoe.routers"

The file is executed when the model is built or its cost is counted. Only a file that the configuration names is read:
there is no search path, and nothing is added to Python's. `model.router_version` records the hash of
the file or the version of the package, so that a run does not continue with another router unnoticed.

No torch: whether the class is a router is checked where the model is built (`nn/moe/layer.py`).
"""

import hashlib
import logging
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from megapromoe.errors import ExitCode, UserError

logger = logging.getLogger(__name__)

ENTRY_POINTS = "megapromoe.routers"
FORM = "FILE.py:CLASS"
_FILE = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


class RouterError(UserError):
    """A router of a user that cannot be loaded, or has changed since its run began."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True


def is_reference(router: str) -> bool:
    """Whether a value of `model.router` can name a user's router: `FILE.py:CLASS`, or an installed entry point."""
    return bool(_FILE.fullmatch(router)) or _entry_point(router) is not None


def with_absolute_path(router: str) -> str:
    """The reference with the absolute path of its file, so that a run continues from every working directory."""
    match = _FILE.fullmatch(router)
    return f"{Path(match[1]).resolve()}:{match[2]}" if match else router


def version_of(router: str) -> str:
    """What `model.router_version` records: "sha256:..." of the file, or name and version of the package.

    Raises RouterError if the file cannot be read.
    """
    match = _FILE.fullmatch(router)
    if match:
        return _hash(_read(router, Path(match[1])))
    point = _entry_point(router)
    if point is None:
        raise RouterError(_missing(router))
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def load_router(router: str, version: str = "") -> Any:
    """The class that a value of `model.router` names; it is loaded once per process.

    Args:
        router: see `is_reference`.
        version: `model.router_version`; empty: not checked.

    Raises RouterError if there is no such class, if the file cannot be executed, or if it has another version.
    """
    match = _FILE.fullmatch(router)
    if match:
        return _class_of_file(router, Path(match[1]), match[2], version)
    point = _entry_point(router)
    if point is None:
        raise RouterError(_missing(router))
    _check_version(router, version, version_of(router))
    try:
        return point.load()
    except Exception as error:
        raise RouterError(f"model.router = {router!r}: {point.value} cannot be imported ({error!r})") from error


def _class_of_file(router: str, path: Path, name: str, version: str) -> Any:
    content = _read(router, path)
    present = _hash(content)
    _check_version(router, version, present)
    # The name is that of no other module. Classes that are pickled, and dataclasses, need an entry in sys.modules.
    module_name = f"megapromoe_router_{hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:16]}"
    module = sys.modules.get(module_name)
    if module is None:
        module = ModuleType(module_name)
        module.__file__ = str(path)
        sys.modules[module_name] = module
        logger.info("model.router: executes %s, %s", path, present)
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)  # the bytes that were hashed
        except Exception as error:
            del sys.modules[module_name]
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            where = f", line {lines[-1]}" if lines else ""
            raise RouterError(f"model.router = {router!r}: the file cannot be executed ({error!r}{where})") from error
    if not isinstance(getattr(module, name, None), type):
        classes = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        raise RouterError(
            f"model.router = {router!r}: the file has no class {name}; it has {', '.join(classes) or 'none'}"
        )
    return getattr(module, name)


def _check_version(router: str, version: str, present: str) -> None:
    if version and present != version:
        raise RouterError(
            f"model.router = {router!r}: is {present}, but the run has model.router_version = {version!r}; restore that"
            " version, or train on with the present one by --allow model.router_version"
        )


def _read(router: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RouterError(
            f"model.router = {router!r}: the file cannot be read ({error.strerror}); give the path of a Python file and"
            f" the name of a class in it, {FORM}"
        ) from error


def _hash(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _entry_point(name: str) -> Any:
    from importlib import metadata  # help does not need it, and it takes time to import

    return next(iter(metadata.entry_points(group=ENTRY_POINTS, name=name)), None)


def _missing(router: str) -> str:
    return f"model.router = {router!r}: is no router, and no entry point of the group {ENTRY_POINTS!r}; or give {FORM}"

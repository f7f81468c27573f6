"""Routers and samplers that users define: in a file that an option names, or in an installed package.

    model.router=my_router.py:MyRouter      the class of that file
    model.router=name                       the entry point `name` of the group "megapromoe.routers"
    sample.method=my_sampler.py:sample      the function of that file; the group is "megapromoe.samplers"

When the configuration is read, the path becomes absolute, and "@" with the version is appended: the hash of the file,
or name and version of the package. So runs and sets of images record which code they used, and other code is refused.

The file is executed when the model is built, its cost is counted, or images are generated. Only a file that the option
names is read: there is no search path, and nothing is added to Python's. No torch: the users of a class or function
check what it is.
"""

import hashlib
import logging
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megapromoe.errors import ExitCode, UserError

logger = logging.getLogger(__name__)

FORM = "FILE.py:NAME"
_REFERENCE = re.compile(r"(?:(?P<file>.+\.py):)?(?P<name>[A-Za-z_][\w-]*)(?:@(?P<version>[^@]+))?")
HASH_DIGITS = 16


class ExtensionError(UserError):
    """A user's router or sampler that cannot be loaded, or that is not the recorded one."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True


@dataclass(frozen=True)
class _Reference:
    """A parsed value: a name in a file, or of an entry point (`file` None), and the recorded version, "" if none."""

    file: Path | None
    name: str
    version: str


@dataclass(frozen=True)
class ExtensionPoint:
    """An option that can name code of users.

    Attributes:
        option: its dotted name.
        group: of entry points.
        remedy: how to use the present code in place of the recorded one.
    """

    option: str
    group: str
    remedy: str

    def accepts(self, value: str) -> bool:
        """Whether a value can name code of users: `FILE.py:NAME`, or an installed entry point."""
        reference = _parse(value)
        return reference is not None and (reference.file is not None or self._entry_point(reference.name) is not None)

    def recorded(self, value: str) -> str:
        """The value with an absolute path and, unless it has one, the version.

        Raises ExtensionError if the version is needed and the file cannot be read.
        """
        reference = self._reference(value)
        source = reference.name if reference.file is None else f"{reference.file.resolve()}:{reference.name}"
        return f"{source}@{reference.version or self._version(value, reference)}"

    def load(self, value: str) -> Any:
        """The class or function that a value names; a file is executed once per process.

        Raises ExtensionError if there is none, if the file cannot be executed, or if it is not of the recorded version.
        """
        reference = self._reference(value)
        if reference.file is not None:
            return self._load_from_file(value, reference.file, reference)
        self._check_version(value, reference, self._version(value, reference))
        point = self._entry_point(reference.name)
        try:
            return point.load()
        except Exception as error:
            raise self._error(value, f"{point.value} cannot be imported ({error!r})") from error

    def _load_from_file(self, value: str, path: Path, reference: _Reference) -> Any:
        content = self._read(value, path)
        self._check_version(value, reference, _hash(content))
        # The name is that of no other module. Classes that are pickled, and dataclasses, need an entry in sys.modules.
        key = hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:HASH_DIGITS]
        module_name = f"megapromoe_extension_{key}"
        module = sys.modules.get(module_name)
        if module is None:
            module = ModuleType(module_name)
            module.__file__ = str(path)
            sys.modules[module_name] = module
            logger.info("%s: executes %s, %s", self.option, path, _hash(content))
            try:
                exec(compile(content, str(path), "exec"), module.__dict__)  # the bytes that were hashed
            except Exception as error:
                del sys.modules[module_name]
                frames = traceback.extract_tb(error.__traceback__)
                lines = [frame.lineno for frame in frames if frame.filename == str(path)]
                where = f", line {lines[-1]}" if lines else ""
                raise self._error(value, f"the file cannot be executed ({error!r}{where})") from error
        if not hasattr(module, reference.name):
            names = [name for name, made in vars(module).items() if getattr(made, "__module__", "") == module_name]
            raise self._error(value, f"the file has no {reference.name}; it has {', '.join(names) or 'nothing'}")
        return getattr(module, reference.name)

    def _reference(self, value: str) -> _Reference:
        reference = _parse(value)
        if reference is None or (reference.file is None and self._entry_point(reference.name) is None):
            raise self._error(value, f"is no entry point of the group {self.group!r} that is installed; or give {FORM}")
        return reference

    def _version(self, value: str, reference: _Reference) -> str:
        if reference.file is not None:
            return _hash(self._read(value, reference.file))
        point = self._entry_point(reference.name)
        return f"{point.dist.name} {point.dist.version}" if point.dist else point.value

    def _check_version(self, value: str, reference: _Reference, present: str) -> None:
        if reference.version and present != reference.version:
            changed = (
                f"has changed: it is {present} now; restore what was recorded, or use the present one: {self.remedy}"
            )
            raise self._error(value, changed)

    def _read(self, value: str, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            rule = (
                f"the file cannot be read ({error.strerror}); give the path of a Python file and a name in it, {FORM}"
            )
            raise self._error(value, rule) from error

    def _entry_point(self, name: str) -> Any:
        from importlib import metadata  # help does not need it, and it takes time to import

        return next(iter(metadata.entry_points(group=self.group, name=name)), None)

    def _error(self, value: str, problem: str) -> ExtensionError:
        return ExtensionError(f"{self.option} = {value!r}: {problem}")


def shown(value: str) -> str:
    """A value in a line of text: without the folder of the file and without the version."""
    reference = _parse(value)
    if reference is None or reference.file is None:
        return value.partition("@")[0]
    return f"{reference.file.name}:{reference.name}"


def _parse(value: str) -> _Reference | None:
    match = _REFERENCE.fullmatch(value)
    if match is None:
        return None
    return _Reference(Path(match["file"]) if match["file"] else None, match["name"], match["version"] or "")


def _hash(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()[:HASH_DIGITS]}"


ROUTER = ExtensionPoint(
    "model.router", "megapromoe.routers", "name it in model.router again, with --allow model.router"
)
SAMPLER = ExtensionPoint("sample.method", "megapromoe.samplers", "name it in sample.method again")

"""A module in the place of wandb that notes what it is called with, one JSON line a call."""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def install(notes: Path, fails_in: str = "") -> types.ModuleType:
    """Puts the module into `sys.modules` and returns it.

    Args:
        notes: file of the calls.
        fails_in: the function that raises: "init", "log" or "finish".
    """

    def note(name: str, content: Any) -> None:
        with open(notes, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, content], default=str) + "\n")
        if name == fails_in:
            raise ConnectionError(f"no network in {name}")

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            note("define_metric", [name, step_metric])

        def log(self, values: dict[str, Any]) -> None:
            note("log", values)

        def finish(self) -> None:
            note("finish", {})

    def init(**settings: Any) -> Run:
        note("init", settings)
        return Run()

    module: Any = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin=__file__)
    module.init, module.Settings = init, lambda **settings: settings
    module.Image = lambda picture: f"picture {picture.shape}"
    sys.modules["wandb"] = module
    return module


def read(notes: Path) -> list[tuple[str, Any]]:
    """The calls, in order."""
    return [tuple(json.loads(line)) for line in notes.read_text(encoding="utf-8").splitlines()]

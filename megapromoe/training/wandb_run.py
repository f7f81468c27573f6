"""Weights & Biases: the metrics of a run, beside TensorBoard.

The library is optional, and a run never ends because of it: after the first failure it is not used again, and one
warning says so. All starts of a run continue one run of Weights & Biases, whose id is that of the run directory.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.config.options import Config, to_dict
from megapromoe.errors import ExitCode, UserError
from megapromoe.io import sha256_of_json

logger = logging.getLogger(__name__)

START_SECONDS, END_SECONDS = 60.0, 60.0  # longest time for the connection, and for what is left to send at the end
STEP = "step"


class WandbUnavailable(UserError):
    """`train.wandb` is set, and the library is not installed."""

    exit_code = ExitCode.MISCONFIGURED


def check_installed(project: str) -> None:
    """Raises WandbUnavailable if a project is given and wandb is not installed. Does not import it."""
    spec = importlib.util.find_spec("wandb") if project else None
    if project and (spec is None or spec.origin is None):  # without origin: a folder of this name, such as of results
        raise WandbUnavailable(
            f"train.wandb = {project!r}: wandb is not installed on the node of rank 0: pip install 'megapromoe[wandb]',"
            " or set train.wandb= to train without it"
        )


class WandbRun:
    """A run of Weights & Biases. No method raises.

    Args:
        folder: the run directory; the library writes below its folder `wandb/`.
        config: of the run; `train.wandb` is the project, or ENTITY/PROJECT.
    """

    def __init__(self, folder: Path, config: Config):
        self._run: Any = None
        self._wandb: Any = None
        entity, _, project = config.train.wandb.rpartition("/")

        def start() -> None:
            import wandb

            self._wandb = wandb
            self._run = wandb.init(
                project=project,
                entity=entity or None,
                dir=str(folder),
                id=run_id(folder),
                name=folder.resolve().name,
                resume="allow",
                config=to_dict(config),
                settings=wandb.Settings(init_timeout=START_SECONDS, console="off", silent=True, disable_git=True),
            )
            # A start may repeat steps that an earlier one logged. The library drops values of earlier steps of its own
            # counter, but not of a metric that is the axis of the others.
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)

        self._attempt("started", start)

    def log(self, step: int, values: Mapping[str, float | None], pictures: Mapping[str, np.ndarray]) -> None:
        """Sends the values of a step; pictures are uint8 (height, width) or (height, width, 3)."""
        if self._run is None:
            return
        numbers = {name: value for name, value in values.items() if value is not None}

        def send() -> None:
            images = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
            self._run.log({STEP: step} | numbers | images)

        self._attempt("written", send)

    def close(self) -> None:
        """Ends the run. What cannot be sent within `END_SECONDS` stays in the folder `wandb/` for `wandb sync`."""
        if self._run is None:
            return
        run, self._run = self._run, None
        problems: list[BaseException] = []

        def finish() -> None:
            try:
                run.finish()
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=finish, daemon=True, name="wandb finish")
        thread.start()
        thread.join(END_SECONDS)
        if thread.is_alive() or problems:
            reason = problems[0] if problems else f"{END_SECONDS:g} s are over"
            logger.warning("Weights & Biases: not all values were sent (%s); send them by `wandb sync`", reason)

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (
            Exception,
            SystemExit,
        ) as error:  # the library raises errors of many types, also when it is not logged in
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(
                "Weights & Biases: cannot be %s (%s); training continues without it, metrics.jsonl and TensorBoard have"
                " all values",
                what,
                reason[:300],
            )


def run_id(folder: Path) -> str:
    """The id of a run: that of its run directory, which all starts share."""
    first = json.loads((folder / "environment.json").read_text(encoding="utf-8"))[0]
    return first.get("run") or sha256_of_json(first)[:12]

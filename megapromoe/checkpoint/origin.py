"""What makes a run what it is, and which checkpoints are of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.config.options import UNSET, Config, to_dict

# Sections and fields that make a run what it is: the network, what it sees, what it learns, AdamW's update.
# They must stay as they were. All else may change between starts: how the work lies over ranks, how images
# are drawn, how long it runs, how it is logged and saved; and what one tunes along the way: the learning rate
# and its schedule, clipping and the decay of the average.
FIXED = (
    "model",
    *(f"data.{name}" for name in ("source", "path", "size", "label_drop", "flip", "seed")),
    "diffusion",
    *(f"train.{name}" for name in ("seed", "global_batch", "accumulation")),
    *(f"train.{name}" for name in ("beta1", "beta2", "eps", "weight_decay")),
)


class OtherRun(CheckpointError):
    """A whole checkpoint that another run wrote, or that was trained on other data or with other fixed settings."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint must have in common with the run that resumes it.

    Attributes:
        run: identity of the run.
        data: identity of the data set; None where it has none.
        config: of this start.
    """

    run: str
    data: str | None
    config: Config

    def check(self, path: Path, manifest: Mapping[str, Any], allow: Iterable[str] = ()) -> None:
        """Raises OtherRun, listing the differences, unless `allow` names them: "run", "data", a setting of `FIXED`.

        What a manifest does not say is not compared: converted checkpoints are of no run.
        """
        allowed = set(allow)
        changed = changed_settings(manifest.get("config", {}), self.config) if manifest.get("config") else {}
        differences = {key: changed[key] for key in fixed_changes(changed)}
        for key, ours in (("run", self.run), ("data", self.data)):
            theirs = manifest.get(key)
            if None not in (theirs, ours) and theirs != ours:
                differences[key] = [theirs, ours]
        listed = [
            f"\n  - {key}: the checkpoint has {theirs!r}, this start {ours!r}; --allow {key}"
            for key, (theirs, ours) in differences.items()
            if key not in allowed
        ]
        if listed:
            raise OtherRun(
                f"{path}: is of another run, or of other settings than this start's; remove it, or use it with the"
                f" option named:{''.join(listed)}"
            )


def is_fixed(key: str) -> bool:
    """Whether a setting, such as "data.seed", must stay as it was at a run's first start."""
    return key in FIXED or key.split(".")[0] in FIXED


def fixed_changes(changed: Mapping[str, list[Any]], allow: Iterable[str] = ()) -> list[str]:
    """Those of changed settings (dotted name -> [stored, new]) that make another run, unless `allow` names them.

    What converted checkpoints were trained on is not known: with a stored data.source of "unset" any may be chosen.
    """
    allowed, free = set(allow), changed.get("data.source", [None])[0] == UNSET
    fixed = [key for key in changed if is_fixed(key) and key not in allowed]
    return [key for key in fixed if not (free and key.startswith("data."))]


def changed_settings(stored: Mapping[str, Mapping[str, Any]], config: Config) -> dict[str, list[Any]]:
    """Settings of `config` that differ from stored sections: dotted name -> [stored, new].

    One that the stored sections do not have is of an earlier version and had its default.
    """
    old, new = _flat(to_dict(Config())) | _flat(stored), _flat(to_dict(config))
    return {key: [old.get(key), new.get(key)] for key in old | new if old.get(key) != new.get(key)}


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": v for section, values in sections.items() for name, v in values.items()}

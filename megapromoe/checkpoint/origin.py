"""The settings that identify a run, and the check that a checkpoint belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.config.data_options import UNSET
from megapromoe.config.options import Config, to_dict

# Sections and fields that must not change during a run: the network, the data, the objective, the update.
# All others may change between starts: the parallel layout, sampling, the number of steps, logging and saving,
# and what is tuned during a run: the learning rate and its schedule, clipping and the decay of the average.
FIXED = (
    "model",
    *(f"data.{name}" for name in ("source", "path", "size", "flip", "seed")),
    *(f"data.{name}" for name in ("condition_dropout", "condition_dropout_stratum")),
    "diffusion",
    *(f"train.{name}" for name in ("seed", "global_batch", "accumulation")),
    *(f"train.{name}" for name in ("optimizer", "beta1", "beta2", "eps", "weight_decay")),
    *(f"train.muon_{name}" for name in ("momentum", "nesterov", "steps", "scale")),
)


class OtherRun(CheckpointError):
    """An undamaged checkpoint of another run, of other data or of other fixed settings."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint must share with the run that resumes from it.

    Attributes:
        run: identity of the run.
        data: identity of the data set; None if it has none.
        config: configuration of this start.
    """

    run: str
    data: str | None
    config: Config

    def check(self, path: Path, manifest: Mapping[str, Any], allow: Iterable[str] = ()) -> None:
        """Raises OtherRun with a list of the differences that `allow` does not name.

        Entries that a manifest does not have are not compared: converted checkpoints belong to no run.

        Args:
            path: the checkpoint folder, for the message.
            manifest: its manifest.
            allow: "run", "data", or settings of `FIXED` such as "data.seed".
        """
        allowed = set(allow)
        changed = changed_settings(manifest.get("config", {}), self.config) if manifest.get("config") else {}
        differences = {key: changed[key] for key in fixed_changes(changed)}
        for key, current in (("run", self.run), ("data", self.data)):
            stored = manifest.get(key)
            if None not in (stored, current) and stored != current:
                differences[key] = [stored, current]
        listed = [
            f"\n  - {key}: the checkpoint has {stored!r}, this start {current!r}; --allow {key}"
            for key, (stored, current) in differences.items()
            if key not in allowed
        ]
        if listed:
            raise OtherRun(
                f"{path}: is of another run, or of other settings than this start's; remove it, or use it with the"
                f" option named:{''.join(listed)}"
            )


def is_fixed(key: str) -> bool:
    """Whether a setting, such as "data.seed", must not change after the first start of a run."""
    return key in FIXED or key.split(".")[0] in FIXED


def fixed_changes(changed: Mapping[str, list[Any]], allow: Iterable[str] = ()) -> list[str]:
    """The changed settings that must not change and that `allow` does not name.

    The data of converted checkpoints are not known: with a stored data.source of "unset", any data may be used.

    Args:
        changed: dotted name -> [stored, new].
        allow: dotted names.
    """
    allowed, any_data = set(allow), changed.get("data.source", [None])[0] == UNSET
    fixed = [key for key in changed if is_fixed(key) and key not in allowed]
    return [key for key in fixed if not (any_data and key.startswith("data."))]


def changed_settings(stored: Mapping[str, Mapping[str, Any]], config: Config) -> dict[str, list[Any]]:
    """Settings of `config` that differ from the stored sections: dotted name -> [stored, new].

    A setting that is missing in the stored sections did not exist in the version that wrote them; it counts as default.
    """
    old, new = _flat(to_dict(Config())) | _flat(stored), _flat(to_dict(config))
    return {key: [old.get(key), new.get(key)] for key in old | new if old.get(key) != new.get(key)}


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": v for section, values in sections.items() for name, v in values.items()}

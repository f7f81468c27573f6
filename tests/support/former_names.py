"""Run directories as versions with the former names of options left them."""

import json
from pathlib import Path
from typing import Any

import yaml

from megapromoe.checkpoint.manifest import MANIFEST, seal
from megapromoe.config.options import Config, to_dict
from megapromoe.config.renamed_options import RENAMED, RENAMED_VALUES
from megapromoe.config.resolve import resolve


def former_sections(config: Config) -> dict[str, dict[str, Any]]:
    """The sections of a config, with each option by its former spelling if it has one."""
    sections = to_dict(config)
    for former, present in RENAMED.items():
        _put(sections, former, _take(sections, present))
    for key, values in RENAMED_VALUES.items():
        for value, settings in values.items():
            if all(_get(sections, name) == present for name, present in settings.items()):
                for name in settings:
                    _take(sections, name)
                _put(sections, key, value)
                break
    return sections


def rewrite_with_former_names(folder: Path) -> None:
    """Gives config.yaml and the manifests of a run directory the former names of all options."""
    config = resolve(file=folder / "config.yaml")
    sections = former_sections(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    for manifest in folder.glob(f"checkpoints/*/{MANIFEST}"):
        manifest.write_text(seal(json.loads(manifest.read_text()) | {"config": sections}))


def _get(sections: dict[str, dict[str, Any]], key: str) -> Any:
    section, _, name = key.partition(".")
    return sections[section].get(name)


def _put(sections: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    sections[section][name] = value


def _take(sections: dict[str, dict[str, Any]], key: str) -> Any:
    section, _, name = key.partition(".")
    return sections[section].pop(name)

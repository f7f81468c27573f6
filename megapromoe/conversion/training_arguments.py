"""Model and objective from the arguments of a training script, which are saved with its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config
from megapromoe.config.presets import SIZES
from megapromoe.config.resolve import resolve
from megapromoe.conversion.conventions import with_objective
from megapromoe.conversion.stream import ConversionError

_NAME = re.compile(r"(DiT|SiT)-(S|B|L|XL)/(\d{1,3})")
_LATENT_SIDE = 8  # pixels of the image per latent pixel, in each direction


def objective_of(path: Path, arguments: Mapping[str, Any]) -> str | None:
    """The objective, one of `conventions.OBJECTIVES`; None if the arguments do not determine it.

    Raises ConversionError for an objective that is not implemented.

    Source: train.py of DiT, SiT (`parse_transport_args`) and REPA (`SILoss`).
    """
    name = _NAME.fullmatch(str(arguments.get("model", "")))
    if "path_type" in arguments:
        path_type, prediction = str(arguments["path_type"]), str(arguments.get("prediction", "velocity"))
        if path_type.lower() != "linear" or prediction not in ("velocity", "v"):
            raise ConversionError(
                f"{path}: its args have path_type = {path_type}, prediction = {prediction}; only the linear path with"
                " velocity prediction is implemented"
            )
        return "repa" if "proj_coeff" in arguments or "encoder_depth" in arguments else "sit"
    return "ddpm" if name and name[1] == "DiT" else None


def config_of(path: Path, arguments: Mapping[str, Any]) -> Config | None:
    """The config of the model that DiT's, SiT's or REPA's arguments name; None if they name no such model.

    The data set is not set, and optimizer options have their defaults. Raises ConversionError or ConfigError.
    """
    name = _NAME.fullmatch(str(arguments.get("model", "")))
    objective = objective_of(path, arguments)
    side = arguments.get("image_size", arguments.get("resolution"))
    if not name or objective is None or type(side) is not int:
        return None
    size = SIZES[name[2].lower()]
    model = {
        "router": "dense",
        **size,
        "patch_size": int(name[3]),
        "input_size": side // _LATENT_SIDE,
        "num_classes": arguments.get("num_classes", 1000),
        "qk_norm": "layer" if arguments.get("qk_norm", False) else "none",
        "learn_sigma": str(objective != "repa").lower(),
    }
    settings = [f"model.{key}={value}" for key, value in model.items()]
    return with_objective(resolve(overrides=[*settings, "data.source=unset", "data.flip=true"]), objective)

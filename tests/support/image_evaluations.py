"""Recipes with a section `evaluate`, and the records of `evaluation.jsonl` that belong to them."""

import json

from support.small_studies import TINY, recipe

SECTION = {"num": 200, "guidance": [1.0, 1.5], "steps": 4, "every": 2, "features": "digits"}


def evaluated(section=SECTION, **changes):
    settings = {key: value for key, value in TINY.items() if key != "train.save_every"} | {"train.steps": 6}
    return recipe(**({"settings": settings, "evaluate": section} | changes))


REQUESTED = {"reference": "data", "split": "train", "features": "digits"}


def record(step, guidance, value=5.0, **changes):
    line = {"step": step, "guidance": guidance, "count": 200, "weights": "ema", "classes": "balanced", "only": None}
    line |= {"autoencoder": None, "sample": {"steps": 4}, "asked": REQUESTED}
    return line | {"figures": {"Fréchet distance (X)": value}} | changes


def write(run, records):
    run.mkdir(parents=True, exist_ok=True)
    (run / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + '{"step": 6, "gui')

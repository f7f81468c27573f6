"""Studies that take no time: tiny models, and runs that only look finished."""

import json

from megapromoe.studies.collect import row
from megapromoe.studies.recipe import make_recipe
from megapromoe.studies.study import plan

TINY = {"model.hidden_size": 32, "model.depth": 2, "model.heads": 2, "train.global_batch": 16, "sample.batch": 32}
TINY |= {"train.steps": 3, "train.warmup": 0, "train.log_every": 1, "train.save_every": 1}


def recipe(**changes):
    values = {
        "preset": "digits",
        "settings": TINY,
        "axes": {"model.num_experts": [2, 4]},
        "seeds": [0, 1],
        "variants": {"promoe": {}},
    }
    return make_recipe(values | changes)


def compared(**changes):
    """ProMoE, TC and dense at equal active parameters."""
    tc = {"model.router": "tc", "model.shared_expert": False, "model.unconditional_expert": False}
    return recipe(
        variants={
            "promoe": {},
            "tc": {"settings": tc, "match": "model.expert_ratio"},
            "dense": {
                "settings": {"model.router": "dense", "model.mlp_ratio": 1.0},
                "match": "model.mlp_ratio",
                "without": ["model.num_experts"],
            },
        },
        active_parameters={"like": {"model.num_experts": 2}, "tolerance": 0.01, "multiple": 4},
        baseline="dense",
        **changes,
    )


def finished(tmp_path, made, loss=lambda task: 0.5):
    """A study whose every task looks done, with metrics whose means are known.

    Half of the lines have the names of earlier versions, as in runs that were resumed by this one.
    """
    study = plan(tmp_path, made)
    for task in study.tasks:
        saved = study.run(task) / "checkpoints" / f"step-{task.config.train.steps:08d}"
        saved.mkdir(parents=True)
        (saved / "manifest.json").write_text("{}")
        lines = []
        moe = len(task.config.model.moe_blocks)
        for step in range(1, task.config.train.steps + 1):
            names = ("total_loss", "denoising_loss") if (task.index + step) % 2 else ("loss", "denoising")
            line = {"step": step, "images_per_second": 100.0 + step**2} | dict(
                zip(names, (9.0, 1.0 + step), strict=True)
            )
            line |= {"flops_per_second": 5.0, "memory_bytes": 1000 - step}
            if moe:
                experts = task.config.model.num_experts
                line |= {"dead_experts": step, "load_entropy": 0.5, "load_max_over_mean": 2.0}
                line["expert_load"] = [[1] * experts] * moe
            lines.append(json.dumps(line))
        (study.run(task) / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "half a li')
        study.loss_file(task).parent.mkdir(exist_ok=True)
        known = {"step": task.config.train.steps, "weights": "ema", "split": "train", "draws": 8192, "loss": loss(task)}
        study.loss_file(task).write_text(json.dumps(known | {"standard_error": 0.01}))
    return study


def rows(study):
    return [row(study, task) for task in study.tasks]

"""A scaling study: many trainings from one recipe, one table, a few pictures.

    python tools/scaling_study.py plan STUDY --recipe tools/studies/digits.yaml --measure    # what it is and costs
    python tools/scaling_study.py run STUDY --jobs 2           # trains what is missing; repeat to go on
    python tools/scaling_study.py submit STUDY --partition=gpu # or as an array of SLURM jobs
    python tools/scaling_study.py collect STUDY                # results.csv, results.md, curves.csv
    python tools/scaling_study.py plot STUDY                   # pictures of loss, routing and cost

STUDY is a folder. A recipe says what varies, what is compared and what is held equal; tools/studies/ holds some, and
megapromoe/studies/recipe.py explains them. Without a file, options of `plan` make one. Each command tells more with
--help.

exit codes: 0 done, 1 a task failed or nothing is there to show, 2 the command or the recipe is wrong, 75 stopped by a
signal and saved (repeat the command), 130 interrupted; `run --task I` has that of the task
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megapromoe.config.options import ROUTERS, ConfigError
from megapromoe.io import write_text
from megapromoe.studies.collect import DRAWS, evaluate, evaluated, row
from megapromoe.studies.estimate import Speed, duration, measure, seconds, table
from megapromoe.studies.recipe import Recipe, StudyError, make_recipe, read_recipe
from megapromoe.studies.study import names, open_study, plan

ROOT = Path(__file__).resolve().parents[1]
SETTING = re.compile(r"\w+\.\w+=")
LAUNCHER = ROOT / "launchers" / "scaling_experts.sh"
# What `--routers` compares: over the base, which is a ProMoE. None has what only ProMoE knows.
ALONE = {"model.shared_expert": False, "model.unconditional_expert": False}
COMPARED = {
    "dense": {"settings": {}, "match": "model.mlp_ratio", "without": ["model.num_experts"]},
    "tc": {"settings": {**ALONE, "model.balance_weight": 0.01}, "match": "model.expert_ratio"},
    "ec": {"settings": ALONE, "match": "model.expert_ratio"},
    "diffmoe": {"settings": ALONE, "match": "model.expert_ratio"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = arguments(argv)
    try:
        return options.command(options)
    except (StudyError, ConfigError) as error:
        print(f"scaling_study: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"scaling_study: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("scaling_study: interrupted; what was training has saved, repeat the command to go on", file=sys.stderr)
        return 130


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        made = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=form, allow_abbrev=False
        )
        made.add_argument("study", type=Path, metavar="STUDY", help="folder of the study")
        made.set_defaults(command=function, name=name)
        return made

    made = command(
        "plan",
        plan_command,
        "Writes a study into a folder and prints what it will cost; trains nothing.",
        "example:\n  scaling_study.py plan runs/experts --preset promoe_b --experts 4 8 16 32 64 --seeds 0 1 \\\n"
        "    --routers promoe tc dense --ranks 8 \\\n"
        '    --launcher "torchrun --standalone --nproc-per-node 8" parallel.ep=4 train.steps=100000',
    )
    made.usage = "scaling_study.py plan STUDY [options] [section.key=value ...]"
    made.add_argument("--recipe", type=Path, metavar="FILE", help="YAML; instead of the options down to --launcher")
    made.add_argument("--preset", metavar="NAME", help="what all tasks start from; `megapromoe show` lists them")
    made.add_argument("--experts", type=int, nargs="+", metavar="E", help="numbers of routed experts")
    made.add_argument("--sizes", nargs="+", metavar="PRESET", help="presets of several sizes, instead of --preset")
    made.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="lengths of the training, each a run of its own"
    )
    made.add_argument("--seeds", type=int, nargs="+", metavar="S", help="default: 0 1 2")
    made.add_argument(
        "--routers", nargs="+", metavar="R", help=f"compared at equal active parameters: {', '.join(ROUTERS)}"
    )
    made.add_argument("--ranks", type=int, metavar="N", help="processes of a task; default: 1")
    made.add_argument("--launcher", metavar="WORDS", help="what starts them, before `-m megapromoe train`, in one word")
    hours = made.add_mutually_exclusive_group()
    hours.add_argument(
        "--measure", action="store_true", help="estimate hours by some steps of each model, here and now"
    )
    hours.add_argument("--throughput", type=float, metavar="FLOPS", help="estimate hours at so many FLOP/s of a task")

    made = command("run", run_command, "Trains what is missing, resumes what is partial, and evaluates what is done.")
    made.add_argument("--task", type=int, metavar="I", help="only this one, as an array job does")
    made.add_argument("--jobs", type=int, default=1, metavar="J", help="tasks at a time; default: 1")

    made = command(
        "submit",
        submit_command,
        "Submits what is missing as an array of SLURM jobs, each `run STUDY --task I`.",
        "Options that follow STUDY and are not listed go to sbatch:\n"
        "  scaling_study.py submit runs/experts --at-once 4 --partition=gpu --time=12:00:00",
    )
    made.add_argument("--at-once", type=int, metavar="M", help="jobs of the array that run at a time; default: all")
    made.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")

    collect = command("collect", collect_command, "Writes results.csv, results.md, curves.csv; tells what is missing.")
    collect.add_argument("--against", nargs="+", metavar="VARIANT", help="compare with these; default: the baseline")
    plot = command("plot", plot_command, "Draws what is done, as PNGs in STUDY; after `collect`.")
    plot.add_argument("--note", default="", metavar="TEXT", help="printed below the cost, such as the machine")
    for made in (collect, plot):
        made.add_argument(
            "--draws",
            type=int,
            default=DRAWS,
            metavar="N",
            help=f"of record, noise and time for the loss; default {DRAWS}",
        )

    # Settings may stand anywhere, also after options that take a list.
    words = list(sys.argv[1:] if argv is None else argv)
    settings = [word for word in words if SETTING.match(word)]
    options, rest = parser.parse_known_args([word for word in words if not SETTING.match(word)])
    options.sbatch, options.settings = rest, settings
    if settings and options.name != "plan":
        parser.error(f"{settings[0]}: settings belong to the recipe; only `plan` takes them")
    if rest and options.name != "submit":
        parser.error(f"unrecognized arguments: {' '.join(rest)}; see scaling_study.py {options.name} --help")
    for name in ("jobs", "at_once", "ranks"):
        if getattr(options, name, None) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if getattr(options, "draws", 2) < 2:
        parser.error(f"--draws {options.draws}: must be at least 2")
    if getattr(options, "throughput", None) is not None and not options.throughput > 0:
        parser.error(f"--throughput {options.throughput}: must be above 0, such as 3e14")
    return options


def plan_command(options: argparse.Namespace) -> int:
    study = plan(options.study, _recipe(options))
    tasks = table(study)
    write_text(study.folder / "tasks.md", tasks)
    print(tasks)
    total = sum(task.flops for task in study.tasks)
    print(f"tasks: {len(study.tasks)}; {total:.3g} FLOPs of training in all; not done: {len(study.missing())}")
    if options.throughput or options.measure:
        speeds = dict.fromkeys((task.variant for task in study.tasks), Speed(options.throughput or 0))
        if options.measure:
            speeds = measure(study)
            for name, speed in speeds.items():
                print(f"  {name}: {speed.flops_per_second:.3g} FLOP/s, start-up {duration(speed.start)} (measured now)")
        print(f"estimate: {duration(seconds(study, speeds))} one task after another, on ranks: {study.recipe.ranks}")
    else:
        print("hours: not estimated; add --measure, or --throughput FLOPS")
    print(f"to train: python tools/scaling_study.py run {study.folder}")
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    """From the file, or from the options."""
    said = ("preset", "experts", "sizes", "steps", "seeds", "routers", "ranks", "launcher", "settings")
    given = {name: getattr(options, name) for name in said if getattr(options, name)}
    if options.recipe is not None:
        if given:
            raise StudyError([f"--recipe: says all; leave out {', '.join(given)}, or write them into the file"])
        return read_recipe(options.recipe)
    if bool(options.preset) == bool(options.sizes):
        raise StudyError(["--recipe, --preset or --sizes: one of them is needed"])
    routers = options.routers or ["promoe"]
    if wrong := [f"--routers {name}: must be one of {', '.join(ROUTERS)}" for name in routers if name not in ROUTERS]:
        raise StudyError(wrong)
    axes = {"preset": options.sizes, "model.num_experts": options.experts, "train.steps": options.steps}
    content = {
        "preset": options.preset or options.sizes[0],
        "settings": dict(text.split("=", 1) for text in options.settings),
        "axes": {key: values for key, values in axes.items() if values},
        "seeds": options.seeds or [0, 1, 2],
        "variants": {name: _compared(name, axes) for name in routers},
        "ranks": options.ranks or 1,
        "launcher": shlex.split(options.launcher or ""),
    }
    if len(routers) > 1:
        experts = sorted(options.experts or [])
        like = {"model.num_experts": experts[len(experts) // 2]} if experts else {}
        content["active_parameters"] = {"like": like}
        content["baseline"] = "dense" if "dense" in routers else routers[0]
    else:
        content["variants"][routers[0]].pop("match", None)
    return make_recipe(content)


def _compared(router: str, axes: dict) -> dict:
    said = COMPARED.get(router, {"settings": {}})
    said = {**said, "settings": {"model.router": router, **said["settings"]}}
    if "without" in said:
        said["without"] = [axis for axis in said["without"] if axes.get(axis)]
    return said


def run_command(options: argparse.Namespace) -> int:
    from megapromoe.distributed import runtime
    from megapromoe.studies.runs import exit_code, run_tasks

    study = open_study(options.study)
    tasks = study.tasks if options.task is None else (study.task(options.task),)
    if options.jobs > 1:  # more threads than cores would fight for them
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    asked_to_stop = runtime.listen()
    codes = run_tasks(study, tasks, options.jobs, asked_to_stop)
    code = exit_code(codes)
    if not asked_to_stop():
        evaluate(study, tasks)
    failed = [task for task in tasks if codes[task.name] not in (0, 75)]
    for task in failed:
        print(f"{task.name}: {study.state(task)}: {study.log(task)}", file=sys.stderr)
    left = [task for task in tasks if not study.done(task)]
    print(f"{len(tasks) - len(left)} of {len(tasks)} done, {len(failed)} failed", file=sys.stderr)
    return code


def submit_command(options: argparse.Namespace) -> int:
    study = open_study(options.study)
    missing = [task.index for task in study.missing()]
    if not missing:
        print(f"{study.folder}: all {len(study.tasks)} tasks are done")
        return 0
    array = f"--array={spans(missing)}" + (f"%{options.at_once}" if options.at_once else "")
    words = ["sbatch", array, *options.sbatch, str(LAUNCHER), str(study.folder.resolve())]
    print(shlex.join(words), flush=True)
    if options.dry_run:
        return 0
    try:
        logs = study.folder / "logs"
        logs.mkdir(exist_ok=True)
        return subprocess.run(words, cwd=logs).returncode  # where the jobs' own output goes
    except FileNotFoundError:
        print("scaling_study: sbatch is not here; submit from a login node, or use `run`", file=sys.stderr)
        return 1


def spans(indices: Sequence[int]) -> str:
    """Indices in SLURM's words: [0, 1, 2, 5] -> "0-2,5"."""
    words: list[list[int]] = []
    for index in sorted(indices):
        if words and index == words[-1][-1] + 1:
            words[-1] = [words[-1][0], index]
        else:
            words.append([index])
    return ",".join("-".join(map(str, word)) for word in words)


def collect_command(options: argparse.Namespace) -> int:
    from megapromoe.studies.curves import figures, several_steps
    from megapromoe.studies.tables import to_csv, to_markdown

    study = open_study(options.study)
    variants = [variant.name for variant in study.recipe.variants]
    against = options.against or [study.recipe.baseline or variants[0]]
    if wrong := [name for name in against if name not in variants]:
        raise StudyError([f"--against {', '.join(wrong)}: the variants are {', '.join(variants)}"])
    done = [task for task in study.tasks if study.done(task)]  # those of now: some may be training
    evaluate(study, done, options.draws)
    found = [row(study, task, options.draws) for task in done]
    missing = [f"{task.name} ({study.state(task)})" for task in study.tasks if task not in done]
    write_text(study.folder / "results.csv", to_csv(found))
    evaluations = [figure for task in done for figure in figures(study, task)]
    if several_steps(evaluations):
        write_text(study.folder / "curves.csv", to_csv(evaluations))
    text = to_markdown(found, study.recipe, missing, against, evaluations)
    write_text(study.folder / "results.md", text)
    print(text)
    return 0 if found else 1


def plot_command(options: argparse.Namespace) -> int:
    from megapromoe.studies.plots import draw_all

    study = open_study(options.study)
    done = [task for task in study.tasks if study.done(task)]
    known = [task for task in done if evaluated(study, task, options.draws)]
    if left := names([task for task in done if task not in known]):
        print(f"not shown, their loss on fixed draws is not computed yet (`collect` does): {left}", file=sys.stderr)
    found = [row(study, task, options.draws) for task in known]
    for path in draw_all(study, found, options.note):
        print(path)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())

"""The options of each command of `megapromoe study`, and the notes of their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from megapromoe.commands.command_line import (
    positive,
    positive_number,
    share,
    takes_no_settings,
    whole_number,
)
from megapromoe.config.model_options import ROUTERS
from megapromoe.planning.machines import MACHINES
from megapromoe.studies.collect import DRAWS, LOSS
from megapromoe.studies.recipe import recipe_names
from megapromoe.studies.scales import scale_names
from megapromoe.studies.status import QUIET

DEFAULT_RETRIES = 2
RECIPES = f"{', '.join(name for name in recipe_names() if '/' not in name)}, paper/t1 ..."

Function = Callable[[argparse.Namespace], int]


def add_commands(parser: argparse.ArgumentParser, functions: Mapping[str, Function]) -> None:
    """Adds the commands of `megapromoe study`; `functions` has the function of each by its name."""
    parser.usage = (
        "megapromoe study plan|run|submit|status|collect|power|plot|report STUDY [options], or megapromoe study recipes"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str = "", has_study: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if has_study:
            added.add_argument("study", type=Path, metavar="STUDY", help="folder of the study")
        added.set_defaults(study_command=functions[name])
        if name != "plan":
            takes_no_settings(added, "settings belong to the recipe; only `plan` takes them")
        return added

    command("recipes", "Lists the recipes of the package, each with a line.", has_study=False)

    summary = "Writes a study into a folder and prints its estimated cost; trains nothing."
    _plan_options(command("plan", summary, _PLAN_EXAMPLE))

    summary = "Trains missing tasks, resumes partial ones, and evaluates finished ones."
    run_parser = command("run", summary, _RUN_NOTE)
    run_parser.add_argument(
        "--task", type=int, metavar="I", help="run only the training with this number, like a job of an array"
    )
    only = run_parser.add_mutually_exclusive_group()
    only.add_argument(
        "--evaluate",
        action="store_true",
        help="train nothing; evaluate images of trained tasks, as the recipe defines",
    )
    only.add_argument("--train", action="store_true", help="evaluate nothing; leave the evaluations to another command")
    run_parser.add_argument(
        "--wait",
        action="store_true",
        help="with --evaluate: wait for trainings of other commands, and evaluate each when it is done",
    )
    run_parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="number of tasks that run at the same time; default: 1"
    )
    run_parser.add_argument(
        "--evaluation-jobs",
        type=positive,
        default=0,
        metavar="N",
        help="evaluations that run at the same time beside the --jobs; default: they are counted with them",
    )
    run_parser.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help="processes of each task, started by torchrun on this machine instead of the recipe's launcher",
    )
    _retries_option(run_parser, DEFAULT_RETRIES)

    summary = "Shows whether each job is done, running, waiting, stopped or failed; starts and changes nothing."
    command("status", summary, _STATUS_NOTE)

    summary = "Submits missing tasks as an array of SLURM jobs, each `run STUDY --task I`, and then their evaluations."
    submit = command("submit", summary, _SUBMIT_EXAMPLE)
    submit.set_defaults(passes_on=True)
    submit.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="number of jobs of the array that run at the same time; default: all",
    )
    only = submit.add_mutually_exclusive_group()
    only.add_argument("--train", action="store_true", help="submit only the trainings")
    only.add_argument("--evaluate", action="store_true", help="submit only the evaluations of tasks that are trained")
    submit.add_argument(
        "--evaluation-options",
        metavar="WORDS",
        default="",
        help='more options of sbatch for the evaluations, quoted as one word, such as "--partition=small --time=30"',
    )
    _retries_option(submit, None)
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch commands, but submit nothing")

    collect = command("collect", "Writes results.md and tables of results, noise, curves and all measurements.")
    collect.add_argument(
        "--against", nargs="+", metavar="VARIANT", help="variants to compare with; default: the baseline"
    )
    collect.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="losses that are computed at the same time; default: 1"
    )
    summary = "Shows which differences N seeds resolve, from the noise of finished tasks; needs `collect` first."
    power = command("power", summary)
    power.add_argument(
        "--difference", type=positive_number, metavar="D", help="also show how many seeds resolve this difference"
    )
    power.add_argument(
        "--metric", default=LOSS, metavar="NAME", help=f"a metric of noise.csv, or a part of its name; default: {LOSS}"
    )
    power.add_argument(
        "--power", type=_power_share, metavar="P", help="share of studies that are to resolve it; default: 0.8"
    )
    plot = command("plot", "Plots the results of finished tasks as PNGs in STUDY; needs `collect` first.")
    plot.add_argument(
        "--note", default="", metavar="TEXT", help="text below the plot of costs, such as the name of the machine"
    )
    report = command("report", "Writes an HTML page with interactive plots of the study, at any time.", _REPORT_NOTE)
    report.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in STUDY")
    report.add_argument(
        "--against", nargs="+", metavar="VARIANT", help="variants to compare with; default: the baseline"
    )
    for added in (collect, power, plot, report):
        added.add_argument(
            "--draws",
            type=whole_number(2),
            default=DRAWS,
            metavar="N",
            help=f"number of samples of (record, noise, time) for the loss; default {DRAWS}",
        )


def _retries_option(parser: argparse.ArgumentParser, default: int | None) -> None:
    """How often a job is started again after failures that can pass."""
    parser.add_argument(
        "--retries",
        type=whole_number(0),
        default=default,
        metavar="N",
        help="starts again after a hang, a signal, a preemption or a failed node, without progress in between; default:"
        f" {DEFAULT_RETRIES}. Wrong configurations, divergence, a full disk or memory are never tried again",
    )


_RUN_NOTE = """\
Several `run` commands may work on one study: a task that another command trains is left to it, and this command
waits for its end. If the recipe has a section `evaluate`, each training is followed by an evaluation: `megapromoe
evaluate` samples images from its checkpoints. Existing results are not computed again.
Jobs that run at the same time divide the cores, and the GPUs: one for each of their ranks. A job starts when enough are
free.
  megapromoe study run STUDY                      # trainings, and each one's evaluation when it is done
  megapromoe study run STUDY --task 1             # the training of one task
  megapromoe study run STUDY --task 1 --evaluate  # its evaluation
  megapromoe study run STUDY --train              # trainings only; and on another machine, as they end:
  megapromoe study run STUDY --evaluate --wait
  megapromoe study run STUDY --jobs 2 --ranks 4   # two tasks at the same time, each on four GPUs of this machine"""
_STATUS_NOTE = f"""\
The states are read only from the files in STUDY, so this command works at any time and on any machine with access to
the folder.
  running   a process holds the lock of the task; on file systems that do not show locks of other machines,
            its last log line is younger than {QUIET / 60:.0f} minutes
  done      the last step is saved; for an evaluation, all its results exist
  waiting   not started, or its training is not done
  stopped   stopped by a signal and saved; `run` continues it
  stopped early   its model was clearly worse: section `stop_early` of the recipe
  failed    ended with an error, or was killed; the remark is the reason, logs/NAME.log has details, and `run` starts it
            again
The exit code is 0 in all these states."""
_REPORT_NOTE = """\
One file, which needs no network: a summary, costs, a table of the models, losses over steps, paired differences,
metrics of sampled images, failed and repeated jobs, links to the runs. Losses on fixed draws are those that `collect`
has computed. It needs plotly: pip install 'megapromoe[report]'
  megapromoe study report STUDY --out report.html"""
_PLAN_EXAMPLE = """\
examples:
  megapromoe study plan paper/t7 data.path=latents/imagenet --seeds 0 1
  megapromoe study plan runs/small --recipe paper/t7 --scale fashion
  megapromoe study plan runs/experts --preset promoe_b --experts 4 8 16 32 64 --seeds 0 1 \\
    --routers promoe tc dense --ranks 8 \\
    --launcher "torchrun --standalone --nproc-per-node 8" parallel.ep=4 train.steps=100000 \\
    data.source=latents data.path=latents/train

Repeated with more seeds, variants, values of axes or an `evaluate` section, the command adds tasks to the study;
planned tasks keep their configuration and number. What would change a planned task is refused, with all differences."""
_SUBMIT_EXAMPLE = """\
Options after STUDY that are not listed are passed to sbatch:
  megapromoe study submit runs/experts --jobs 4 --partition=gpu --time=12:00:00
A task gets a GPU for each of its ranks. Ranks on several nodes need srun: plan --ranks 16 --launcher "srun python".
Variants with other ranks or nodes in the recipe are arrays of their own.
Evaluations are separate arrays; each of their jobs waits for the training of the same task (aftercorr).
The jobs use the environment of this command, unless MEGAPROMOE_ENV or MEGAPROMOE_PYTHON is set."""


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe study plan STUDY [options] [section.key=value ...]"
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help=f"{RECIPES}, or a YAML file; replaces the options down to --routers; default: STUDY, if it is the name"
        " of a recipe",
    )
    parser.add_argument(
        "--scale",
        metavar="NAME",
        help=f"train the same models at a small size: {', '.join(scale_names())}; figures of a paper are then not"
        " comparable",
    )
    parser.add_argument("--preset", metavar="NAME", help="preset of all tasks; `megapromoe show` lists them")
    parser.add_argument("--experts", type=int, nargs="+", metavar="E", help="numbers of routed experts to compare")
    parser.add_argument(
        "--sizes", nargs="+", metavar="PRESET", help="presets of several sizes to compare, instead of --preset"
    )
    parser.add_argument(
        "--train-steps", type=int, nargs="+", metavar="N", help="numbers of training steps, each for a separate run"
    )
    parser.add_argument(
        "--routers", nargs="+", metavar="R", help=f"routers to compare at equal active parameters: {', '.join(ROUTERS)}"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="S", help="seeds of each combination; default: the recipe's, or 0 1 2"
    )
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="number of processes of a task; default: the recipe's, or 1"
    )
    parser.add_argument(
        "--launcher",
        metavar="WORDS",
        help="command that starts the processes, before `-m megapromoe train`, quoted as one word",
    )
    parser.add_argument(
        "--gpu", choices=tuple(MACHINES), help="estimate GPU-hours on this kind of GPU; default: the recipe's, if any"
    )
    hours = parser.add_mutually_exclusive_group()
    hours.add_argument(
        "--measure", action="store_true", help="estimate hours by running a few steps of each model on this machine"
    )
    hours.add_argument(
        "--throughput", type=positive_number, metavar="FLOPS", help="estimate hours for this speed of a task in FLOP/s"
    )


def _power_share(text: str) -> float:
    """An argparse type: a power that an effect can have, above the level of the test."""
    value = share(text)
    if not 0.05 < value <= 0.999:
        raise argparse.ArgumentTypeError(f"must be above 0.05, the level of the test, and at most 0.999, not {text!r}")
    return value

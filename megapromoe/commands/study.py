"""`megapromoe study`: runs many trainings from one recipe, and writes tables and plots of their results."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megapromoe.commands.command_line import (
    FileError,
    InterruptedCommand,
    file_errors,
    positive,
    positive_number,
    refuse_other_words,
    share,
    takes_no_settings,
    whole_number,
)
from megapromoe.commands.launchers import launchers_folder
from megapromoe.config.model_options import ROUTERS
from megapromoe.io import write_text
from megapromoe.planning.machines import MACHINES
from megapromoe.studies.collect import DRAWS, LOSS, evaluate, evaluated, row
from megapromoe.studies.comparison import DEFAULT_SEEDS, compare
from megapromoe.studies.equal_compute import compute_in_words
from megapromoe.studies.estimate import Speed, evaluations_in_words, measure, seconds, table
from megapromoe.studies.extension import in_words as extension_in_words
from megapromoe.studies.extension import plan_or_extend
from megapromoe.studies.gpu_hours import arm_lines
from megapromoe.studies.grid import budget_of
from megapromoe.studies.placement import on_this_machine, placement_of
from megapromoe.studies.published_tables import NOT_COMPARABLE, size_lines
from megapromoe.studies.recipe import Recipe, StudyError, find_recipe, read_recipe, recipe_names
from megapromoe.studies.recipe_changes import changed
from megapromoe.studies.scales import scale_names, scaled
from megapromoe.studies.status import QUIET, job_state
from megapromoe.studies.status import table as status_table
from megapromoe.studies.study import Study, missing_data, names, open_study
from megapromoe.studies.submission import array_jobs, submit
from megapromoe.work_progress import duration

_RECIPES = f"{', '.join(name for name in recipe_names() if '/' not in name)}, paper/t1 ..."
EPILOG = f"""\
  megapromoe study recipes                                 # the recipes of the package
  megapromoe study plan STUDY --recipe digits --measure    # writes the study, estimates its cost
  megapromoe study run STUDY --jobs 2                      # trains the missing tasks; repeat to continue
  megapromoe study submit STUDY --partition=gpu            # or as an array of SLURM jobs
  megapromoe study status STUDY                            # the state of each job
  megapromoe study collect STUDY                           # results.md, and tables of results, noise, evaluations
  megapromoe study power STUDY --difference 0.002          # how many seeds resolve a difference
  megapromoe study plot STUDY                              # plots of loss, routing, cost and sampled images
  megapromoe study report STUDY                            # a page with interactive plots

STUDY is a folder. A recipe defines what varies, what is compared and what is kept equal: one of
{_RECIPES}, or a YAML file; docs/study.md explains them.
`plan paper/t7` and `submit paper/t7` take the recipe of this name and the folder ./paper/t7. Without a recipe, the
other options of `plan` define the study. Each command has a --help.

exit codes: 0 done, 1 a task failed or there is no result yet, 2 the command or the recipe is wrong, 75 stopped by a
signal and saved (repeat the command), 130 interrupted; `run --task I` returns the exit code of the task"""
JOB = False
LAUNCHER = "scaling_experts.sh"
DEFAULT_RETRIES = 2


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "megapromoe study plan|run|submit|status|collect|power|plot|report STUDY [options], or megapromoe study recipes"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str,
        function: Callable[[argparse.Namespace], int],
        summary: str,
        epilog: str = "",
        has_study: bool = True,
    ) -> argparse.ArgumentParser:
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
        added.set_defaults(study_command=function)
        if name != "plan":
            takes_no_settings(added, "settings belong to the recipe; only `plan` takes them")
        return added

    command("recipes", _list_recipes, "Lists the recipes of the package, each with a line.", has_study=False)

    summary = "Writes a study into a folder and prints its estimated cost; trains nothing."
    _plan_options(command("plan", _plan, summary, _PLAN_EXAMPLE))

    summary = "Trains missing tasks, resumes partial ones, and evaluates finished ones."
    run_parser = command("run", _run, summary, _RUN_NOTE)
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
    command("status", _status, summary, _STATUS_NOTE)

    summary = "Submits missing tasks as an array of SLURM jobs, each `run STUDY --task I`, and then their evaluations."
    submit = command("submit", _submit, summary, _SUBMIT_EXAMPLE)
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

    collect = command(
        "collect", _collect, "Writes results.md and tables of results, noise, curves and all measurements."
    )
    collect.add_argument(
        "--against", nargs="+", metavar="VARIANT", help="variants to compare with; default: the baseline"
    )
    summary = "Shows which differences N seeds resolve, from the noise of finished tasks; needs `collect` first."
    power = command("power", _power, summary)
    power.add_argument(
        "--difference", type=positive_number, metavar="D", help="also show how many seeds resolve this difference"
    )
    power.add_argument(
        "--metric", default=LOSS, metavar="NAME", help=f"a metric of noise.csv, or a part of its name; default: {LOSS}"
    )
    power.add_argument(
        "--power", type=_power_share, metavar="P", help="share of studies that are to resolve it; default: 0.8"
    )
    plot = command("plot", _plot, "Plots the results of finished tasks as PNGs in STUDY; needs `collect` first.")
    plot.add_argument(
        "--note", default="", metavar="TEXT", help="text below the plot of costs, such as the name of the machine"
    )
    report = command(
        "report", _report, "Writes an HTML page with interactive plots of the study, at any time.", _REPORT_NOTE
    )
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
        help=f"{_RECIPES}, or a YAML file; replaces the options down to --routers; default: STUDY, if it is the name"
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


def run(options: argparse.Namespace, launch: None) -> int:
    try:
        with file_errors():
            return options.study_command(options)
    except KeyboardInterrupt as error:
        raise InterruptedCommand("interrupted; running trainings have saved, repeat the command to continue") from error


def _plan(options: argparse.Namespace) -> int:
    refuse_other_words(options, "STUDY is the only path")
    extension = plan_or_extend(options.study, _recipe(options))
    study = extension.study
    _print_cost(study, options.gpu)
    for line in extension_in_words(extension):
        print(line)
    total = sum(task.flops for task in study.tasks)
    print(f"tasks: {len(study.tasks)}; {total:.3g} FLOPs of training in total; not done: {len(study.missing())}")
    if study.recipe.compute is not None:
        budgets = [budget_of(study.recipe, task.point) for task in study.tasks]
        print(compute_in_words([task.config for task in study.tasks], budgets))
    if evaluations := evaluations_in_words(study):
        print(evaluations)
    if options.throughput or options.measure:
        speeds = dict.fromkeys((task.variant for task in study.tasks), Speed(options.throughput or 0))
        if options.measure:
            speeds = measure(study)
            for name, speed in speeds.items():
                print(f"  {name}: {speed.flops_per_second:.3g} FLOP/s, start-up {duration(speed.start)} (measured now)")
        ranks = sorted({placement_of(study.recipe, task).ranks for task in study.tasks})
        print(
            f"estimate: {duration(seconds(study, speeds))} one task after another, on ranks: "
            + ", ".join(map(str, ranks))
        )
    else:
        print("hours: not estimated; add --measure, or --throughput FLOPS")
    if missing := missing_data(study):
        print(f"cannot be trained yet: {missing}")
    else:
        print(f"to train: megapromoe study run {study.folder}")
    return 0


def _print_cost(study: Study, gpu: str | None) -> None:
    """Prints the tasks of a study and their size, and writes them into tasks.md; GPU-hours if `gpu` is known.

    Args:
        gpu: kind of GPU; None: the recipe's.
    """
    tasks, gpu = table(study), gpu or study.recipe.gpu
    if gpu is not None:
        tasks += "\n" + "\n".join(arm_lines(study, gpu)) + "\n"
    write_text(study.folder / "tasks.md", tasks, parents=True)
    print(tasks)
    if sizes := list(size_lines(study)):
        print("\n".join(["published sizes and costs:", *sizes, ""]))
    if study.recipe.scale is not None:
        print(NOT_COMPARABLE.format(scale=study.recipe.scale))


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of --recipe or of the name STUDY, or the one that the other options define. Raises StudyError."""
    name = options.recipe
    if name is None and not (options.preset or options.sizes) and options.study.as_posix() in recipe_names():
        name = options.study.as_posix()
    if name is None:
        return _compared(options) if options.scale is None else scaled(_compared(options), options.scale)
    replaced = ("preset", "experts", "sizes", "train_steps", "routers")
    if given := [f"--{option.replace('_', '-')}" for option in replaced if getattr(options, option)]:
        raise StudyError([f"--recipe: defines the models; remove {', '.join(given)}, or write them into the file"])
    recipe = read_recipe(find_recipe(name))
    if options.scale is not None:
        recipe = scaled(recipe, options.scale)
    launcher = shlex.split(options.launcher or "")
    return changed(recipe, options.seeds or (), options.ranks, launcher, options.overrides)


def _compared(options: argparse.Namespace) -> Recipe:
    """The recipe that the options define. Raises StudyError."""
    if bool(options.preset) == bool(options.sizes):
        raise StudyError(["--recipe, --preset or --sizes: give one of them"])
    return compare(
        preset=options.preset or options.sizes[0],
        sizes=options.sizes or (),
        experts=options.experts or (),
        steps=options.train_steps or (),
        seeds=options.seeds or DEFAULT_SEEDS,
        routers=options.routers or ["promoe"],
        ranks=options.ranks or 1,
        launcher=shlex.split(options.launcher or ""),
        settings=dict(text.split("=", 1) for text in options.overrides),
    )


def _run(options: argparse.Namespace) -> int:
    from megapromoe.distributed import runtime
    from megapromoe.distributed.stop_requests import install_signal_handlers
    from megapromoe.studies.runs import Limits, exit_code, jobs_to_run, run_tasks

    study = open_study(options.study)
    _refuse_without_data(study)
    if options.wait and not options.evaluate:
        raise StudyError(["--wait: needs --evaluate, whose jobs wait for trainings of other commands"])
    if options.ranks:
        study = on_this_machine(study, options.ranks)
    tasks = study.tasks if options.task is None else (study.task(options.task),)
    jobs = jobs_to_run(
        study, tasks, options.evaluate, alone=options.task is not None, train=options.train, waits=options.wait
    )
    at_once = options.jobs + options.evaluation_jobs
    placements = [placement_of(study.recipe, job) for job in jobs]
    processes = at_once * max((placement.ranks for placement in placements if placement.is_local), default=1)
    if at_once > 1 or (options.ranks and processes > 1):
        runtime.share_cores(processes)
    gpus = runtime.visible_gpus() if at_once > 1 else ()
    limits = Limits(options.evaluation_jobs, options.retries, gpus, options.wait)
    with install_signal_handlers() as asked_to_stop:
        codes = run_tasks(study, jobs, options.jobs, asked_to_stop, limits)
        code = exit_code(codes)
        if not asked_to_stop() and not options.evaluate:
            evaluate(study, tasks)
    failed = [job for job in jobs if codes.get(job.name, 0) not in (0, 75)]
    for job in failed:
        state = job_state(study, job, time.time())
        print(f"{job.name}: failed, {state.remark}: {study.log(job)}", file=sys.stderr)
    stopped = [job for job in jobs if study.ended(job) and not study.done(job)]
    left = [job for job in jobs if not study.ended(job)]
    early = f", {len(stopped)} stopped early" if stopped else ""
    print(f"{len(jobs) - len(left) - len(stopped)} of {len(jobs)} done, {len(failed)} failed{early}", file=sys.stderr)
    return code


def _refuse_without_data(study: Study) -> None:
    if missing := missing_data(study):
        raise StudyError([missing])


def _status(options: argparse.Namespace) -> int:
    study = open_study(options.study)
    now = time.time()
    print(status_table(study, [job_state(study, job, now) for job in study.jobs()]))
    return 0


def _list_recipes(options: argparse.Namespace) -> int:
    refuse_other_words(options, "`recipes` takes no arguments")
    names = recipe_names()
    width = max(map(len, names))
    print("\n".join(f"{name:{width}}  {read_recipe(find_recipe(name)).title}" for name in names))
    print("plan one: megapromoe study plan NAME, or megapromoe study plan STUDY --recipe NAME; docs/study.md")
    return 0


def _open_or_plan(folder: Path) -> Study:
    """The study of a folder. A folder with the name of a recipe is planned first if it holds no study."""
    name = folder.as_posix()
    if (folder / "study.yaml").exists() or name not in recipe_names():
        return open_study(folder)
    study = plan_or_extend(folder, read_recipe(find_recipe(name))).study
    _print_cost(study, None)
    return study


def _submit(options: argparse.Namespace) -> int:
    from megapromoe.distributed import runtime

    study = _open_or_plan(options.study)
    _refuse_without_data(study)
    kind = "train" if options.train else "evaluate" if options.evaluate else ""
    arrays = array_jobs(study, kind)
    if not arrays:
        of = {"train": "all trainings are done", "evaluate": "no trained task lacks its evaluation"}
        print(f"{study.folder}: {of.get(kind, f'all {len(study.tasks)} tasks are done')}")
        return 0
    script, environment = launchers_folder() / LAUNCHER, runtime.job_environment()
    try:
        return submit(
            study,
            arrays,
            script,
            options.passed_on,
            options.jobs,
            environment,
            options.dry_run,
            evaluation_options=shlex.split(options.evaluation_options),
            words=[] if options.retries is None else [f"--retries={options.retries}"],
        )
    except FileNotFoundError as error:
        raise FileError("sbatch is not on PATH; submit from a login node, or use `run`") from error


def _collect(options: argparse.Namespace) -> int:
    from megapromoe.studies.results import write_results

    study = open_study(options.study)
    against = _against(options, study)
    done = study.finished()  # fixed before the evaluation, while other tasks may finish
    evaluate(study, done, options.draws)
    text, files = write_results(study, done, options.draws, against)
    print(text)
    print("\n".join(files))
    return 0 if done else 1


def _power_share(text: str) -> float:
    """An argparse type: a power that an effect can have, above the level of the test."""
    value = share(text)
    if not 0.05 < value <= 0.999:
        raise argparse.ArgumentTypeError(f"must be above 0.05, the level of the test, and at most 0.999, not {text!r}")
    return value


def _power(options: argparse.Namespace) -> int:
    from megapromoe.studies.noise import noise_floors
    from megapromoe.studies.power import POWER, find_floor, power_sections

    study = open_study(options.study)
    floors = noise_floors(_collected_rows(study, options.draws), study.recipe)
    if not floors:
        print("no noise is known: no model has two seeds that are done and collected", file=sys.stderr)
        return 1
    floor = find_floor(floors, options.metric)
    print("\n\n".join(power_sections(floor, options.difference, options.power or POWER)))
    return 0


def _report(options: argparse.Namespace) -> int:
    from megapromoe.studies.report import write_report

    study, now = open_study(options.study), time.time()
    against = _against(options, study)
    rows = _collected_rows(study, options.draws)
    out = options.out or study.folder / "report.html"
    write_report(study, rows, [job_state(study, job, now) for job in study.jobs()], against, out)
    print(out)
    return 0


def _against(options: argparse.Namespace, study: Study) -> list[str]:
    """The variants to compare with. Raises StudyError for one that does not exist."""
    variants = [variant.name for variant in study.recipe.variants]
    against = options.against or [study.recipe.baseline or variants[0]]
    if wrong := [name for name in against if name not in variants]:
        raise StudyError([f"--against {', '.join(wrong)}: the variants are {', '.join(variants)}"])
    return against


def _plot(options: argparse.Namespace) -> int:
    from megapromoe.studies.plots import draw_all
    from megapromoe.studies.results import report_pictures

    study = open_study(options.study)
    rows = _collected_rows(study, options.draws)
    print("\n".join(report_pictures(study, rows, draw_all(study, rows, options.note))))
    return 0 if rows else 1


def _collected_rows(study: Study, draws: int) -> list[dict[str, Any]]:
    """Rows of the finished tasks whose loss on fixed draws is computed; prints the names of the others."""
    done = study.finished()
    known = [task for task in done if evaluated(study, task, draws)]
    if left := names([task for task in done if task not in known]):
        print(
            f"not shown, because their loss on fixed draws is not computed yet (run `collect`): {left}", file=sys.stderr
        )
    return [row(study, task, draws) for task in known]

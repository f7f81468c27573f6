"""`megapromoe study`: runs many trainings from one recipe, and writes tables and plots of their results."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from typing import Any

from megapromoe.commands.command_line import FileError, InterruptedCommand, file_errors
from megapromoe.commands.launchers import launchers_folder
from megapromoe.commands.study_options import RECIPES, add_commands
from megapromoe.commands.study_plan import list_recipes, open_or_plan, plan_study
from megapromoe.studies.collect import evaluate, evaluated, row
from megapromoe.studies.placement import on_this_machine, placement_of
from megapromoe.studies.recipe import StudyError
from megapromoe.studies.status import job_state
from megapromoe.studies.status import table as status_table
from megapromoe.studies.study import Study, missing_data, names, open_study
from megapromoe.studies.submission import array_jobs, submit

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
{RECIPES}, or a YAML file; docs/study.md explains them.
`plan paper/t7` and `submit paper/t7` take the recipe of this name and the folder ./paper/t7. Without a recipe, the
other options of `plan` define the study. Each command has a --help.

exit codes: 0 done, 1 a task failed or there is no result yet, 2 the command or the recipe is wrong, 75 stopped by a
signal and saved (repeat the command), 130 interrupted; `run --task I` returns the exit code of the task"""
JOB = False
LAUNCHER = "scaling_experts.sh"


def arguments(parser: argparse.ArgumentParser) -> None:
    functions = {"recipes": list_recipes, "plan": plan_study, "run": _run, "status": _status, "submit": _submit}
    add_commands(parser, functions | {"collect": _collect, "power": _power, "plot": _plot, "report": _report})


def run(options: argparse.Namespace, launch: None) -> int:
    try:
        with file_errors():
            return options.study_command(options)
    except KeyboardInterrupt as error:
        raise InterruptedCommand("interrupted; running trainings have saved, repeat the command to continue") from error


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
            evaluate(study, tasks, jobs=at_once)
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


def _submit(options: argparse.Namespace) -> int:
    from megapromoe.distributed import runtime

    study = open_or_plan(options.study)
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
    if options.jobs > 1:
        from megapromoe.distributed import runtime

        runtime.share_cores(options.jobs)
    evaluate(study, done, options.draws, options.jobs)
    text, files = write_results(study, done, options.draws, against)
    print(text)
    print("\n".join(files))
    return 0 if done else 1


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

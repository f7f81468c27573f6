"""What holds for all tests: folders, two levels, one thread a process, the package of this checkout, tables.

unit/      one process
parallel/  several ranks in a torch.distributed job of `support.processes`
programs/  the program, the tools and the launchers as processes of their own
cluster/   jobs on a real SLURM, where one can be started

Two levels: `make test` runs what has no marker `full`, with tests of every feature; `make test-all` runs everything.
A test is marked by `@pytest.mark.full`, a case by `pytest.param(..., marks=pytest.mark.full)`, the cases of a matrix
that the quick level leaves out by `support.levels`.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from support.compatibility import Compatibility
from support.fault_table import FaultTable, Rows
from support.levels import LONGEST

from megapromoe.imports import uncollected

ROOT = Path(__file__).parents[1]

# Two test processes share two cores, and sums of floats depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Processes that tests start import the package of this checkout, whether it is installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
# nohup and background jobs of a shell ignore these signals; processes that tests start and signal would inherit that.
for _number, _default in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _default)

TABLES = {
    "--equality-table": "the equality matrix",
    "--readme-table": "one step at four layouts, into the README's table",
    "--layout-table": "the layout-change matrix",
    "--fault-table": "the fault table",
    "--compatibility-table": "the row of this environment",
    "--fidelity-table": "the page on fidelity to the published models",
}


# Files of tests are given out in this order: the longest, then those that wait most.
FOLDERS = ("cluster", "programs", "parallel", "unit")


def pytest_configure(config):
    if file := config.getoption("--fault-table"):
        config.pluginmanager.register(FaultTable(Path(file)))
    if file := config.getoption("--compatibility-table"):
        config.pluginmanager.register(Compatibility(config, Path(file)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    with uncollected():
        return (yield)


def pytest_collection_modifyitems(items):
    def place(item) -> tuple[int, int]:
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), FOLDERS.index(item.path.parent.name)

    items.sort(key=place)


STARTED = time.monotonic()


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--minutes")
    if minutes and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"not run: {minutes:g} minutes have passed (--minutes)")


def pytest_sessionfinish():
    if processes := sys.modules.get("support.processes"):
        processes.stop_workers()


@pytest.fixture(autouse=True)
def levels_of_loggers():
    """Restores the levels that `cli.main` sets, which differ between ranks."""
    levels = {name: logging.getLogger(name).level for name in ("megapromoe", "megapromoe.config")}
    yield
    for name, level in levels.items():
        if logging.getLogger(name).level != level:  # each change empties the caches of all loggers
            logging.getLogger(name).setLevel(level)


@pytest.fixture
def fault_table(request):
    """Takes rows (fault, what happened, what was lost) for the fault table; a test that asks for it is in the table."""
    return Rows(request.node)


def pytest_addoption(parser):
    for option, what in TABLES.items():
        parser.addoption(option, metavar="FILE", help=f"write {what} to FILE (Markdown)")
    parser.addoption("--minutes", metavar="N", type=float, help="skip the tests that are left after N minutes")


@pytest.fixture(scope="session")
def fidelity(request):
    """What the page on fidelity tells: `cases`, comparisons with golden cases by name, and the `long run`."""
    results = {"cases": {}, "long run": None}
    yield results
    if file := request.config.getoption("--fidelity-table"):
        from support.fidelity import write_page

        write_page(Path(file), results["cases"], results["long run"])

"""Long work without a terminal: a plain line about once a minute; its clock is made up."""

import ast
import logging
import re
from pathlib import Path

import pytest

import megapromoe
from megapromoe.work_progress import Progress, track

PACKAGE = Path(megapromoe.__file__).parent


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    """The log of a command that another test has run in this process is taken away."""
    log = logging.getLogger("megapromoe")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", logging.NOTSET)
    log.manager._clear_cache()  # of what is enabled


@pytest.fixture
def clock():
    return Clock()


def work(progress, clock, units, seconds_each, count=1):
    for _ in range(units):
        clock.now += seconds_each
        progress.update(count)


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_the_first_line_comes_early_then_one_a_minute_and_a_last_one(clock, capsys):
    with Progress(50_000, "image", "samples.npz", terminal=False, clock=clock) as progress:
        work(progress, clock, 5, 1.0, 100)
        assert lines(capsys) == ["samples.npz: 500 of 50,000 images (1 %), 100 images/s, 8 min left"]
        work(progress, clock, 59, 1.0, 100)
        assert lines(capsys) == [], "within the minute"
        work(progress, clock, 1, 1.0, 100)
        assert lines(capsys) == ["samples.npz: 6,500 of 50,000 images (13 %), 100 images/s, 7 min left"]
        work(progress, clock, 435, 1.0, 100)
        assert len(lines(capsys)) == 7
    assert lines(capsys) == ["samples.npz: 50,000 images in 8 min, 100 images/s"]


def test_an_hour_of_work_prints_a_line_a_minute_for_any_duration_of_batches(clock, capsys):
    for seconds in (0.1, 7.0, 59.0):
        with Progress(None, "row", "x", terminal=False, clock=clock) as progress:
            work(progress, clock, int(3600 / seconds), seconds)
        assert 32 <= len(lines(capsys)) <= 63


def test_short_work_is_silent(clock, capsys):
    with Progress(10, "image", "x", terminal=False, clock=clock) as progress:
        work(progress, clock, 10, 0.4)
    assert lines(capsys) == []


def test_the_rate_is_that_of_the_last_minutes(clock, capsys):
    """Slow at first, as while a model is compiled; an hour later nothing of it is in the rate and the time left."""
    with Progress(10_000, "image", "x", terminal=False, clock=clock) as progress:
        work(progress, clock, 1, 600.0)
        work(progress, clock, 3600, 1.0)
        assert lines(capsys)[-1].endswith("1 images/s, 107 min left")


def test_items_of_an_earlier_start_do_not_count_for_the_rate(clock, capsys):
    with Progress(1000, "image", "x", done=900, terminal=False, clock=clock) as progress:
        work(progress, clock, 10, 1.0)
    first, last = lines(capsys)
    assert first == "x: 905 of 1,000 images (90 %), 1 images/s, 95 s left"
    assert last == "x: ended at 910 of 1,000 images after 10 s, 1 images/s"


def test_rates_below_one_a_second(clock, capsys):
    for seconds, rate in ((20.0, "3 runs/min"), (1200.0, "3 runs/h")):
        with Progress(None, "run", "x", terminal=False, clock=clock) as progress:
            work(progress, clock, 1, seconds)
        assert lines(capsys)[0] == f"x: 1 run, {rate}"


def test_bytes_are_sizes(clock, capsys):
    with Progress(3 << 30, "B", "writing x", terminal=False, clock=clock) as progress:
        work(progress, clock, 1, 8.0, 1 << 30)
        work(progress, clock, 1, 1.0, 5 << 29)  # the total was an estimate
    first, last = lines(capsys)
    assert first == "writing x: 1 GiB of 3 GiB (33 %), 128 MiB/s, 16 s left"
    assert last == "writing x: 3.5 GiB in 9 s, 398.2 MiB/s"


def test_a_line_without_finished_items_shows_the_note(clock, capsys):
    with Progress(4, "image", "x", terminal=False, clock=clock) as progress:
        clock.now += 30
        progress.note("step 3/250")
    first, last = lines(capsys)
    assert first == "x: 0 of 4 images (0 %), rate unknown; step 3/250"
    assert last == "x: ended at 0 of 4 images after 30 s"


def test_an_empty_work_divides_by_nothing(clock, capsys):
    with Progress(0, "image", "x", terminal=False, clock=clock) as progress:
        clock.now += 10
        progress.note("")
    assert lines(capsys) == ["x: 0 of 0 images, rate unknown", "x: 0 images in 10 s"]


def test_a_command_with_a_log_has_the_lines_in_it(clock, capsys, caplog):
    with caplog.at_level(logging.INFO, "megapromoe"), Progress(9, "run", "x", terminal=False, clock=clock) as progress:
        work(progress, clock, 1, 6.0)
    assert caplog.messages[0] == "x: 1 of 9 runs (11 %), 10 runs/min, 48 s left" and lines(capsys) == []


def test_a_terminal_has_the_bar_and_other_ranks_have_nothing(clock, capsys):
    with Progress(100, "image", "x", terminal=True, clock=clock) as progress:
        work(progress, clock, 100, 10.0)
        progress.write("a line")
    shown = capsys.readouterr().err
    assert "100/100" in shown and "a line\n" in shown and "left" not in shown
    for terminal in (True, False):
        with Progress(100, "image", "x", enabled=False, terminal=terminal, clock=clock) as progress:
            work(progress, clock, 100, 10.0)
        assert lines(capsys) == []


def test_failed_work_reports_its_place(clock, capsys):
    with pytest.raises(OSError), Progress(10, "batch", "x", terminal=False, clock=clock) as progress:
        work(progress, clock, 4, 5.0)
        raise OSError("the disk is full")
    assert lines(capsys)[-1] == "x: ended at 4 of 10 batches after 20 s, 12 batches/min"


def test_items_are_tracked(clock, capsys):
    def passing(item):
        clock.now += 6.0
        return item

    assert [passing(i) for i in track(range(3), "layer", "k-means", terminal=False, clock=clock)] == [0, 1, 2]
    assert lines(capsys) == [
        "k-means: 1 of 3 layers (33 %), 10 layers/min, 12 s left",
        "k-means: 3 layers in 18 s, 10 layers/min",
    ]


def test_a_large_checkpoint_is_checked_with_lines(tmp_path, clock, capsys, monkeypatch):
    """Reading 205 GB for their hashes takes minutes before a conversion or a generation writes its first byte."""
    import functools
    import hashlib

    from megapromoe.checkpoint import format

    blocks = bytes(3 << 20)
    (tmp_path / "rank").write_bytes(blocks)
    checkpoint = object.__new__(format.Checkpoint)
    entry = {"file": "rank", "size": len(blocks), "sha256": hashlib.sha256(blocks).hexdigest()}
    checkpoint.folder, checkpoint.manifest = tmp_path, {"ranks": [entry, entry | {"size": 0, "file": "of rank 1"}]}

    def slow():
        clock.now += 4.0
        return clock.now

    monkeypatch.setattr(format, "Progress", functools.partial(Progress, terminal=False, clock=slow))
    checkpoint.verify(0, 2)
    first, *_, last = lines(capsys)
    assert first.startswith(f"checking {tmp_path}: 2 MiB of 3 MiB (67 %)") and last.startswith(
        f"checking {tmp_path}: 3 MiB in"
    )


def test_all_commands_show_progress_by_this_class():
    """Training's log has more figures in a line; everything else that shows a bar would be silent in a job."""
    users = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if imports_tqdm(file)}
    assert users == {"work_progress.py", "training/metrics.py"}


def imports_tqdm(file):
    text = file.read_text(encoding="utf-8")
    names = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    return any(re.match(r"(from|import) tqdm\b", ast.unparse(n)) for n in names)

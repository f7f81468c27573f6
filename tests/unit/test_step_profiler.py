"""Profiles of steps: which steps are recorded, when the files are written, and files that cannot be written."""

import gzip
import json

import pytest
import torch

from megapromoe.training.step_profiler import StepProfiler

CPU = torch.device("cpu")


def run(profiler: StepProfiler, first: int, last: int) -> list[int]:
    """Steps first .. last of a run; returns the step after which it wrote."""
    written = []
    for step in range(first, last + 1):
        profiler.begin(step)
        torch.ones(3 + step).sum()
        if profiler.ends(step, last=step == last):
            profiler.write()
            written.append(step)
    profiler.close()
    return written


def shapes(path) -> set[int]:
    """The lengths of the tensors that a trace has summed."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    sums = [event["args"]["Input Dims"] for event in events if event["name"] == "aten::sum"]
    return {dims[0][0] for dims in sums}


@pytest.mark.parametrize(
    "steps, first, last, written, recorded",
    [
        (range(2, 4), 1, 6, [3], {5, 6}),
        (range(1, 2), 1, 3, [1], {4}),
        (range(2, 6), 4, 8, [5], {7, 8}),  # a start in the middle
        (range(2, 9), 1, 3, [3], {5, 6}),  # a run that is stopped
        (range(2, 4), 5, 6, [], set()),
        (range(0), 1, 3, [], set()),
    ],
)
def test_the_steps_of_the_range_are_recorded(steps, first, last, written, recorded, tmp_path, caplog):
    profiler = StepProfiler(steps, tmp_path, 3, CPU, first - 1)
    assert run(profiler, first, last) == written
    files = list(tmp_path.rglob("*.*"))
    if not written:
        assert not files
        return
    (path,) = files
    assert path.relative_to(tmp_path).as_posix() == (
        f"profile/steps-{steps[0]:08d}-{steps[-1]:08d}/rank-00003.trace.json.gz"
    )
    assert shapes(path) == recorded


def test_a_range_that_is_over_is_a_warning_of_one_rank(tmp_path, caplog):
    for rank in (0, 1):
        StepProfiler(range(2, 4), tmp_path, rank, CPU, first_step=3)
    (record,) = caplog.records
    assert record.getMessage() == "train.profile: step 3 is done already, so nothing is profiled; give later steps"


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    assert run(StepProfiler(range(1, 2), tmp_path, 0, CPU, 0), 1, 2) == [1]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "rank-00000.trace.json.gz: cannot be written (" in record.getMessage()
    assert record.getMessage().endswith("; training continues") and not list(tmp_path.glob("**/unfinished-*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_a_memory_snapshot_too(tmp_path):
    device = torch.device("cuda")
    profiler = StepProfiler(range(1, 2), tmp_path, 0, device, 0)
    profiler.begin(1)
    torch.ones(1 << 20, device=device).sum()
    assert profiler.ends(1, last=False)
    profiler.write()
    trace, memory = (next(tmp_path.rglob(f"rank-00000.{ending}")) for ending in ("trace.json.gz", "memory.pickle"))
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])
    assert memory.stat().st_size > 1000

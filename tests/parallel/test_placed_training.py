"""Training with `parallel.placement`: chosen at a restart from the load of the run, the same training, evener ranks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.placements import placement_file
from support.processes import run
from support.training_runs import losses, state, train
from support.trajectory import small

from megapromoe.checkpoint.format import KINDS
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.expert_placement import ExpertPlacement, placement_text, read_placements
from megapromoe.routing_trace import TraceRecord, encode, read_records
from megapromoe.training.expert_placement import choose_placement, copies_fit, nodes_of_group, recorded_loads

SAVED, LAST = 6, 12
# Without the contrastive loss, the tokens of this model choose few of the experts.
SKEWED = ("model.num_experts=12", "model.rcl_weight=0", "parallel.ep=2", "train.save_every=0")
LIMIT = 1e-5


def rank_loads(folder: Path, steps: range) -> list[float]:
    """`rank_load_max_over_mean` of the steps that a run logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["rank_load_max_over_mean"] for line in lines if line["step"] in steps]


def relative_load(folder: Path, placements: list[ExpertPlacement], steps: range) -> list[float]:
    """The same from the logged rows of each expert, by the definition."""
    loads = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values["step"] in steps:
            fullest = mean = 0.0
            for load_E, placement in zip(values["expert_load"], placements, strict=True):
                of_ranks = [sum(load_E[expert] for expert in owned) for owned in placement.experts_of_rank]
                fullest, mean = fullest + max(of_ranks), mean + sum(of_ranks) / len(of_ranks)
            loads.append(fullest / mean)
    return loads


def test_a_restart_places_experts_by_their_load_and_goes_on_with_the_same_training(tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run(2, train, str(straight), *SKEWED, f"train.steps={LAST}")
    run(2, train, str(moved), *SKEWED, "parallel.placement=auto", f"train.steps={SAVED}")
    assert not (moved / "placement.yaml").exists(), "there was no load to choose from"
    run(2, train, str(moved), *SKEWED, "parallel.placement=auto", f"train.steps={LAST}", "train.routing_trace_every=1")

    assert max(abs(a / b - 1) for a, b in zip(losses(moved), losses(straight), strict=True)) <= LIMIT
    expected, ours = state(straight, LAST), state(moved, LAST)
    norms = {kind: torch.stack([t.norm() for (k, _), t in expected.items() if k == kind]).norm() for kind in KINDS}
    for (kind, name), value in expected.items():
        assert (ours[kind, name] - value).norm() <= LIMIT * (value.norm() + 0.1 * norms[kind]), (kind, name)

    chosen, problems = read_placements(moved / "placement.yaml", (1, 3), 12, 2)
    consecutive = [ExpertPlacement.contiguous(12, 2)] * 2
    assert not problems and list(chosen.values()) != consecutive
    before, after = range(1, SAVED + 1), range(SAVED + 1, LAST + 1)
    assert rank_loads(moved, before) == pytest.approx(relative_load(moved, consecutive, before), rel=1e-6)
    assert rank_loads(moved, after) == pytest.approx(relative_load(moved, [*chosen.values()], after), rel=1e-6)
    for record in read_records(moved):  # of the second start: as many rows on each rank as the placement gives it
        owners = [placement.rank_of_expert for placement in chosen.values()]
        assert record.step in after and record.owner_ME.tolist() == [list(ranks) for ranks in owners]
    unplaced, placed = (sum(rank_loads(folder, after)) / len(after) for folder in (straight, moved))
    assert unplaced > 1.2 and placed - 1 < 0.5 * (unplaced - 1), (unplaced, placed)


@pytest.mark.full
def test_a_restart_copies_popular_experts_and_goes_on_with_the_same_training(tmp_path):
    """With copies after the first start, without them after the second one: the losses of a run without any."""
    straight, copied = tmp_path / "straight", tmp_path / "copied"
    run(2, train, str(straight), *SKEWED, f"train.steps={LAST + 3}")
    auto = ("parallel.placement=auto", "parallel.replicas=2")
    run(2, train, str(copied), *SKEWED, *auto, f"train.steps={SAVED}")
    run(2, train, str(copied), *SKEWED, *auto, f"train.steps={LAST}")
    chosen, problems = read_placements(copied / "placement.yaml", (1, 3), 12, 2)
    assert not problems and any(placement.replicas for placement in chosen.values())
    run(2, train, str(copied), *SKEWED, f"train.steps={LAST + 3}")
    assert max(abs(a / b - 1) for a, b in zip(losses(copied), losses(straight), strict=True)) <= LIMIT
    expected, ours = state(straight, LAST + 3), state(copied, LAST + 3)
    assert expected.keys() == ours.keys()
    norms = {kind: torch.stack([t.norm() for (k, _), t in expected.items() if k == kind]).norm() for kind in KINDS}
    for (kind, name), value in expected.items():
        assert (ours[kind, name] - value).norm() <= LIMIT * (value.norm() + 0.1 * norms[kind]), (kind, name)
    after = range(SAVED + 1, LAST + 1)
    unplaced, balanced = (sum(rank_loads(folder, after)) / len(after) for folder in (straight, copied))
    assert unplaced > 1.2 and balanced - 1 < 0.5 * (unplaced - 1), (unplaced, balanced)


def choose(overrides: tuple[str, ...], folder: str, local_world: int = 8) -> tuple:
    chosen = choose_placement(small(*overrides), RunDirectory(Path(folder)), None, local_world)
    return dict(chosen.placements), chosen.lines, chosen.text


def write_loads(folder: Path, load_E: list[int], steps: tuple[int, ...] = (10, 20)) -> None:
    lines = [{"step": step, "expert_load": [load_E, load_E[::-1]]} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


AUTO = ("model.num_experts=4", "parallel.ep=2", "parallel.placement=auto")


def test_all_ranks_have_what_rank_0_chooses(tmp_path):
    write_loads(tmp_path, [50, 40, 5, 5])
    for placements, lines, text in run(2, choose, AUTO, str(tmp_path)):
        assert placements == {1: ExpertPlacement(((0, 3), (1, 2))), 3: ExpertPlacement(((1, 3), (0, 2)))}
        assert lines == (
            "placed by the load of steps 10 to 20 (metrics.jsonl)",
            "in steps 10 to 20 (metrics.jsonl) the fullest rank would have had 1.100 times the mean rows, with"
            " consecutive experts 1.800 times",
        )
        assert text == placement_text(placements, lines)


def test_copies_are_chosen_with_the_placement(tmp_path):
    write_loads(tmp_path, [80, 10, 5, 5])
    for placements, lines, text in run(2, choose, (*AUTO, "parallel.replicas=1"), str(tmp_path)):
        assert all(placement.replica_slots == 1 for placement in placements.values())
        assert "copies of experts: up to 1 on a rank in a block, 2 in all 2 blocks" in lines
        assert "the fullest rank would have had 1.000 times the mean rows" in lines[-1]
        assert text == placement_text(placements, lines)


def memory_of(budget: int | None) -> int:
    """Copies on a rank that `parallel.replicas=auto` takes with so many bytes."""
    config = small(*AUTO, "parallel.replicas=auto")
    fits = copies_fit(config, budget)
    return next((number for number in range(1, 3) if not fits(number)), 3) - 1


def test_auto_takes_no_copies_that_do_not_fit():
    least = 2 * 4 * (2 * 32 * 64 + 32 + 64)  # bytes of a copy in both blocks
    assert run(2, memory_of, None) == [2, 2] and run(2, memory_of, least) == [0, 0]


def test_without_a_load_experts_stay_consecutive_as_the_log_reports(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "expert_load": [[1, 2], [3, 4]]}\n')  # of another model
    for placements, lines, text in run(2, choose, AUTO, str(tmp_path)):
        assert (placements, text) == ({}, "") and "no load of experts is recorded yet" in lines[0]


def test_a_file_is_compared_with_the_recorded_load(tmp_path):
    write_loads(tmp_path, [50, 40, 5, 5])
    file = tmp_path / "mine.yaml"
    placed = {block: ExpertPlacement(((0,), (1, 2, 3))) for block in (1, 3)}
    file.write_text(placement_text(placed))
    for placements, lines, text in run(2, choose, (*AUTO[:2], f"parallel.placement={file}"), str(tmp_path)):
        assert placements == placed and not text
        assert "1.450 times the mean rows, with consecutive experts 1.800 times" in lines[0]


def choose_without_file(file: str) -> str:
    config = small(*AUTO[:2], f"parallel.placement={file}")
    if torch.distributed.get_rank() == 0:
        os.remove(file)
    with pytest.raises(RunDirectoryError) as refused:
        choose_placement(config, RunDirectory(Path(file).parent), None, 8)
    return str(refused.value)


def test_a_file_that_rank_0_cannot_read_is_reported_by_all_ranks(tmp_path):
    for message in run(2, choose_without_file, str(placement_file(tmp_path, 4, 2))):
        assert "placement-4-2-0.yaml': the file cannot be read" in message


def test_loads_of_the_last_steps_before_a_step_count(tmp_path):
    config = small(*AUTO)
    write_loads(tmp_path, [1, 2, 3, 4], steps=(500, 1400, 1600, 2000))
    assert recorded_loads(tmp_path, config).in_words == "steps 1,400 to 2,000 (metrics.jsonl)"
    assert recorded_loads(tmp_path, config, last=1600).in_words == "steps 1,400 to 1,600 (metrics.jsonl)"
    assert recorded_loads(tmp_path, config, first=1500).in_words == "steps 1,600 to 2,000 (metrics.jsonl)"
    assert recorded_loads(tmp_path, config, last=100) is None
    assert recorded_loads(tmp_path / "none", config) is None


def test_loads_are_those_of_the_trace_unless_it_ended_long_before(tmp_path):
    config = small(*AUTO)
    write_loads(tmp_path, [1, 2, 3, 4], steps=(500, 1400))
    rows_RME = np.arange(16).reshape(2, 2, 4)
    for steps, file in (((1390, 1395), "routing_trace.jsonl"), ((100, 400), "metrics.jsonl")):
        records = [TraceRecord(step, (1, 3), step * rows_RME, ep=2, group=2) for step in steps]
        (tmp_path / "routing_trace.jsonl").write_bytes(b"".join(map(encode, records)))
        assert recorded_loads(tmp_path, config).file == file
    loads = recorded_loads(tmp_path, config, last=400)
    assert loads.in_words == "steps 100 to 400 (routing_trace.jsonl)"
    assert loads.count_RME.tolist() == [(step * rows_RME.sum(0)).tolist() for step in (100, 400)]


def test_a_damaged_trace_does_not_stop_a_start(tmp_path, caplog):
    """It is reported, and experts stay where they are by default."""
    write_loads(tmp_path, [50, 40, 5, 5])
    (tmp_path / "routing_trace.jsonl").write_text("{}\n")
    placements, lines, text = choose(AUTO, str(tmp_path))
    assert (placements, text) == ({}, "") and "consecutive" in lines[0]
    assert "routing_trace.jsonl, line 1: is damaged" in caplog.text


@pytest.mark.parametrize(
    "ep, tp, expert_tp, local_world, nodes",
    [(4, 1, "false", 8, 1), (8, 1, "false", 4, 2), (4, 2, "true", 4, 2), (4, 2, "false", 4, 1), (4, 1, "false", 3, 2)],
)
def test_over_how_many_nodes_a_group_is_spread(ep, tp, expert_tp, local_world, nodes):
    config = small("model.num_experts=8", f"parallel.ep={ep}", f"parallel.tp={tp}", f"parallel.expert_tp={expert_tp}")
    assert nodes_of_group(config, local_world) == nodes

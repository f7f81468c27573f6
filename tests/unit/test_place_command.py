"""`megapromoe routing place` for a run folder with recorded loads: its file, its table, and what it refuses."""

import json

import pytest
from support.trajectory import small

from megapromoe.cli import main
from megapromoe.config.expert_placement import ExpertPlacement, read_placements
from megapromoe.config.resolve import to_yaml

LOADS = {10: [[0, 0, 0, 100], [25, 25, 25, 25]], 2000: [[50, 40, 5, 5], [10, 60, 20, 10]]}


@pytest.fixture
def recorded_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(small("parallel.ep=2")))
    lines = [{"step": step, "expert_load": loads} for step, loads in LOADS.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def place(run, *words) -> int:
    return main(["routing", "place", "--run-dir", str(run), *words])


def test_it_writes_a_file_for_the_next_start(recorded_run, tmp_path, capsys):
    file = tmp_path / "placement.yaml"
    assert place(recorded_run, "--out", str(file)) == 0
    assert file.read_text().splitlines() == [
        "# placed by the load of steps 2,000 to 2,000 (metrics.jsonl)",
        "# in steps 2,000 to 2,000 (metrics.jsonl) the fullest rank would have had 1.250 times the mean rows, with"
        " consecutive experts 1.600 times",
        "blocks:",
        "  1: [[0, 3], [1, 2]]",
        "  3: [[0, 1], [2, 3]]",
    ]
    placements, problems = read_placements(file, (1, 3), 4, 2)
    assert not problems and small("parallel.ep=2", f"parallel.placement={file}").placements_in_file() == placements
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "1.800", "1.100", "2", "2"] in table and ["all", "1.600", "1.250"] in table
    assert table[-1] == [f"{file}:", *["for", "the", "next", "start,", "parallel.ep=2"], f"parallel.placement={file}"]


def test_more_slots_and_other_ranks_and_steps(recorded_run, capsys):
    assert place(recorded_run, "--to-step", "10") == 0
    assert "steps 10 to 10 (metrics.jsonl): 4 experts over 2 ranks" in capsys.readouterr().out
    assert place(recorded_run, "--slots", "3") == 0
    out = capsys.readouterr().out
    assert "a rank stores up to 3 experts of a block instead of 2; `megapromoe plan` shows the memory" in out
    file = recorded_run / "routing" / "placement.yaml"
    assert read_placements(file, (1, 3), 4, 2)[0][1] == ExpertPlacement(((0,), (1, 2, 3)))
    assert place(recorded_run, "--ep", "4", "--nodes", "2", "--from-step", "0") == 0
    assert "4 experts over 4 ranks" in capsys.readouterr().out and not read_placements(file, (1, 3), 4, 4)[1]


def test_copies_are_judged_by_steps_from_which_they_were_not_chosen(recorded_run, tmp_path, capsys):
    lines = [{"step": step, "expert_load": [[70, 20, 5, 5], [25, 25, 25, 25]]} for step in (1700, 1800)]
    lines += [{"step": step, "expert_load": [[60, 20, 10, 10], [40, 20, 20, 20]]} for step in (1900, 2000)]
    (recorded_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "placement.yaml"
    assert place(recorded_run, "--out", str(file), "--replicas", "1") == 0
    out = capsys.readouterr().out
    assert "chosen by steps 1,700 to 1,800 (metrics.jsonl) alone, in steps 1,900 to 2,000 (metrics.jsonl)" in out
    table = [line.split() for line in out.splitlines()]
    # Block 1 is as in the first half if rank 0 has expert 0 and others get 20 of its 70 rows: then 30·60/70 of 60 move.
    (block,) = [line for line in table if line[:2] == ["1", "1.600"] and len(line) == 10]
    assert block[1:4] == ["1.600", "(1.600,", "1.600)"] and float(block[7]) < 1.2 < float(block[4])
    placements, problems = read_placements(file, (1, 3), 4, 2)
    assert not problems and placements[1].replica_slots == 1
    expert = (2 * 32 * 64 + 32 + 64) * 4 / 1e6
    copies = sum(placement.copies for placement in placements.values())
    slots = [placement.replica_slots for placement in placements.values()]
    assert f"{sum(slots) * expert:.2f} MB of weights on a rank until the backward pass, {expert:.2f} MB" in out
    assert f"on average {copies / 2 * expert:.2f} MB of weights and {copies / 2 * expert:.2f} MB of gradients" in out
    assert place(recorded_run, "--replicas", "auto") == 0
    assert "with copies" in capsys.readouterr().out


REFUSED = {
    ("--replicas", "1"): (1, "--replicas: needs the load of two steps or more, not of steps 2,000 to 2,000"),
    ("--ep", "8"): (2, "--ep 8: must be from 2 to 4"),
    ("--slots", "1"): (2, "--slots 1: 2 ranks need at least 2"),
    ("--nodes", "3"): (2, "--nodes 3: must divide the 2 ranks"),
    ("--num-images", "5", "--routes"): (2, "--routes, --num-images: is not for megapromoe routing place"),
    ("--from-step", "3000"): (1, "no load of experts in these steps"),
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_does_not_fit_is_refused(recorded_run, words, capsys):
    code, message = REFUSED[words]
    assert place(recorded_run, *words) == code and message in capsys.readouterr().err
    assert not (recorded_run / "routing").exists()


def test_options_of_place_are_refused_elsewhere(recorded_run, capsys):
    assert main(["routing", "trace", "--run-dir", str(recorded_run), "--ep", "2", "--slots", "2"]) == 2
    assert "--ep, --slots: is for megapromoe routing place; leave it out" in capsys.readouterr().err


def test_a_dense_model_has_nothing_to_place(recorded_run, capsys):
    (recorded_run / "config.yaml").write_text(to_yaml(small("model.router=dense")))
    assert place(recorded_run, "--ep", "2") == 2
    assert "its model has no routed experts to place" in capsys.readouterr().err

"""A run saved at one layout goes on at another: ten further steps are the same training, to rounding.

`make layouts` writes the matrix into docs/equality.md.
"""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from support.levels import full
from support.page_sections import write_section
from support.placements import placement_file
from support.processes import run
from support.training_runs import losses, state, train

from megapromoe.checkpoint.format import KINDS
from megapromoe.checkpoint.step_folders import folder_of

SAVED, LAST = 3, 13
LIMIT = 1e-5

# Layouts: ranks, tp, ep, ZeRO stage, more.
SINGLE_RANK = (1, 1, 1, 0)
CASES = [
    full((2, 1, 2, 1), SINGLE_RANK),
    (SINGLE_RANK, (4, 2, 2, 1)),
    full((4, 2, 2, 1), (2, 2, 1, 2)),
    full((4, 2, 2, 3), (4, 1, 4, 1)),
    full((4, 1, 4, 2), (4, 2, 2, 3)),
    full((4, 4, 2, 2), (2, 1, 2, 0)),  # tp > ep
    full((2, 1, 2, 2), (8, 2, 4, 1)),
    full((8, 1, 8, 1), (4, 1, 4, 3)),  # 12 experts: 2 or 1 a rank -> 3 a rank
    full((4, 2, 2, 1, "parallel.expert_tp=true"), (4, 2, 2, 1)),
    full((2, 1, 1, 3), (4, 2, 2, 2, "parallel.expert_tp=true")),
    full((2, 1, 2, 1, "placed"), (2, 1, 2, 1, "placed again")),
    full((4, 1, 4, 2), (4, 2, 2, 3, "placed")),
    full((4, 2, 2, 1, "placed"), SINGLE_RANK),
    full((4, 1, 2, 1, "parallel.shard_ranks=2"), (2, 1, 1, 2)),
    full((4, 1, 1, 2), (4, 1, 2, 2, "parallel.shard_ranks=2")),
    full((4, 1, 1, 1, "parallel.shard_ranks=2"), (4, 2, 2, 3)),
    full((8, 2, 2, 1, "parallel.shard_ranks=4"), (8, 1, 4, 1, "parallel.shard_ranks=2")),
    full((2, 1, 2, 1, "placed with copies"), (2, 1, 2, 1, "placed again")),
    full((4, 1, 4, 2, "placed"), (4, 2, 2, 2, "placed with copies")),
    full((4, 2, 2, 1, "placed with copies"), SINGLE_RANK),
]
# What a layout has -> seed of its placement of experts.
PLACED = {"placed": 1, "placed again": 2, "placed with copies": 3}
MODEL = ("model.num_experts=12", f"train.save_every={SAVED}", "train.log_every=1")


def name(layout: tuple) -> str:
    world, tp, ep, zero, *more = layout
    words = "".join(f", experts {text}" for text in more if text in PLACED)
    words += "".join(f", states over {text[-1]} ranks" for text in more if "shard_ranks" in text)
    return f"{world} ranks, tp {tp}{' with experts' if more and not words else ''}, ep {ep}, ZeRO-{zero}{words}"


def overrides(layout: tuple, place: Path) -> tuple[str, ...]:
    _, tp, ep, zero, *more = layout
    more = [f"parallel.placement={file_of(m, ep, place)}" if m in PLACED else m for m in more]
    return (*MODEL, f"parallel.tp={tp}", f"parallel.ep={ep}", f"train.deepspeed=fp32_zero{zero}", *more)


def file_of(what: str, ep: int, place: Path) -> Path:
    return placement_file(place, 12, ep, seed=PLACED[what], copies="copies" in what)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@cache
def undisturbed(layout: tuple, place: Path) -> Path:
    folder = place / name(layout)
    run(layout[0], train, str(folder), *overrides(layout, place), f"train.steps={LAST}")
    return folder


def later_checkpoints(folder: str, names: list[str]) -> list[str]:
    """Those of the names that are checkpoints after the step at which the layout changes."""
    return [name for name in names if name.startswith("step-") and name > folder_of(Path(), SAVED).name]


@pytest.fixture(scope="module")
def table(request):
    rows = []
    yield rows
    if file := request.config.getoption("--layout-table"):
        write_table(Path(file), rows)


@pytest.mark.parametrize("before, after", CASES, ids=lambda layout: name(layout))
def test_ten_further_steps_at_another_layout(before, after, place, tmp_path, table):
    straight = undisturbed(before, place)
    moved = tmp_path / "moved"
    shutil.copytree(straight, moved, ignore=later_checkpoints)
    run(after[0], train, str(moved), *overrides(after, place), f"train.steps={LAST}")
    assert len(losses(moved)) == len(losses(straight)) == LAST
    in_losses = max(abs(a - b) / abs(b) for a, b in zip(losses(moved), losses(straight), strict=True))
    expected, actual = state(straight, LAST), state(moved, LAST)
    norms = {kind: torch.stack([t.norm() for (k, _), t in expected.items() if k == kind]).norm() for kind in KINDS}
    in_state = max(
        float((actual[kind, n] - t).norm() / (t.norm() + 0.1 * norms[kind])) for (kind, n), t in expected.items()
    )
    table.append((name(before), name(after), in_losses, in_state))
    assert in_losses <= LIMIT and in_state <= LIMIT


def write_table(file: Path, rows: list[tuple]) -> None:
    """The matrix as Markdown."""
    lines = [
        f"A run is saved after {SAVED} steps at one layout and continues at another for {LAST - SAVED} steps (12",
        "experts, fp32). It is compared with the same run without interruption at the first layout. Deviations are",
        "relative: of the loss of the worst step, and of the worst tensor among master weights, moments and averages",
        "after the last step, as",
        f"‖a-b‖ / (‖b‖ + ‖all‖/10). The limit is {LIMIT:g} for both.",
        "",
        "Written by `make layouts`.",
        "",
        "| saved at | continues at | losses | state |",
        "|---|---|---|---|",
        *(f"| {before} | {after} | {a:.1e} | {b:.1e} |" for before, after, a, b in rows),
    ]
    write_section(file, "A run that changes its layout", "\n".join(lines))

"""Nothing of a checkpoint is believed before it is checked: hash, form, coverage, file names, the folder's name."""

import hashlib
import json
import os
import re
import shutil
import threading

import pytest
import torch
from support.fuzz import HARMLESS, NAMED, OLDER, SILENT, Target, damage, outcome_of

from megapromoe.checkpoint.format import KINDS, Checkpoint, CheckpointError, commit, write_rank
from megapromoe.checkpoint.manifest import FORMAT, read_manifest, seal
from megapromoe.checkpoint.step_folders import folder_of, steps_in

SHAPES = {"w": [4, 3], "b": [3]}


def save(root, step):
    """A checkpoint of two ranks: w split over both by rows, and rank 1's half in two parts; b whole on rank 0."""
    staging, final = root / f"step-{step:08d}.writing", folder_of(root, step)
    staging.mkdir(parents=True)
    rows = [[[2, 3], [[[[0, 2], [0, 3]], [[2 * r, 2 * r + 2], [0, 3]]]]] for r in (0, 1)]
    full_range = [[3], [[[[0, 3]], [[0, 3]]]]]
    parts = [[["w", 0, 6, rows[0]], ["b", 0, 3, full_range]], [["w", 0, 2, rows[1]], ["w", 2, 6, rows[1]]]]
    generator = torch.Generator().manual_seed(step)
    for rank in (0, 1):
        tensors = {f"{k}/{n}@{a}": torch.randn(z - a, generator=generator) for n, a, z, _ in parts[rank] for k in KINDS}
        if rank == 0:
            tensors["buffer/centroids"] = torch.randn(2, 2, generator=generator)
        assert write_rank(staging, rank, tensors, parts[rank], step) == ""
    facts = {"step": step, "updates": step - 1, "recent_norms": [0.5, 1.25], "config": {"train": {"lr": 1e-4}}}
    commit(staging, final, 2, facts | {"shapes": SHAPES, "buffers": ["centroids"]}, 60)
    return final


def state(folder):
    """All that a run takes from a checkpoint."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    values = {f"{kind}/{name}": checkpoint.logical(kind, name).tolist() for kind in KINDS for name in checkpoint.shapes}
    values |= {name: checkpoint.buffer(name).tolist() for name in checkpoint.manifest["buffers"]}
    return {"manifest": checkpoint.manifest, "values": values}


def newest(root):
    """As `resume`: the newest checkpoint that is whole, and what was passed over."""
    passed = []
    for step in reversed(steps_in(root)):
        try:
            return step, state(folder_of(root, step)), passed
        except CheckpointError as error:
            passed.append(str(error))
    raise CheckpointError("none is whole")


@pytest.fixture
def root(tmp_path):
    for step in (3, 6):
        save(tmp_path, step)
    return tmp_path


def test_a_copied_or_reformatted_checkpoint_is_read(root, tmp_path):
    expected = state(folder_of(root, 6))
    assert expected["manifest"]["format"] == FORMAT and expected["values"]["master/b"]
    copy = shutil.copytree(folder_of(root, 6), tmp_path / "elsewhere")
    (copy / "manifest.json").write_text(json.dumps(expected["manifest"], indent=4, sort_keys=True))
    assert state(copy) == expected


def edit(folder, change, hashed=True):
    """Writes the manifest anew after `change(content)`; with a right hash, or as the format without one."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    if hashed:
        file.write_text(seal(content))
    else:
        content.pop("sha256")
        file.write_text(json.dumps(content | {"format": 1}))


def test_a_checkpoint_of_the_format_without_hash_is_read_with_a_notice(root, caplog):
    expected = state(folder_of(root, 6))["values"]
    edit(folder_of(root, 6), lambda content: None, hashed=False)
    caplog.set_level("INFO")
    assert state(folder_of(root, 6))["values"] == expected
    assert "of format 1, whose manifest has no hash" in caplog.text


def test_a_changed_value_is_named_and_the_older_one_used(root):
    file = folder_of(root, 6) / "manifest.json"
    for old, new in (('"updates": 5', '"updates": 4'), ("1.25", "1.26"), ('"step": 6', '"step": 4'), ("0.0001", "0.1")):
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
        step, _, (problem,) = newest(root)
        assert step == 3 and f"{file}: does not match its own hash" in problem and "use another step" in problem
        file.write_text(text)


def part(content, rank=1, number=0):
    return content["ranks"][rank]["parts"][number]


DAMAGE = {
    "step is text": lambda m: m.update(step="6"),
    "step below zero": lambda m: m.update(step=-6),
    "updates is missing a number": lambda m: m.update(updates=None),
    "norms not finite": lambda m: m.update(recent_norms=[float("nan")]),
    "norms no list": lambda m: m.update(recent_norms=3),
    "momentum no list": lambda m: m.update(with_momentum="w"),
    "momentum of a number": lambda m: m.update(with_momentum=[["w"]]),
    "momentum of no parameter": lambda m: m.update(with_momentum=["w", "v"]),
    "buffers": lambda m: m.update(buffers=[1]),
    "config": lambda m: m.update(config=[]),
    "no shapes": lambda m: m.pop("shapes"),
    "a shape below zero": lambda m: m["shapes"].update(b=[-3]),
    "a shape with a fraction": lambda m: m["shapes"].update(b=[3.0]),
    "a parameter that no part holds": lambda m: m["shapes"].update(c=[3]),
    "no ranks": lambda m: m.update(ranks=[]),
    "ranks of another kind": lambda m: m.update(ranks=[7]),
    "a rank without size": lambda m: m["ranks"][0].pop("size"),
    "a rank without hash": lambda m: m["ranks"][0].pop("sha256"),
    "a file outside the folder": lambda m: m["ranks"][0].update(file="../step-00000003/rank-00000.safetensors"),
    "an absolute file": lambda m: m["ranks"][0].update(file="/etc/passwd"),
    "a file that is no text": lambda m: m["ranks"][0].update(file=1),
    "a file twice": lambda m: m["ranks"].append(m["ranks"][0]),
    "parts no list": lambda m: m["ranks"][0].update(parts=None),
    "a part that is too short": lambda m: part(m).pop(),
    "an unknown name": lambda m: part(m).__setitem__(0, "v"),
    "a range below zero": lambda m: part(m).__setitem__(1, -1),
    "a range that overlaps": lambda m: part(m).__setitem__(2, 3),
    "a range with a gap": lambda m: part(m).__setitem__(2, 1),
    "a range that is turned": lambda m: part(m, 1, 1).__setitem__(1, 7),
    "a range of text": lambda m: part(m).__setitem__(1, "0"),
    "a range beyond the file": lambda m: part(m, 0, 0).__setitem__(2, 10**15),
    "view pairs emptied": lambda m: [part(m, 1, n)[3].__setitem__(1, []) for n in (0, 1)],
    "a view of nothing": lambda m: [part(m, 1, n)[3][1][0][1].__setitem__(0, [2, 2]) for n in (0, 1)],
    "a view with a gap": lambda m: [part(m, 1, n)[3][1].__setitem__(0, [[[0, 1], [0, 3]]] * 2) for n in (0, 1)],
    "a view that stands twice": lambda m: [part(m, 1, n)[3][1][0].__setitem__(1, [[1, 3], [0, 3]]) for n in (0, 1)],
    "a view beyond the tensor": lambda m: [part(m, 1, n)[3][1][0].__setitem__(1, [[3, 5], [0, 3]]) for n in (0, 1)],
    "a view of other dimensions": lambda m: [part(m, 1, n)[3].__setitem__(0, [6]) for n in (0, 1)],
    "a rank's parts are missing": lambda m: m["ranks"].pop(),
}  # fmt: skip


@pytest.mark.parametrize("hashed", [True, False], ids=["hashed", "without hash"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_malformed_manifest_is_damaged_and_never_a_traceback(root, damage, hashed):
    edit(folder_of(root, 6), damage, hashed)
    step, _, (problem,) = newest(root)
    assert (
        step == 3 and str(folder_of(root, 6) / "manifest.json") in problem and "is damaged, use another step" in problem
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"format": 3}', "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "\xff"]
)
def test_what_is_no_manifest_is_damaged(root, text):
    (folder_of(root, 6) / "manifest.json").write_bytes(text.encode("latin-1"))
    step, _, (problem,) = newest(root)
    assert step == 3 and "manifest.json" in problem


def test_a_file_that_vanishes_while_it_is_opened_is_missing(root, monkeypatch):
    """torch maps the file after safetensors has opened it, and raises RuntimeError if a run has removed it since."""

    def vanished(*_, **__):
        raise RuntimeError("unable to open file in read-only mode: No such file or directory (2)")

    monkeypatch.setattr("megapromoe.checkpoint.format.safe_open", vanished)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: has no master/w"):
        Checkpoint(folder_of(root, 6)).logical("master", "w")


def test_an_entry_that_a_file_does_not_hold_is_damaged(root):
    folder = folder_of(root, 6)

    def rename(content):
        content["shapes"] = {"x": SHAPES["w"], "b": SHAPES["b"]}
        for rank in content["ranks"]:
            rank["parts"] = [["x" if name == "w" else name, *rest] for name, *rest in rank["parts"]]

    edit(folder, rename)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: has no master/x@0"):
        Checkpoint(folder).logical("master", "x")
    with pytest.raises(CheckpointError, match="has no buffer/other"):
        Checkpoint(folder).buffer("other")


def test_a_link_out_of_the_folder_and_a_pipe_are_refused(root, tmp_path):
    folder = folder_of(root, 6)
    file, outside = folder / "rank-00001.safetensors", tmp_path / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a symbolic link out of its folder"):
        Checkpoint(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint(folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CheckpointError, match="is no regular file"):
        Checkpoint(folder)
    assert steps_in(root) == [3]


def test_a_folder_of_another_name_than_its_step_is_no_checkpoint(root, caplog):
    copy = shutil.copytree(folder_of(root, 3), folder_of(root, 99))
    assert steps_in(root) == [3, 6] and "step-00000099: is a copy of another step" in caplog.text
    with pytest.raises(CheckpointError, match="is of step 3, its folder is named as 99"):
        Checkpoint(copy)
    edit(copy, lambda content: None, hashed=False)
    assert steps_in(root) == [3, 6]
    (copy / "manifest.json").write_text("{}")  # damaged: whoever opens it says so
    assert steps_in(root) == [3, 6, 99]


def spoil_hash(root, count, seed):
    folder = folder_of(root, 6)
    expected, older = state(folder), state(folder_of(root, 3))

    def classify(change):
        outcome = outcome_of(lambda: state(folder), CheckpointError, expected)
        if outcome == NAMED:
            step, value, passed = newest(root)
            assert step == 3 and value == older and (str(folder) in "".join(passed) or folder not in listed())
            return OLDER
        return outcome

    def listed():
        return [folder_of(root, step) for step in steps_in(root)]

    return damage(
        Target("checkpoint", sorted(folder.iterdir()), classify, sorted(folder_of(root, 3).iterdir())), count, seed
    )


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.full)])
def test_no_flipped_bit_is_silent(root, count):
    before = {file: hashlib.sha256(file.read_bytes()).digest() for file in root.rglob("*") if file.is_file()}
    tally = spoil_hash(root, count, seed=count)
    outcomes = tally.outcomes
    assert outcomes[SILENT] == 0 and outcomes[OLDER] >= 0.9 * tally.total and tally.flips == count, outcomes
    assert outcomes[OLDER] + outcomes[HARMLESS] == tally.total > count
    assert {file: hashlib.sha256(file.read_bytes()).digest() for file in before} == before


def test_read_manifest_gives_what_was_sealed(tmp_path):
    folder = save(tmp_path, 12)
    assert read_manifest(folder)["shapes"] == SHAPES


def test_a_save_whose_folder_is_renamed_ends_at_once(tmp_path):
    """Before its receipt is written, and while it waits for those of others; not after the timeout of 600 s."""
    staging, moved = tmp_path / "staging", tmp_path / "moved"
    moved.mkdir()
    with pytest.raises(CheckpointError, match=re.escape(str(staging))):
        write_rank(staging, 0, {}, [], 1)
    staging.mkdir()
    write_rank(staging, 0, {}, [], 1)
    renaming = threading.Timer(0.2, staging.rename, [moved / "staging"])
    renaming.start()
    with pytest.raises(CheckpointError, match="staging: was removed or renamed while the checkpoint was written"):
        commit(staging, tmp_path / "step-00000001", 2, {"step": 1}, 600)

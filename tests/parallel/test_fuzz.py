"""No damage to a file that the trainer reads back goes unseen. The full table: `make fuzz`, docs/faults.md."""

import json

import pytest
from support.fuzz import HARMLESS, NAMED, OLDER, SILENT, Target, Unclear, damage, outcome_of, table
from support.fuzz_program import (
    checkpoint_tallies,
    data_tallies,
    must_not_be_silent,
    settings_tallies,
    text_tallies,
)

LEVELS = [(60, 40), pytest.param(300, 60, marks=pytest.mark.full)]
"""Flips of the most important targets and of the others; 40 bring one damage of each kind that is no flip."""


def not_silent(tallies):
    for tally in tallies:
        if must_not_be_silent(tally):
            assert tally.outcomes[SILENT] == 0, (tally.outcomes, tally.silent[:5])
    print(table(tallies))


@pytest.mark.parametrize(("flips", "others"), LEVELS)
def test_no_damage_to_a_checkpoint_is_silent(flips, others, tmp_path):
    resumed, sampled, converted, unhashed = tallies = checkpoint_tallies(tmp_path, flips, flips, others)
    not_silent(tallies)
    assert resumed.flips == flips and resumed.outcomes[OLDER] >= 0.6 * flips and resumed.outcomes[NAMED] >= 0.2 * flips
    assert sampled.outcomes[NAMED] >= 0.8 * others and converted.outcomes[NAMED] >= 0.8 * others
    assert unhashed.outcomes[NAMED] >= 0.3 * others


@pytest.mark.parametrize(("flips", "others"), LEVELS)
def test_no_damage_to_latents_is_silent(flips, others, tmp_path):
    checked, trained, encoded = tallies = data_tallies(tmp_path, flips, flips, others)
    not_silent(tallies)
    assert checked.flips == trained.flips == flips and checked.outcomes[NAMED] >= 0.9 * flips
    assert trained.outcomes[NAMED] >= 0.7 * flips
    assert encoded.outcomes[SILENT] == 0 and encoded.outcomes[NAMED] >= 0.8 * others


@pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.full)])
def test_no_damage_to_text_features_is_silent(flips, tmp_path):
    tallies = text_tallies(tmp_path, flips, flips)
    not_silent(tallies)
    assert all(tally.flips == flips and tally.outcomes[NAMED] >= 0.6 * flips for tally in tallies)


@pytest.mark.parametrize("flips", [8, pytest.param(150, marks=pytest.mark.full)])
def test_damage_to_text_files_is_a_sentence_or_a_setting(flips, tmp_path):
    tallies = {tally.name: tally for tally in settings_tallies(tmp_path, flips, flips)}
    for name in ("run folder: run.lock", "run folder: run.lock of a live run", "run folder: config.yaml"):
        assert tallies[name].outcomes[SILENT] == 0, (tallies[name].outcomes, tallies[name].silent[:5])
    assert tallies["run folder: run.lock of a live run"].outcomes[HARMLESS] == 0
    assert tallies["run folder: config.yaml"].outcomes[NAMED] >= 0.5 * flips
    assert sum(tally.flips for tally in tallies.values()) == len(tallies) * flips
    print(table(list(tallies.values())))


def test_the_program_detects_damage_that_a_reader_overlooks(tmp_path):
    """A reader without a hash is silent, one that raises anything is unclear, and files are as they were."""
    file = tmp_path / "numbers.json"
    file.write_text("[10, 20, 30, 40]")

    def read():
        return json.loads(file.read_text())

    careless = Target("numbers", [file], lambda _: outcome_of(read, (ValueError, FileNotFoundError), [10, 20, 30, 40]))
    tally = damage(careless, 100, 0)
    assert tally.outcomes[SILENT] > 10 and tally.outcomes[NAMED] > 10 and tally.total == 112 and tally.flips == 100
    assert len(tally.silent) == tally.outcomes[SILENT] and "numbers.json: bit" in tally.silent[0]
    assert read() == [10, 20, 30, 40] and "| numbers | 112 | 100 |" in table([tally])
    assert damage(careless, 100, 0).outcomes == tally.outcomes != damage(careless, 100, 1).outcomes
    with pytest.raises(Unclear, match="numbers, seed 0, damage .*numbers.json: bit"):
        damage(Target("numbers", [file], lambda _: outcome_of(read, KeyError, 0)), 100, 0)
    assert read() == [10, 20, 30, 40]

"""All targets of the fuzz program, and its command line."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from support import processes
from support.fuzz import SILENT, Tally, table
from support.fuzz_checkpoints import fuzz_conversion, fuzz_resume, fuzz_sampling, fuzz_unhashed, make_run
from support.fuzz_data import fuzz_check, fuzz_encoding, fuzz_text_check, fuzz_text_reading, fuzz_training_data
from support.fuzz_settings import fuzz_metrics, fuzz_run_folder, fuzz_user_files
from support.page_sections import write_section

LIMIT = 3600.0  # seconds for one target in a worker process
HASHED = ("checkpoint", "latents", "text features")  # kinds of files of which nothing may be silent

NOTES = """\
Each case damages one file. In most cases one bit is flipped. In the others the file is truncated, gets a block of
zeros, is swapped with another file or replaced by it, or is removed. Files are chosen with equal probability, whatever
their sizes. Then the real reader reads. The result is one of:

* **named**: the file is refused or skipped, with a message that names the file or folder;
* **older used**: the run continues from the checkpoint before, and a message names the damaged one;
* **harmless**: exactly the same was read as from the undamaged files;
* **silent**: something else was read, without a message.

For checkpoints, latents and text features no case may be silent, which tests check. Files that people write and edit
have no hash. If a digit in them becomes another digit, that is another valid setting, which cannot be recognised as
damage. Settings that define a run are compared with those of its folder. Manifests of format 1, from before manifests
had a hash, are read with a notice.
"""


def checkpoint_tallies(root: Path, flips: int, seed: int, others: int) -> list[Tally]:
    """Of a run's checkpoint, by `flips` flips as training reads it, and by `others` as other commands do."""
    folder = str(root / "run")
    processes.run(2, make_run, folder)
    (resumed,) = processes.run(1, fuzz_resume, folder, flips, seed, limit=LIMIT)
    readers = (fuzz_sampling, fuzz_conversion, fuzz_unhashed)
    return [resumed, *(processes.run(1, reader, folder, others, seed, limit=LIMIT)[0] for reader in readers)]


def data_tallies(root: Path, flips: int, seed: int, others: int) -> list[Tally]:
    """Of latents, by `flips` flips for each of their readers, and of an interrupted encoding by `others`."""
    for name in ("check", "training", "encoding"):
        (root / name).mkdir(parents=True)
    return [
        fuzz_check(root / "check", flips, seed),
        fuzz_training_data(root / "training", flips, seed),
        fuzz_encoding(root / "encoding", others, seed),
    ]


def text_tallies(root: Path, flips: int, seed: int) -> list[Tally]:
    """Of text features, by `flips` flips for each of their readers."""
    for name in ("check", "reading"):
        (root / name).mkdir(parents=True)
    return [fuzz_text_check(root / "check", flips, seed), fuzz_text_reading(root / "reading", flips, seed)]


def settings_tallies(root: Path, flips: int, seed: int) -> list[Tally]:
    """Of the text files of a run's folder, and of its user."""
    for name in ("folder", "metrics", "user"):
        (root / name).mkdir(parents=True)
    folder = fuzz_run_folder(root / "folder", flips, seed)
    return [*folder, fuzz_metrics(root / "metrics", flips, seed), *fuzz_user_files(root / "user", flips, seed)]


def must_not_be_silent(tally: Tally) -> bool:
    """Whether a kind of file has hashes, so that no damage to it may go unseen."""
    return tally.name.startswith(HASHED)


def main(words: Sequence[str]) -> int:
    """Runs the program; returns 1 if damage to a hashed kind of file was silent, else 0."""
    parser = argparse.ArgumentParser(description="Damages every file that the trainer reads back, and reports.")
    parser.add_argument("--flips", metavar="N", type=int, default=2000, help="of checkpoints and latents; default 2000")
    parser.add_argument("--others", metavar="N", type=int, default=500, help="flips of other files; default 500")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default 0")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the table into this Markdown file")
    parser.add_argument("--show-silent", metavar="N", type=int, default=0, help="print so many silent ones of each")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tallies = checkpoint_tallies(root / "checkpoints", options.flips, options.seed, options.others)
        tallies += data_tallies(root / "data", options.flips, options.seed, options.others)
        tallies += text_tallies(root / "text", options.others, options.seed)
        tallies += settings_tallies(root / "settings", options.others, options.seed)
    processes.stop_workers()
    print(table(tallies))
    for tally in tallies:
        for words_of_one in tally.silent[: options.show_silent]:
            print(f"silent, {tally.name}: {words_of_one}")
    if options.out:
        command = f"`python tools/fuzz.py --flips {options.flips} --others {options.others} --seed {options.seed}`"
        write_section(options.out, "Damaged files", f"Written by {command}.\n\n{NOTES}\n{table(tallies)}\n")
    return int(any(tally.outcomes[SILENT] for tally in tallies if must_not_be_silent(tally)))

"""Latents and text features under damage, read back by `data check` and as training reads; parts of an encoding."""

import contextlib
import io
import logging
from pathlib import Path

import torch
from support.fuzz import HARMLESS, NAMED, SILENT, Damage, Tally, Target, damage, outcome_of, snapshot, warnings_of
from support.latent_folders import Arrays, write
from support.text_folders import CAPTIONS, write_text

from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.cli import main
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.data import encode, shard_job
from megapromoe.data.datasets import DatasetError
from megapromoe.data.encode import EncodeError
from megapromoe.data.latents import Latents
from megapromoe.data.sample_stream import SampleStream
from megapromoe.data.sources import open_dataset
from megapromoe.data.text_features import TextFeatures

RECORDS = 6


class _Source(Arrays):
    """A few small records; those of `number` 1 are others than those of 0."""

    def __init__(self, number: int = 0):
        super().__init__(count=RECORDS, classes=2, shape=(2, 2, 2))
        self.number = number

    def record(self, item):
        return super().record(item) + self.number


def latents_config(folder: Path) -> Config:
    """A run that trains on such latents."""
    shape = ("model.input_size=2", "model.in_channels=2", "model.num_classes=2", "model.patch_size=1")
    data = ("data.source=latents", f"data.path={folder}", "data.flip=true", "train.global_batch=4", "train.warmup=0")
    return resolve("digits", overrides=[*shape, *data])


def _folders(root: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder of latents, and those of another one of the same form."""
    folders = (write(root / f"latents {number}", _Source(number), shard_size=4) for number in (0, 1))
    files, donors = (sorted(path for path in folder.iterdir() if path.name != "plan.json") for folder in folders)
    return files, donors


def fuzz_check(root: Path, flips: int, seed: int) -> Tally:
    """The command `data check`: it must name what is wrong, and hold to be right only what is unchanged."""
    files, donors = _folders(root)
    folder = files[0].parent

    def contents() -> list:
        data = Latents(folder)
        records = [[data.raw(index).tolist(), data.name(index)] for index in range(RECORDS)]
        return [data.manifest, data.labels.tolist(), records]

    expected = contents()

    def classify(_: Damage) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings_of():
            code = main(["data", "check", str(folder)])
        if code == 1:
            assert str(folder) in output.getvalue(), output.getvalue()
            return NAMED
        return HARMLESS if contents() == expected else SILENT

    return damage(Target("latents, `data check`", files, classify, donors), flips, seed)


def fuzz_training_data(root: Path, flips: int, seed: int) -> Tally:
    """What a run does with its data: compares their identity, opens them, reads two epochs."""
    files, donors = _folders(root)
    folder = files[0].parent
    config, run = latents_config(folder), root / "run"
    RunDirectory.open(run, config, 1).close()

    def read() -> tuple[list[bytes], int]:
        RunDirectory(run).state(config)
        loader = SampleStream(open_dataset(config), config.data.seed, 0.3, config.data.flip, config.model.null_class)
        batches = [loader.batch(first, 4) for first in range(0, 2 * RECORDS, 4)]
        fields = ("clean_BCHW", "labels_B", "positions_B", "u_B", "noise_BCHW")
        tensors: list[torch.Tensor] = [getattr(batch, field) for batch in batches for field in fields]
        return [tensor.numpy().tobytes() for tensor in tensors], sum(batch.damaged for batch in batches)

    expected, _ = read()

    def classify(_: Damage) -> str:
        with warnings_of() as messages:
            try:
                tensors, damaged = read()
            except (DatasetError, RunDirectoryError) as error:
                assert str(folder) in str(error), error
                return NAMED
        if tensors == expected:
            return HARMLESS
        return NAMED if damaged and any(str(folder) in message for message in messages) else SILENT

    return damage(Target("latents, `train`", files, classify, donors), flips, seed)


def fuzz_encoding(root: Path, flips: int, seed: int) -> Tally:
    """What an interrupted `encode` finds when its command is repeated: its plan, and the parts of finished shards."""
    complete, folder = write(root / "whole", _Source(), shard_size=4), root / "interrupted"

    class Interrupted(_Source):
        def records(self, items):
            if items[0] != self.scan.items[0]:
                raise KeyboardInterrupt
            yield from super().records(items)

    with contextlib.suppress(KeyboardInterrupt):
        encode.encode(Interrupted(), folder, shard_size=4)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["part-00000.json", "plan.json", "shard-00000.npy"]
    expected = {path.name: path.read_bytes() for path in complete.iterdir() if path.name != "plan.json"}
    logging.getLogger(shard_job.__name__).setLevel(logging.WARNING)

    def read() -> dict[str, bytes]:
        encode.encode(_Source(), folder, shard_size=4)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "plan.json"}

    def classify(_: Damage) -> str:
        with warnings_of() as messages:
            outcome = outcome_of(read, EncodeError, expected)
        named = outcome == HARMLESS and any(str(folder) in message for message in messages)
        return NAMED if named else outcome

    files = [folder / "plan.json", folder / "part-00000.json"]
    donors = [complete / "plan.json", complete / "manifest.json"]
    return damage(Target("plan and parts of `encode`", files, classify, donors, snapshot(folder)), flips, seed)


def _text_folders(root: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder of text features, and those of another one of the same form."""
    others = [f"{caption} of others" for caption in CAPTIONS]
    folders = (write_text(root / name, captions) for name, captions in (("text", CAPTIONS), ("others", others)))
    files, donors = (sorted(path for path in folder.iterdir() if path.name != "plan.json") for folder in folders)
    return files, donors


def text_contents(folder: Path) -> list:
    """All that a folder of text features gives."""
    data = TextFeatures(folder)
    return [data.manifest, [[data.caption(i), data.features(i).tolist()] for i in range(len(data))]]


def fuzz_text_check(root: Path, flips: int, seed: int) -> Tally:
    """The command `data check` on text features."""
    files, donors = _text_folders(root)
    folder = files[0].parent
    expected = text_contents(folder)

    def classify(_: Damage) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings_of():
            code = main(["data", "check", str(folder)])
        if code == 1:
            assert str(folder) in output.getvalue(), output.getvalue()
            return NAMED
        return HARMLESS if text_contents(folder) == expected else SILENT

    return damage(Target("text features, `data check`", files, classify, donors), flips, seed)


def fuzz_text_reading(root: Path, flips: int, seed: int) -> Tally:
    """Text features as they are read for training: all captions and features."""
    files, donors = _text_folders(root)
    folder = files[0].parent
    expected = text_contents(folder)

    def classify(_: Damage) -> str:
        return outcome_of(lambda: text_contents(folder), DatasetError, expected)

    return damage(Target("text features, reading", files, classify, donors), flips, seed)

"""Folders of latents for tests: a source of random records, published files, the writing, and damage to them."""

import threading
from pathlib import Path

import numpy as np

from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.data import encode
from megapromoe.data.images import Item, Scan
from megapromoe.data.latents import read_manifest
from megapromoe.data.shard_files import HEADER


class Arrays:
    """A source of unit-normal means with log-variances around -3, two views, drawn from the number of the item."""

    def __init__(self, count=40, classes=4, shape=(2, 4, 4), stochastic=True, mirror="stored", dtype="float32"):
        items = tuple(Item(f"class{i % classes}/{i:04d}.png", i % classes) for i in range(count))
        self.scan = Scan(items, tuple(f"class {i}" for i in range(classes)), ())
        self.manifest_fields = {
            "shape": shape,
            "dtype": dtype,
            "mirror": mirror,
            "stochastic": stochastic,
            "scale": tuple(0.5 + c for c in range(shape[0])),
            "shift": tuple(0.25 * c for c in range(shape[0])),
            "autoencoder": {"name": "some/vae", "kind": "AutoencoderKL", "sha256": "ab" * 32},
            "resolution": 8 * shape[1],
            "crop": "adm centre crop",
        }
        self.requested = []

    def record(self, item):
        shape = (
            1 + (self.manifest_fields["mirror"] == "stored"),
            1 + self.manifest_fields["stochastic"],
            *self.manifest_fields["shape"],
        )
        record = np.random.default_rng(int(item.path[-8:-4])).standard_normal(shape).astype(np.float32)
        if self.manifest_fields["stochastic"]:
            record[:, 1] -= 3
        return record

    def records(self, items):
        for item in items:
            self.requested.append(item)
            yield item, self.record(item), ""


def write(folder: Path, source=None, world=1, shard_size=16, **options) -> Path:
    """Encodes on `world` ranks, which are threads."""
    source = source or Arrays()
    problems = []

    def rank(number):
        try:
            encode.encode(source, folder, number, world, shard_size, **options)
        except Exception as error:
            problems.append(error)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    if problems:
        raise problems[0]
    return folder


def published(folder, change=None, flip=True):
    """Six files of two classes as ProMoE's release makes them."""
    arrays = {}
    for number in range(6):
        path = folder / f"n{number % 2}" / f"im{number}.latent.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(number).standard_normal((2, 8, 4, 4)).astype(np.float32)
        draw[0, 7, 0, 0] = -40  # cut off at -30
        arrays[path.relative_to(folder).as_posix()] = draw
        content = {"latent": draw[0]} | ({"latent_flip": draw[1]} if flip else {})
        np.savez_compressed(path, **(change(content) if change and number == 3 else content))
    return arrays


def damage(folder: Path, shard: int, place: int, byte: int = 3) -> Path:
    """Flips a bit of a record; returns the file."""
    manifest = read_manifest(folder)
    path = folder / manifest.shards[shard].file
    with open(path, "r+b") as file:
        file.seek(HEADER + place * manifest.record_bytes + byte)
        value = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([value ^ 1]))
    return path


def latents_config(path: Path, *overrides: str, size: int = 4, channels: int = 2, classes: int = 4) -> Config:
    """The config of a training on latents of `Arrays`."""
    settings = (f"data.path={path}", f"model.input_size={size}", f"model.in_channels={channels}", "data.flip=true")
    more = (f"model.num_classes={classes}", "train.global_batch=8", "data.source=latents", "train.warmup=0")
    return resolve("digits", overrides=[*settings, *more, *overrides])

"""Checkpoints under damage, read back by what reads them: `resume` of a real engine, sampling and conversion."""

import hashlib
import json
from pathlib import Path

import torch
from support.fuzz import HARMLESS, NAMED, OLDER, SILENT, Damage, Tally, Target, damage, outcome_of, warnings_of
from support.training_runs import QUICK, train
from support.trajectory import small

from megapromoe.checkpoint.format import Checkpoint, CheckpointError
from megapromoe.checkpoint.manager import resume
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.config.options import ConfigError
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.stream import ConversionError
from megapromoe.diffusion.image_grid import SampleError
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build
from megapromoe.sampling.run_model import load_model

TINY = (
    *("model.hidden_size=16", "model.heads=2", "model.depth=2", "model.num_experts=2"),
    *("train.global_batch=8", "train.ema_decay=[0.5,0.9]"),
)
OLD, NEW = 3, 6  # steps of the two checkpoints; the newer one is damaged


def make_run(folder: str) -> None:
    """Trains a run with two checkpoints, of two expert-parallel ranks. Collective, on two."""
    train(folder, *TINY, "parallel.ep=2")


class Resumed:
    """A real engine of one rank that resumes from a run's checkpoints, and all that it takes from them."""

    def __init__(self, root: Path):
        config = small(*QUICK, *TINY)
        mesh = make_mesh(1, 1, False, 60)
        self.root = root
        self.origin = RunDirectory(root.parent).origin(config)
        self.engine = Engine(build(config, mesh), config, mesh)
        self.ema = EMA(self.engine, config.train.ema_decays)

    @torch.no_grad()
    def poison(self) -> None:
        """Makes the whole state of the run NaN, so that nothing of an earlier reading is left."""
        for tensor in self._tensors():
            tensor.fill_(float("nan"))
        self.engine.set_optimizer_step(-1)

    def state(self) -> str:
        """A hash of masters, moments, averages, parameters, buffers and AdamW's steps."""
        digest = hashlib.sha256()
        for tensor in self._tensors():
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        for state in self.engine._backend.optimizer.state.values():
            digest.update(str(float(state["step"])).encode())
        return digest.hexdigest()

    def read(self, step: int | None = None) -> str | None:
        """What a run would go on from: its state, step, updates and norms; None if it would start anew."""
        resumed = resume(self.root, self.engine, self.ema, step, self.origin.check)
        if resumed is None:
            return None
        keys = ("step", "updates", "recent_norms", "run", "branch", "data", "ema_averages")
        return json.dumps([self.state(), *(resumed.checkpoint.manifest.get(key) for key in keys)])

    def _tensors(self) -> list[torch.Tensor]:
        tensors = [*sum(self.ema.averages, []), *self.engine.module.state_dict().values()]
        for partition in self.engine.partitions:
            tensors += [partition.master, *self.engine.moments(partition).values()]
        return tensors


def fuzz_resume(folder: str, flips: int, seed: int) -> Tally:
    """`resume`, by the newest whole checkpoint or, every fourth time, from the damaged step alone."""
    root = Path(folder) / "checkpoints"
    run = Resumed(root)
    expected = {}
    for step in (OLD, NEW):
        run.poison()
        expected[step] = run.read(step)
    run.poison()
    poisoned = run.state()
    assert len({poisoned, *expected.values()}) == 3
    newest, count = folder_of(root, NEW), 0

    def classify(change: Damage) -> str:
        nonlocal count
        count += 1
        requested = NEW if count % 4 == 0 else None
        run.poison()
        with warnings_of() as messages:
            try:
                value = run.read(requested)
            except CheckpointError as error:
                assert run.state() == poisoned, f"refused, but it changed the state: {error}"
                assert requested and (str(newest) in str(error) or f"step {NEW}" in str(error)), error
                return NAMED
        if value == expected[NEW]:
            return HARMLESS
        passed = any(str(newest) in message for message in messages)
        return OLDER if value == expected[OLD] and requested is None and passed else SILENT

    files = sorted(newest.iterdir())
    return damage(Target("checkpoint, `train`", files, classify, sorted(folder_of(root, OLD).iterdir())), flips, seed)


def fuzz_sampling(folder: str, flips: int, seed: int) -> Tally:
    """`load_model`, by which `sample`, `evaluate` and `routing` open a run."""

    def read() -> list:
        model, config, step = load_model(Path(folder))
        return [step, config, {name: tensor.tolist() for name, tensor in model.state_dict().items()}]

    expected, refusals = read(), (CheckpointError, SampleError)
    root = Path(folder) / "checkpoints"
    target = Target("checkpoint, `sample`", sorted(folder_of(root, NEW).iterdir()), lambda _: classify())
    target.donors = sorted(folder_of(root, OLD).iterdir())

    def classify() -> str:
        with warnings_of() as messages:
            outcome = outcome_of(read, refusals, expected)
            if outcome != SILENT:
                return outcome
            step = read()[0]
        return OLDER if step == OLD and any(str(folder_of(root, NEW)) in message for message in messages) else SILENT

    return damage(target, flips, seed)


def fuzz_conversion(folder: str, flips: int, seed: int) -> Tally:
    """`open_state`, by which `convert`, `inspect` and `upcycle` open a checkpoint."""
    newest = folder_of(Path(folder) / "checkpoints", NEW)

    def read() -> list:
        state = open_state(newest)
        tensors = {(kind, name): state.read(kind, name).tolist() for kind in state.kinds for name in state.shapes}
        buffers = {name: tensor.tolist() for name, tensor in state.buffers.items()}
        return [state.config, state.step, state.updates, tensors, buffers]

    expected, refusals = read(), (CheckpointError, ConversionError, ConfigError)
    target = Target("checkpoint, `convert`", sorted(newest.iterdir()), lambda _: outcome_of(read, refusals, expected))
    target.donors = sorted(folder_of(newest.parent, OLD).iterdir())
    return damage(target, flips, seed)


def fuzz_unhashed(folder: str, flips: int, seed: int) -> Tally:
    """Manifests of format 1, which have no hash: what a flip in a number does there cannot be seen."""
    newest = folder_of(Path(folder) / "checkpoints", NEW)
    file = newest / "manifest.json"
    sealed = file.read_bytes()
    content = json.loads(sealed)
    del content["sha256"]
    file.write_text(json.dumps(content | {"format": 1}))

    def read() -> list:
        checkpoint = Checkpoint(newest)
        checkpoint.verify()
        kept = [checkpoint.manifest.get(key) for key in ("step", "updates", "recent_norms", "run", "config")]
        return kept + [checkpoint.logical("master", name).tolist() for name in sorted(checkpoint.shapes)]

    try:
        expected = read()
        name = "manifest of format 1, which has no hash"
        return damage(Target(name, [file], lambda _: outcome_of(read, CheckpointError, expected)), flips, seed)
    finally:
        file.write_bytes(sealed)

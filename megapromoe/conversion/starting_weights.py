"""The weights with which a run starts, from a checkpoint of any format: `train.init_from`.

1. Open the checkpoint as a `State`; the config of the run says what the checkpoint does not (`starting_run.py`).
2. Give it the run's classes, grid and channels (`adapting.py`).
3. Give it the run's experts (`upcycle.py`): experts from the MLPs of a dense model, or each expert split into several.

Nothing is read before the tensors are written, except hashes, and for experts from MLPs the tokens of the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.checkpoint.data_identity import data_identity
from megapromoe.checkpoint.manifest import read_manifest
from megapromoe.checkpoint.step_folders import choose_checkpoint
from megapromoe.checkpoint.weights import AVERAGE, MASTER, is_average
from megapromoe.config.model_options import PROMOE_ROUTERS, ModelConfig
from megapromoe.config.options import Config
from megapromoe.conversion.adapting import adapt, changed_names, fresh_names
from megapromoe.conversion.class_mapping import names_of, source_classes
from megapromoe.conversion.foreign import deepspeed_folder
from megapromoe.conversion.formats import detect, open_state
from megapromoe.conversion.starting_run import StartingRun, mismatch
from megapromoe.conversion.state import State, is_finite, with_one_average
from megapromoe.conversion.stream import ConversionError
from megapromoe.conversion.upcycle import Prototypes, check_fit, cluster, from_dense, grow, moe_inputs
from megapromoe.distributed.shard_ranges import ShardRange, copy_range

IMAGES = 64  # images of the run's data whose tokens give the prototypes of a dense model, as `megapromoe upcycle`
_FIXED = (
    *("hidden_size", "depth", "heads", "condition", "activation", "norm", "qk_norm"),
    *("positions", "modulation", "time_input"),
)


def newest_checkpoint(path: Path) -> Path:
    """The folder that is read for `train.init_from`: of a run or a DeepSpeed folder that of its newest checkpoint.

    Raises ConversionError or CheckpointError if there is none.
    """
    form = detect(path)
    if form == "ours" and not (path / "manifest.json").is_file():
        return choose_checkpoint(path / "checkpoints")
    return deepspeed_folder(path, None) if form == "deepspeed" else path


def open_start(config: Config, path: Path, share: tuple[int, int] = (0, 1)) -> StartingWeights:
    """Opens the checkpoint that a run starts from, and checks that its model can become the run's.

    Args:
        config: of the run.
        path: see `newest_checkpoint`.
        share: see `formats.open_state`.

    Raises ConversionError, CheckpointError, ConfigError or UnknownWeights.
    """
    model, weights = config.model, config.train.init_weights
    opened = open_state(path, run=StartingRun(config), share=share)
    source = with_one_average(opened, weights)
    kind = AVERAGE if is_average(weights) else MASTER
    if kind not in source.kinds:
        raise ConversionError(
            f"train.init_weights = {weights}: {path} has {', '.join(source.kinds)} only; set train.init_weights="
            f"{source.kinds[0]}"
        )
    _check_network(path, source.config.model, model)
    classes: tuple[int | None, ...] = ()
    if not model.has_text:
        names = names_of(config), source_names(source)
        classes = source_classes(config.train.init_classes, model.num_classes, source.config.model.num_classes, *names)
    return StartingWeights(config, path, source, kind, classes)


def source_names(source: State) -> tuple[str, ...]:
    """The names of the classes of a checkpoint; empty if its data set is not known, or is another one by now."""
    if source.config.data.source == "latents":
        recorded = read_manifest(source.where).get("data") if source.format == "ours" else None
        if recorded is None or data_identity(source.config) != recorded:
            return ()
    return names_of(source.config)


@dataclass(frozen=True)
class StartingWeights:
    """A checkpoint that a run starts from.

    Attributes:
        config: of the run.
        path: that was opened.
        source: the checkpoint, with one average.
        kind: the weights to use, `master` or `ema`.
        classes: for each class of the run that of the source, or None; empty for a model of texts.
    """

    config: Config
    path: Path
    source: State
    kind: str
    classes: tuple[int | None, ...]

    def __post_init__(self) -> None:
        """Raises ConversionError if the experts of the source cannot become those of the run."""
        if self.needs_prototypes:
            check_fit(self._adapted(), self.config, self.how)
        else:
            self.state({})

    @property
    def needs_prototypes(self) -> bool:
        """Whether the run has experts and the source has not."""
        return self.source.config.model.router == "dense" and self.config.model.router != "dense"

    @property
    def how(self) -> str:
        """For a source without experts how they are made of its MLPs, see `upcycle.from_dense`."""
        return "copy" if self.config.model.moe_width == self.source.config.model.mlp_width else "slice"

    @property
    def splits_experts(self) -> bool:
        """Whether the run has another number of experts than the source."""
        old, new = self.source.config.model, self.config.model
        return not self.needs_prototypes and bool(new.moe_blocks) and old.num_experts != new.num_experts

    def _adapted(self) -> State:
        """The source with the run's classes, grid and channels, and with its own experts."""
        old = self.source.config.model
        experts: dict[str, Any] = {}
        if self.needs_prototypes:
            experts = {"router": "dense", "capacity_factor": 0.0}
        elif self.splits_experts:
            experts = {"num_experts": old.num_experts}
        config = replace(self.config, model=replace(self.config.model, **experts))
        return adapt(self.source, config, self.classes, self.kind)

    def _check_finite(self, name: str, values: Tensor) -> None:
        if not is_finite(values):
            raise ConversionError(
                f"{self.path}: {name} holds NaN or infinity, because its training had diverged when it was saved; set"
                " train.init_from to an earlier checkpoint"
            )

    def prototypes(self) -> dict[int, Prototypes]:
        """The prototypes for a source without experts, from the run's data; the same with any number of threads.

        The whole dense model is in the memory of this process meanwhile.
        """
        adapted = self._adapted()

        def read(kind: str, name: str) -> Tensor:
            tensor = adapted.read(kind, name)
            self._check_finite(name, tensor)
            return tensor

        with _one_thread():
            tokens = moe_inputs(replace(adapted, read=read), self.config, IMAGES, self.kind)
            return {block: cluster(x_TD, self.config, self.config.train.seed) for block, x_TD in tokens.items()}

    def state(self, prototypes: dict[int, Prototypes]) -> State:
        """The initial weights of the run, read tensor by tensor.

        Raises ConversionError if the number of experts cannot become that of the run.
        """
        adapted, seed = self._adapted(), self.config.train.seed
        if self.needs_prototypes:
            return from_dense(adapted, self.config, prototypes, self.how, weights=self.kind, seed=seed)
        if self.splits_experts:
            return grow(adapted, self.config, weights=self.kind, seed=seed)
        return adapted

    def read_into(self, state: State, name: str, target: ShardRange, out: Tensor) -> None:
        """Writes elements of an initial weight, and zeros for padding.

        At most the whole tensor is in memory besides `out`, and of a checkpoint of ours at most one of its parts.

        Args:
            state: of `self.state(...)`.
            name: of the parameter.
            target: which elements.
            out: flat, contiguous, (target.stop - target.start,).

        Raises ConversionError if an element is NaN or infinite, or if the file is damaged.
        """
        if self.source.read_range is not None and self.is_unchanged(name):
            self.source.read_range(self.kind, name, target, out)
        else:
            _copy_part(state.read(self.kind, name), target, out)
        self._check_finite(name, out)

    def is_unchanged(self, name: str) -> bool:
        """Whether a parameter of the run is exactly that of the source."""
        old, new = self.source.config.model, self.config.model
        if self.splits_experts and (".mlp.experts." in name or name.endswith(".router.prototypes")):
            return False
        others = (*fresh_names(old, new), *changed_names(old, new, self.classes))
        return name in self.source.shapes and name not in others


def _copy_part(tensor: Tensor, target: ShardRange, out: Tensor) -> None:
    if target.has_padding:
        out.zero_()
    copy_range(target, out, ShardRange.of_tensor(tuple(tensor.shape)), tensor.contiguous().view(-1))


def _check_network(path: Path, old: ModelConfig, new: ModelConfig) -> None:
    """Raises ConversionError with a sentence for each option that must be the source's and is not."""
    problems = [mismatch(new, name, getattr(old, name)) for name in _FIXED if getattr(old, name) != getattr(new, name)]
    if old.condition == new.condition == "text":
        texts = ("text_width", "text_ffn")
        problems += [
            mismatch(new, name, getattr(old, name)) for name in texts if getattr(old, name) != getattr(new, name)
        ]
    if old.hidden_size != new.hidden_size:  # of which all widths are multiples
        raise ConversionError(_refusal(path, problems))
    has_mlps = len(old.expert_blocks) < old.depth and len(new.expert_blocks) < new.depth
    if old.mlp_width != new.mlp_width and (has_mlps or old.router == "dense"):
        problems.append(mismatch(new, "mlp_ratio", old.mlp_ratio))
    if old.router != "dense" or new.router not in PROMOE_ROUTERS:  # `check_fit` compares the others
        problems += _expert_problems(old, new)
    if problems:
        raise ConversionError(_refusal(path, problems))


def _refusal(path: Path, problems: list[str]) -> str:
    return f"{path}: cannot be the start of this run:\n  " + "\n  ".join(problems)


def _expert_problems(old: ModelConfig, new: ModelConfig) -> Iterator[str]:
    """A sentence for each option of experts that must be the source's and is not."""
    if old.router != new.router and not {old.router, new.router} <= set(PROMOE_ROUTERS):
        yield mismatch(new, "router", old.router) + (
            ", or promoe or promoe_ec for experts from its MLPs" if old.router == "dense" else ""
        )
        return
    if new.router == "dense":
        return
    if old.moe_every != new.moe_every:
        yield mismatch(new, "moe_every", old.moe_every)
    if old.router_input != new.router_input:
        yield mismatch(new, "router_input", old.router_input)
    if old.balance_bias and not new.balance_bias:
        yield "model.balance_bias = 0: must be more than 0, because biases of the source decide which experts it uses"
    if old.moe_width != new.moe_width:
        yield f"model.expert_width = {new.expert_width}: must be {old.moe_width}, the width of the source's experts"
    for name in ("shared", "unconditional"):
        count, needed = getattr(new, f"{name}_experts"), getattr(old, f"{name}_experts")
        if count != needed:
            options = f"model.{name}_expert and model.num_{name}_experts"
            yield f"{options}: must give {needed} {name} experts in a block, as in the source, not {count}"
    if old.shared_experts and old.shared_width != new.shared_width:
        yield f"model.shared_expert_width = {new.shared_expert_width}: must be {old.shared_width}, the source's"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products and k-means then have the same rounding at every number of ranks and cores."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)

"""The options of a run: every section and key, with its default, its meaning and the values it may have.

The classes are frozen and typed, and the module imports no torch. `resolve.py` reads the options, `rules.py` holds the
rules between them. The layout over ranks and its rules are defined in this module because `Config.layout` needs them.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapromoe.config import class_groups, extensions
from megapromoe.config.expert_placement import AUTO, CONTIGUOUS, Placements, is_file, read_placements, smallest_slots
from megapromoe.config.model_options import ModelConfig
from megapromoe.config.reader import (
    ONE_UP,
    POSITIVE,
    ZERO_UP,
    NumberOrAuto,
    Numbers,
    nearest_divisors,
    nearest_multiples,
    option,
)
from megapromoe.errors import ExitCode, Violations

SAMPLING_METHODS = ("euler", "heun", "ddpm", "ddim", "unipc", "dpm_solver++")
MAX_PROFILED = 100  # steps: a trace of a step of XL has some 100 MB before compression
UNSET = "unset"  # the value of data.source until the user chooses a source; training is refused until then
SOURCES = ("digits", "fashion_mnist", "latents", "synthetic", UNSET)
NO_DATA = (
    "no training data is chosen: give data.source=latents data.path=DIR (latents of your images, docs/data.md), or"
    " data.source=synthetic (random latents, for timing)"
)
FIXED_SIZES = {
    "digits": 8,
    "fashion_mnist": 32,
}  # image side in pixels of the sources with a fixed size; all have 1 channel and 10 classes


class ConfigError(Violations):
    """A configuration that cannot run. `violations` lists every reason, and the message contains all of them."""

    subject = "the configuration"
    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # every rank reads the same options


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split over the ranks."""

    tp: int = option(
        1, "tensor-parallel size: number of ranks over which attention heads and MLP widths are split", within=ONE_UP
    )
    ep: int = option(
        1, "expert-parallel size: number of ranks over which the routed experts are distributed", within=ONE_UP
    )
    expert_tp: bool = option(False, "also split the width of each routed expert over the tp ranks")
    recompute: str = option(
        "none",
        "activations that the backward pass recomputes to save memory: none, those of MoE layers (moe), all but the"
        " routers' (blocks), or all",
        ("none", "moe", "blocks", "all"),
    )
    placement: str = option(
        CONTIGUOUS,
        "which ep rank has which routed experts: consecutive ones (contiguous); those that the load of the run so far"
        " suggests, chosen at each start (auto); or those of a file of `megapromoe routing place` (docs/train.md)",
        (CONTIGUOUS, AUTO),
        accepts=is_file,
        form="FILE.yaml",
    )
    shard_ranks: int = option(
        0,
        "number of consecutive ranks, such as those of a node, over which ZeRO stages 1 and 2 divide optimizer states;"
        " gradients are then summed over these ranks and after that between them and the others; 0: over all ranks",
        within=ZERO_UP,
    )
    replicas: int | str = option(
        0,
        "copies of experts of other ranks that an ep rank holds in each block at most, to divide the rows of popular"
        " experts (docs/train.md); auto: as few as give the fullest rank at most 1.05 times the mean rows. With"
        " parallel.placement=auto; a file lists its copies itself",
        within=ZERO_UP,
        kind=NumberOrAuto,
    )


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    source: str = option(
        UNSET,
        "the training data: latents of your images (docs/data.md), a small data set, or random data for timing; unset:"
        " the user must choose",
        SOURCES,
    )
    path: str = option(
        "", "folder of the latents or of fashion_mnist; empty for fashion_mnist: the folder of its Debian package"
    )
    test_path: str = option("", "folder of latents for evaluation, which training does not use")
    size: int = option(65536, "synthetic: number of images", within=ONE_UP)
    condition_dropout: float = option(
        0.1, "probability that a label is replaced by the null class, for classifier-free guidance", within="[0, 1)"
    )
    condition_dropout_stratum: int = option(
        0,
        "0: each label is dropped independently of the others; n: of each n consecutive samples of the stream exactly"
        " n * condition_dropout labels are dropped (stratified), so that all micro-batches have equally many null"
        " images; must divide the images of a micro-batch",
        within=ZERO_UP,
    )
    flip: bool = option(False, "mirror each image with probability 0.5")
    seed: int = option(0, "seed of the sample stream: order, noise, time, flips and dropped conditions", within=ZERO_UP)
    workers: int = option(
        1,
        "number of threads that prepare batches on each rank, and number of batches that they prepare ahead",
        within="[1, 256]",
    )
    verify: bool = option(True, "latents: verify the checksum of each record when it is read")
    max_damaged: int = option(
        100,
        "latents: number of damaged samples, over all ranks, that the run replaces before it ends with an error",
        within=ZERO_UP,
    )
    cache: str = option(
        "",
        "latents: folder on a local disk of each node, to which the latents are copied before training; empty: no copy",
    )

    def drops_whole_numbers(self, stratum: int) -> bool:
        """Whether `condition_dropout` of `stratum` samples is a whole number, to the rounding of a decimal fraction."""
        dropped = stratum * self.condition_dropout
        return abs(dropped - round(dropped)) < 1e-9 * max(stratum, 1)

    @property
    def dropped_per_stratum(self) -> int:
        """Conditions dropped in each stratum of `condition_dropout_stratum` samples; 0 without strata."""
        return round(self.condition_dropout_stratum * self.condition_dropout)


@dataclass(frozen=True)
class DiffusionConfig:
    """The training objective: rectified flow or DDPM."""

    objective: str = option("rf", "training objective: rectified flow (rf) or DDPM", ("rf", "ddpm"))
    time: str = option(
        "logit_normal", "rf: distribution from which the training time is sampled", ("logit_normal", "mode", "uniform")
    )
    logit_mean: float = option(0.0, "rf: mean of the logit of the time", within="(-inf, inf)")
    logit_std: float = option(1.0, "rf: standard deviation of the logit of the time", within=POSITIVE)
    # Above 2 / (pi - 2) or below -1 the map from uniform to mode time is not monotonic (arXiv 2403.03206, 3.1).
    mode_scale: float = option(1.29, "rf: scale of mode sampling; larger: more middle times", within="[-1, 1.7519]")
    shift: float = option(1.0, "rf: factor that shifts the times towards noise; 1: no shift", within=POSITIVE)
    shift_base: int = option(
        0,
        "rf: side of the latents at which the times need no shift; diffusion.shift is multiplied by the square root of"
        " how many times more pixels latents of model.input_size have; 0: only diffusion.shift",
        within=ZERO_UP,
    )


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled."""

    method: str = option(
        "euler",
        "sampling method, or one's own, see docs/library.md; unipc and dpm_solver++ need diffusers",
        SAMPLING_METHODS,
        accepts=extensions.SAMPLER.accepts,
    )
    steps: int = option(250, "number of sampling steps", within=ONE_UP)
    guidance: float = option(1.5, "classifier-free guidance scale; 1: no guidance", within=ZERO_UP)
    guidance_low: float = option(
        0.0, "lowest time at which guidance is applied; 0 is the image, 1 the noise", within="[0, 1]"
    )
    guidance_high: float = option(
        1.0, "highest time at which guidance is applied; 0 is the image, 1 the noise", within="[0, 1]"
    )
    batch: int = option(64, "number of images that a rank samples in one batch", within=ONE_UP)
    seed: int = option(0, "seed of the noise of sampled images", within=ZERO_UP)


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer, the schedule, checkpoints and limits of training."""

    steps: int = option(500_000, "length of the training, in optimizer steps", within=ONE_UP)
    global_batch: int = option(256, "number of images in an optimizer step, over all ranks", within=ONE_UP)
    accumulation: int = option(1, "number of micro-batches in an optimizer step (gradient accumulation)", within=ONE_UP)
    lr: float = option(1e-4, "peak learning rate", within=POSITIVE)
    beta1: float = option(0.9, "AdamW: decay of the first moment", within="[0, 1)")
    beta2: float = option(0.999, "AdamW: decay of the second moment", within="[0, 1)")
    eps: float = option(1e-8, "AdamW: epsilon", within=POSITIVE)
    weight_decay: float = option(0.0, "AdamW and Muon: weight decay", within=ZERO_UP)
    warmup: int = option(
        0,
        "length of the linear warm-up of the learning rate, in steps; a preset's is at most a tenth of train.steps",
        within=ZERO_UP,
    )
    schedule: str = option(
        "constant",
        "course of the learning rate after the warm-up: constant; a cosine to train.min_lr; or constant until"
        " train.decay_start and then a decay to train.min_lr (warm-up, stable, decay: wsd)",
        ("constant", "cosine", "wsd"),
    )
    decay_start: float = option(
        0.8, "wsd: where the decay begins, as a step, or below 1 as a fraction of train.steps", within=POSITIVE
    )
    decay_shape: str = option(
        "1-sqrt",
        "wsd: course of the decay, at a share p of it: 1 - p (linear) or 1 - sqrt(p) (1-sqrt)",
        ("linear", "1-sqrt"),
    )
    min_lr: float = option(0.0, "learning rate at the end of the schedules cosine and wsd", within=ZERO_UP)
    max_grad_norm: float = option(
        0.5,
        "largest gradient norm; larger gradients are scaled down to it; 0: no clipping; with Muon it is the norm of"
        " AdamW's parameters, which alone are clipped",
        within=ZERO_UP,
    )
    ema_decay: float | tuple[float, ...] = option(
        0.9999,
        "decay of the averaged weights (EMA) at each step; a list such as [0.9999,0.999] keeps an average for each, and"
        " the first is the default of previews and commands",
        within="[0, 1)",
        kind=Numbers,
    )
    ema_warmup: bool = option(
        False, "use decay min(ema_decay, (1 + t) / (10 + t)) at update t; fixed at the first start of a run"
    )
    optimizer: str = option(
        "adamw",
        "optimizer: AdamW, or Muon for the matrices of attention, MLPs and experts and AdamW for all other parameters",
        ("adamw", "muon"),
    )
    muon_lr: float = option(
        0.0,
        "Muon: peak learning rate, which follows the same schedule as train.lr, that of AdamW; 0: train.lr",
        within=ZERO_UP,
    )
    muon_momentum: float = option(0.95, "Muon: decay of the momentum", within="[0, 1)")
    muon_nesterov: bool = option(True, "Muon: Nesterov's momentum")
    muon_steps: int = option(
        5, "Muon: number of Newton-Schulz steps by which a matrix is orthogonalised", within="[1, 100]"
    )
    muon_scale: str = option(
        "match_rms_adamw",
        "Muon: factor of an update of m outputs and n inputs: 0.2 * sqrt(max(m, n)), which suits learning rates of"
        " AdamW (match_rms_adamw), or sqrt(max(1, m / n)) (original)",
        ("match_rms_adamw", "original"),
    )
    adamw_backend: str = option(
        "torch",
        "AdamW: implementation of the fused update; 'fused' compiles one of its own, which includes clipping, averaged"
        " weights and the cast to the parameters",
        ("torch", "apex", "deepspeed", "fused"),
    )
    deepspeed: str = option(
        "bf16_zero1", "DeepSpeed configuration: the name of a file in ds_configs, or a path to a .json file"
    )
    gradient_reduction: str = option(
        "auto",
        "how ZeRO stages 1 and 2 sum gradients over the ranks: each rank gets the sum of its shard (reduce_scatter), or"
        " DeepSpeed all-reduces everything, twice the bytes (all_reduce); auto: reduce_scatter, but all_reduce with"
        " Muon and with offloading. Other stages have one way only",
        ("auto", "reduce_scatter", "all_reduce"),
    )
    compile: bool = option(False, "compile the blocks with torch.compile; the first step then takes minutes")
    seed: int = option(0, "seed of the initial weights", within=ZERO_UP)
    init_from: str = option(
        "",
        "start a new run from the weights of a checkpoint of any format (docs/finetune.md): a run, a step, a .pth, a"
        " .safetensors, a folder of diffusers or DeepSpeed; empty: from train.seed. A run that resumes ignores it",
    )
    init_weights: str = option(
        "ema",
        "init_from: the weights to take: averaged (ema, or ema=DECAY of several), or as trained (master)",
        ("ema", "master"),
        accepts=lambda value: value.startswith("ema="),
        form="ema=DECAY",
    )
    init_classes: str = option(
        "same",
        "init_from: the source's class of each class: the same number (same), none (new), or a YAML or JSON file of"
        " new: old; a class without one starts as the mean of the old ones",
        ("same", "new"),
        accepts=class_groups.is_file,
        form="FILE.yaml",
    )
    timeout: float = option(
        600.0, "longest duration of a collective, in seconds, after which the run ends with an error", within=POSITIVE
    )
    step_timeout: float = option(
        300.0,
        "longest duration of a section of a step, in seconds, after which the run reports a hang and ends",
        within=POSITIVE,
    )
    log_every: int = option(10, "number of steps between log lines and metrics", within=ONE_UP)
    routing_trace_every: int = option(
        0,
        "number of steps between records of the rows that each expert gets from each rank, in routing_trace.jsonl"
        " (docs/routing.md); 0: none. A model without routed experts records nothing",
        within=ZERO_UP,
    )
    save_every: int = option(
        5000, "number of steps between checkpoints; 0: only the last step is saved", within=ZERO_UP
    )
    save_minutes: float = option(
        0.0,
        "number of minutes between checkpoints, in addition to train.save_every; 0: only by train.save_every",
        within=ZERO_UP,
    )
    snapshot_every: int = option(
        0,
        "number of steps between snapshots, which hold only the averaged weights and are all kept; 0: none",
        within=ZERO_UP,
    )
    keep_last: int = option(2, "number of newest checkpoints to keep; older ones are removed", within=ONE_UP)
    keep_every: int = option(
        0, "also keep each checkpoint whose step is a multiple of this number of steps; 0: none", within=ZERO_UP
    )
    save_in_background: bool = option(
        True,
        "train while a checkpoint is written, from a copy in host memory; false: without a copy, training waits",
    )
    max_failed_saves: int = option(3, "number of failed saves in a row that ends the run", within=ONE_UP)
    sample_every: int = option(0, "number of steps between pictures of samples; 0: none", within=ZERO_UP)
    max_bad_steps: int = option(3, "number of skipped updates in a row that ends the run", within=ONE_UP)
    spike_factor: float = option(
        0.0,
        "skip an update whose gradient norm exceeds this multiple of the median of recent norms; 0: skip none",
        within=ZERO_UP,
    )
    wandb: str = option(
        "",
        "project of Weights & Biases, or ENTITY/PROJECT, to which rank 0 also sends the metrics; empty: none. The"
        " environment variable WANDB_MODE=offline works without a network",
    )
    profile: str = option(
        "", "steps FROM:TO, such as 100:102, of which each rank writes a trace and a memory snapshot; empty: none"
    )

    @property
    def profiled_steps(self) -> range:
        """The steps of `profile`, numbered from 1; empty without it, and for another form, which a rule refuses."""
        match = re.fullmatch(r"([1-9][0-9]{0,11}):([1-9][0-9]{0,11})", self.profile)
        return range(int(match[1]), int(match[2]) + 1) if match else range(0)

    @property
    def decay_start_step(self) -> int:
        """The number of steps before the decay of the schedule wsd."""
        return round(self.decay_start * self.steps) if self.decay_start < 1 else int(self.decay_start)

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of `ema_decay`, one or more; the first is that of previews and the default of commands."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)


@dataclass(frozen=True)
class Layout:
    """The sizes of the process groups of a run, the images of a rank's micro-batch, and where experts are.

    `placed_slots`: for each block with routed experts, how many a rank stores; empty for consecutive experts.
    `shard_ranks`: consecutive ranks over which ZeRO stages 1 and 2 divide optimizer states; 0: all.
    `replicas`: for each of these blocks, copies on the rank with the most, and on all ranks of an ep group together;
    empty without copies.
    """

    world: int
    tp: int
    ep: int
    dp: int
    edp: int
    etp: int
    micro_batch: int
    placed_slots: tuple[int, ...] = ()
    shard_ranks: int = 0
    replicas: tuple[tuple[int, int], ...] = ()

    @property
    def dp_shard(self) -> int:
        """The data-parallel ranks over which ZeRO divides what is not of routed experts."""
        return self.shard_ranks // self.tp if self.shard_ranks else self.dp

    @property
    def edp_shard(self) -> int:
        """The expert-data-parallel ranks over which ZeRO divides what is of routed experts."""
        return max(self.shard_ranks // (self.ep * self.etp), 1) if self.shard_ranks else self.edp

    def expert_slots(self, model: ModelConfig) -> tuple[int, ...]:
        """How many experts a rank stores, spare slots among them, for each block with routed experts."""
        return self.placed_slots or (smallest_slots(model.num_experts, self.ep),) * len(model.moe_blocks)

    def dispatch_slots(self, model: ModelConfig) -> tuple[int, ...]:
        """The same with copies of experts of other ranks: experts to which a rank can get rows."""
        slots = self.expert_slots(model)
        return (
            tuple(n + copies for n, (copies, _) in zip(slots, self.replicas, strict=True)) if self.replicas else slots
        )


@dataclass(frozen=True)
class Config:
    """All options of a run; made by `resolve`."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()

    @property
    def time_shift(self) -> float:
        """The shift of times in training and sampling: `diffusion.shift`, and sqrt(m / n) for m pixels instead of n.

        Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2.
        """
        base = self.diffusion.shift_base
        return self.diffusion.shift * (math.sqrt(self.model.input_size**2 / base**2) if base else 1.0)

    def layout(self, world: int) -> Layout:
        """The sizes of the process groups over `world` ranks. Raises ConfigError where a size does not divide."""
        if problems := sentences(self, world_rules(self, world)):
            raise ConfigError(problems)
        tp, ep = self.parallel.tp, self.parallel.ep
        etp = tp if self.parallel.expert_tp else 1
        dp = world // tp
        micro_batch = self.train.global_batch // (dp * self.train.accumulation)
        placements = self.placements_in_file().values()
        slots = tuple(placement.slots for placement in placements)
        replicas = tuple((placement.replica_slots, placement.copies) for placement in placements)
        if not any(copies for copies, _ in replicas):
            replicas = ()
        if isinstance(self.parallel.replicas, int) and self.parallel.replicas and ep > 1:
            most = min(self.parallel.replicas, self.model.num_experts - self.model.num_experts // ep)
            replicas = ((most, most * ep),) * len(self.model.moe_blocks)
        shards = self.parallel.shard_ranks
        return Layout(world, tp, ep, dp, world // (ep * etp), etp, micro_batch, slots, shards, replicas)

    @property
    def copies_in_words(self) -> str:
        """The option that asks for copies of experts."""
        if self.parallel.replicas:
            return f"parallel.replicas = {self.parallel.replicas}"
        return f"replicas in the file parallel.placement = {self.parallel.placement}"

    @property
    def may_have_replicas(self) -> bool:
        """Whether ranks can have copies of experts; also false for a file of placements that cannot be read."""
        if self.parallel.ep == 1:
            return False
        return bool(self.parallel.replicas) or any(p.replicas for p in _read_placements(self)[0].values())

    def placements_in_file(self) -> Placements:
        """The placements in the file `parallel.placement`; empty if it is none. Raises ConfigError for a wrong file."""
        placements, problems = _read_placements(self)
        if problems:
            raise ConfigError(sentences(self, [(PLACEMENT_KEYS, problem) for problem in problems]))
        return placements


def ratio_of(width: int, size: int) -> float:
    """The ratio for which int(size * ratio) is `width`. The plain quotient may round to a smaller width."""
    ratio = width / size
    return ratio if int(size * ratio) == width else math.nextafter(ratio, math.inf)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dicts and lists, section by section."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        for section, values in asdict(config).items()
    }


# ---- rules, and their sentences

# The dotted names of the fields concerned, the violating field first; the requirement, with the remedy.
Rule = tuple[tuple[str, ...], str]


def sentences(config: Config, broken: Iterable[Rule], refused: Iterable[str] = ()) -> list[str]:
    """A sentence for each broken rule, with the violating value; rules that concern a refused field are left out."""
    refused = set(refused)
    return [f"{keys[0]} = {_plain_value(config, keys[0])!r}: {rule}" for keys, rule in broken if not refused & {*keys}]


def _plain_value(config: Config, key: str) -> Any:
    """The value of one option as `to_dict` gives it, without a copy of all options: plans check many layouts."""
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return list(value) if isinstance(value, tuple) else value


REPLICAS_KEYS = ("parallel.replicas", "parallel.placement")
PLACEMENT_KEYS = ("parallel.placement", "parallel.ep", "model.num_experts", "model.router", "model.moe_every")


def _read_placements(config: Config) -> tuple[Placements, list[str]]:
    """The placements in the file `parallel.placement`, none if it is no file, and what is wrong with them."""
    if not is_file(config.parallel.placement):
        return {}, []
    path, model = Path(config.parallel.placement), config.model
    if not model.moe_blocks:
        return {}, [f"must be {CONTIGUOUS} for a model without routed experts"]
    return read_placements(path, model.moe_blocks, model.num_experts, config.parallel.ep)


def world_rules(config: Config, world: int) -> Iterator[Rule]:
    """The broken rules on the layout over `world` ranks."""
    yield from ((PLACEMENT_KEYS, problem) for problem in _read_placements(config)[1])
    if config.model.capacity_factor and config.may_have_replicas:
        rule = (
            f"must be 0 with copies of experts ({config.copies_in_words}): a capacity is a fixed number of rows of each"
            " expert, and copies divide what each step brings"
        )
        yield ("model.capacity_factor", *REPLICAS_KEYS), rule
    if config.train.compile and config.may_have_replicas:
        rule = (
            f"must be false with copies of experts ({config.copies_in_words}): their weights are messages within what"
            " is compiled as one graph; train without compilation or without copies"
        )
        yield ("train.compile", *REPLICAS_KEYS), rule
    tp, ep, train = config.parallel.tp, config.parallel.ep, config.train
    if world < 1:
        yield ("parallel.tp",), f"needs at least 1 rank, not {world}"
        return
    if world % tp:
        yield ("parallel.tp",), f"must divide the {world} ranks; nearest: {nearest_divisors(tp, world)}"
    if world % ep:
        yield ("parallel.ep",), f"must divide the {world} ranks; nearest: {nearest_divisors(ep, world)}"
    elif config.parallel.expert_tp and world % tp == 0 and world // tp % ep:
        near = nearest_divisors(ep, world // tp)
        rule = f"must divide the {world} ranks / tp = {world // tp} with parallel.expert_tp; nearest: {near}"
        yield ("parallel.ep", "parallel.tp", "parallel.expert_tp"), rule
    yield from _shard_rules(config, world)
    dp = world // tp
    if world % tp == 0 and train.global_batch % (dp * train.accumulation):
        unit = dp * train.accumulation
        near = nearest_multiples(train.global_batch, unit)
        rule = f"must be a multiple of {dp} data ranks * {train.accumulation} micro-batches; nearest: {near}"
        yield ("train.global_batch", "train.accumulation", "parallel.tp"), rule
    elif world % tp == 0:
        yield from _stratum_rules(config, train.global_batch // (dp * train.accumulation))


def _shard_rules(config: Config, world: int) -> Iterator[Rule]:
    """The broken rule on the ranks over which optimizer states are divided."""
    p, ranks = config.parallel, config.parallel.shard_ranks
    experts = p.ep * (p.tp if p.expert_tp else 1)

    def divides(n: int) -> bool:
        return world % n == 0 and n % p.tp == 0 and (n <= experts or n % experts == 0)

    if ranks and not divides(ranks):
        valid = [n for n in range(1, world + 1) if divides(n)]
        remedy = f"use {' or '.join(map(str, valid))}, or 0 for all ranks" if valid else "use 0, for all ranks"
        of_experts = f", and be a multiple of the {experts} ranks that hold all experts or at most as many"
        rule = f"must divide the {world} ranks and be a multiple of tp = {p.tp}{of_experts if experts > 1 else ''}"
        yield ("parallel.shard_ranks", "parallel.tp", "parallel.ep", "parallel.expert_tp"), f"{rule}; {remedy}"


def _stratum_rules(config: Config, micro_batch: int) -> Iterator[Rule]:
    """The broken rule on the strata of dropped conditions in micro-batches of `micro_batch` images."""
    stratum, rate = config.data.condition_dropout_stratum, config.data.condition_dropout
    if not stratum or micro_batch % stratum == 0:
        return
    divisors = [n for n in range(1, micro_batch + 1) if micro_batch % n == 0]
    if fitting := [n for n in divisors if config.data.drops_whole_numbers(n)]:
        remedy = f"use {' or '.join(map(str, fitting))}, or 0 for independent dropout"
    elif micro_batch > 1:
        dropped = min(max(round(micro_batch * rate), 1), micro_batch - 1)
        remedy = (
            f"use {micro_batch} with data.condition_dropout={dropped / micro_batch!r}, or 0 for independent dropout"
        )
    else:
        remedy = "use 0 for independent dropout, or a larger train.global_batch"
    fields = ("data.condition_dropout_stratum", "train.global_batch", "train.accumulation", "parallel.tp")
    yield fields, f"must divide the micro-batch of a rank, {micro_batch} images; {remedy}"

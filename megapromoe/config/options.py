"""The options of a run: every section and key, with its default, its meaning and the values it may have.

Frozen and typed, and without torch. How they are read is `resolve.py`, what they must not be together `rules.py`; the
layout over ranks, with its rules, stands here because a config knows its own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megapromoe.config import class_groups
from megapromoe.config.reader import ONE_UP, POSITIVE, ZERO_UP, nearest_divisors, nearest_multiples, option
from megapromoe.errors import ExitCode, Violations

ROUTERS = ("dense", "promoe", "promoe_ec", "promoe_linear", "classification", "kmeans", "tc", "ec", "diffmoe")
PROMOE_ROUTERS = ("promoe", "promoe_ec")  # with prototypes
GATE_ROUTERS = ("promoe_linear", "tc", "ec", "diffmoe")  # a linear gate
GUIDED_ROUTERS = ("classification", "kmeans")
# Null images apart, a shared expert beside the routed ones.
TWO_STEP_ROUTERS = (*PROMOE_ROUTERS, "promoe_linear", *GUIDED_ROUTERS)
PUBLISHED_ROUTERS = ("dense", *PROMOE_ROUTERS, "tc", "ec", "diffmoe")
BALANCED_ROUTERS = ("promoe", "promoe_linear", "tc", "classification")  # where a balance loss can be asked for
EXPERT_CHOICE_ROUTERS = ("promoe_ec", "ec", "diffmoe")
TIME_INPUTS = ("dit", "repa", "sit")
UNSET = "unset"  # of data.source: nothing is chosen, and training is refused
SOURCES = ("digits", "fashion_mnist", "latents", "synthetic", UNSET)
NO_DATA = (
    "nothing is chosen to train on: give data.source=latents data.path=DIR (latents of your images, docs/data.md), or"
    " data.source=synthetic (random latents, for timing)"
)
FIXED_SIZES = {"digits": 8, "fashion_mnist": 32}  # sources of one size, all of 1 channel and 10 classes


class ConfigError(Violations):
    """A configuration that cannot run; `violations` lists every reason, the message holds them all."""

    subject = "the configuration"
    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # every rank reads the same options


@dataclass(frozen=True)
class ModelConfig:
    """The network: DiT's sizes, the router and the experts."""

    router: str = option(
        "promoe", "who routes: dense DiT, ProMoE and its variants, classes or k-means, TC, EC, DiffMoE", ROUTERS
    )
    hidden_size: int = option(384, "channels D of a token", within=ONE_UP)
    depth: int = option(12, "transformer blocks L", within=ONE_UP)
    heads: int = option(6, "attention heads", within=ONE_UP)
    patch_size: int = option(2, "side of a patch, in pixels of the input", within=ONE_UP)
    input_size: int = option(32, "side of the input, in pixels (of latents, where it is latents)", within=ONE_UP)
    in_channels: int = option(4, "channels C of the input", within=ONE_UP)
    num_classes: int = option(1000, "classes; the null class is the one after the last", within=ONE_UP)
    mlp_ratio: float = option(4.0, "width of a dense MLP over hidden_size", within=POSITIVE)
    qk_norm: bool = option(False, "LayerNorm on the queries and keys of each head")
    learn_sigma: bool = option(True, "double the output channels (DDPM's learned variance)")
    time_input: str = option(
        "dit", "what is embedded of model time t in [0, 1000]: dit t, repa t/1000, sit 1 - t/1000", TIME_INPUTS
    )
    time_frequency_shift: int = option(
        0, "time embedding: frequencies 10000^(-i / (128 - shift)); 1 as in diffusers", within="[0, 1]"
    )
    mlp_norm_eps: float = option(1e-6, "epsilon of the LayerNorm before an MLP or MoE; diffusers 1e-5", within=POSITIVE)
    num_experts: int = option(12, "routed experts E of an MoE block", within=ONE_UP)
    # Of a token under token choice; under expert choice each expert takes int(S / E * top_k) tokens an image.
    top_k: int = option(1, "experts K of a token; by expert choice: of a token on average", within=ONE_UP)
    expert_ratio: float = option(2.0, "width F of an expert over hidden_size", within=POSITIVE)
    expert_width: int = option(
        0, "width F of an expert itself; 0: hidden_size * expert_ratio, rounded down", within=ZERO_UP
    )
    moe_every: int = option(2, "block i is MoE when (i+1) % moe_every == 0: 2 odd, 1 all", within=ONE_UP)
    shared_expert: bool = option(True, "ProMoE, guided: one expert that every token visits")
    num_shared_experts: int = option(1, "with shared_expert: how many; their outputs are summed", within=ONE_UP)
    shared_expert_width: int = option(0, "width of a shared expert; 0: that of the other experts", within=ZERO_UP)
    unconditional_expert: bool = option(True, "ProMoE, guided: one expert for all tokens of null-class images")
    num_unconditional_experts: int = option(
        1, "with unconditional_expert: how many; their outputs are summed", within=ONE_UP
    )
    gate: str = option(
        "identity", "ProMoE, kmeans: an expert's weight from its score", ("identity", "sigmoid", "softmax")
    )
    rcl_weight: float = option(1.0, "ProMoE: weight of the routing contrastive loss (RCL)", within=ZERO_UP)
    rcl_temperature: float = option(0.07, "ProMoE: temperature of the RCL", within=POSITIVE)
    rcl_tokens: str = option("all", "RCL, top_k > 1: a token counts for all its experts or one", ("all", "first"))
    classification_weight: float = option(1.0, "classification: weight of the super-class loss", within=ZERO_UP)
    superclasses: str = option(
        class_groups.CONTIGUOUS, "classification: contiguous, modulo, a YAML or JSON file, or 0,0,1,... for each class"
    )
    kmeans_decay: float = option(0.9, "kmeans: decay of the running centroids; 0 as published", within="[0, 1)")
    capacity_factor: float = option(
        0.0, "room for the rows of an expert, over an even share; 0: for all rows, none is dropped", within=ZERO_UP
    )
    batch_scope: str = option("global", "batch statistics over all data ranks or one", ("global", "rank"))
    balance_weight: float = option(0.0, "weight of the balance loss; 0 turns it off", within=ZERO_UP)
    balance_form: str = option("batch", "balance over the batch or each image", ("batch", "sequence"))
    capacity_weight: float = option(0.01, "DiffMoE: weight of the capacity predictor's loss", within=ZERO_UP)
    capacity_decay: float = option(0.95, "DiffMoE: decay of the running thresholds", within="[0, 1)")

    @property
    def tokens(self) -> int:
        """Tokens S of an image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of a dense MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def moe_width(self) -> int:
        """Hidden width F of one routed or unconditional expert."""
        return self.expert_width or int(self.hidden_size * self.expert_ratio)

    @property
    def shared_width(self) -> int:
        """Hidden width of one shared expert."""
        return self.shared_expert_width or self.moe_width

    @property
    def shared_experts(self) -> int:
        """Shared experts of an MoE layer; none without the two-step router."""
        return self.num_shared_experts if self.router in TWO_STEP_ROUTERS and self.shared_expert else 0

    @property
    def unconditional_experts(self) -> int:
        """Experts that all tokens of null-class images visit; none without the two-step router."""
        return self.num_unconditional_experts if self.router in TWO_STEP_ROUTERS and self.unconditional_expert else 0

    @property
    def out_channels(self) -> int:
        """Channels of the raw output: C, or 2C with `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def tokens_per_expert(self, tokens: int) -> int:
        """How many of `tokens` tokens each expert takes under expert choice: int(tokens / E * top_k).

        At least one of any for ProMoE, as published, and for DiffMoE, whose thresholds follow the last one taken. EC as
        published takes none, and is refused where that is so.
        """
        count = int(tokens / self.num_experts * self.top_k)
        return count if self.router == "ec" else max(count, min(tokens, 1))

    @property
    def expert_capacity(self) -> int:
        """Tokens an expert takes from one image under expert choice."""
        return self.tokens_per_expert(self.tokens)

    @property
    def rows_per_image(self) -> int:
        """Rows that an image's tokens send to routed experts in one MoE layer; DiffMoE: on average over a large batch.

        Where DiffMoE's average is no whole number for each expert, it counts as if it chose per image.
        """
        if self.router == "diffmoe" and self.tokens * self.top_k < self.num_experts:
            return self.tokens * self.top_k
        if self.router in EXPERT_CHOICE_ROUTERS:
            return self.num_experts * self.expert_capacity
        return self.tokens * self.top_k

    @property
    def images_depend_on_batch(self) -> bool:
        """Whether the output for an image depends on the other images of a call, outside of training too.

        DiffMoE chooses among the tokens of a whole batch; with limited room for rows, which rows are dropped depends on
        the other rows.
        """
        return self.router == "diffmoe" or (self.router != "dense" and self.capacity_factor > 0)

    @property
    def superclass_of(self) -> tuple[int, ...]:
        """The super-class, and so the expert, of each class under router=classification."""
        return class_groups.superclass_table(self.superclasses, self.num_classes, self.num_experts)

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks whose MLP is an MoE, in order; none for the dense DiT."""
        if self.router == "dense":
            return ()
        return tuple(i for i in range(self.depth) if (i + 1) % self.moe_every == 0)


@dataclass(frozen=True)
class ParallelConfig:
    """How the model lies over the ranks."""

    tp: int = option(1, "tensor parallel: heads and MLP widths split over so many ranks", within=ONE_UP)
    ep: int = option(1, "expert parallel: routed experts split over so many ranks", within=ONE_UP)
    expert_tp: bool = option(False, "also split each routed expert's width over tp")
    recompute: str = option(
        "none",
        "activations made again in the backward pass: none, of MoE layers, of blocks but routers, all (least memory)",
        ("none", "moe", "blocks", "all"),
    )


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    source: str = option("digits", "what to train on; latents: see docs/data.md; unset: to be chosen", SOURCES)
    path: str = option("", "folder of the latents, or of fashion_mnist (empty: of its Debian package)")
    test_path: str = option("", "folder of latents of images that are not trained on, for evaluation")
    size: int = option(65536, "images of the synthetic source", within=ONE_UP)
    label_drop: float = option(0.1, "share of the labels replaced by the null class", within="[0, 1)")
    flip: bool = option(False, "mirror half of the images")
    seed: int = option(0, "seed of the stream: order, noise, time, flips, label drop", within=ZERO_UP)
    workers: int = option(1, "threads of a rank that make batches, and batches made ahead", within="[1, 256]")
    verify: bool = option(True, "latents: compare each record with its checksum when it is read")
    max_bad: int = option(
        100, "latents: damaged samples passed over, of all ranks, before the run ends", within=ZERO_UP
    )
    cache: str = option("", "latents: folder on a node's own disk to copy the shards to")


@dataclass(frozen=True)
class DiffusionConfig:
    """What is learnt: rectified flow or DDPM."""

    objective: str = option("rf", "rectified flow or DDPM", ("rf", "ddpm"))
    time: str = option("logit_normal", "rf: distribution of the time", ("logit_normal", "mode", "uniform"))
    logit_mean: float = option(0.0, "rf: mean of the logit of the time", within="(-inf, inf)")
    logit_std: float = option(1.0, "rf: standard deviation of the logit of the time", within=POSITIVE)
    # Past 2 / (pi - 2) or -1 the map from uniform to mode time is not monotonic (arXiv 2403.03206, 3.1).
    mode_scale: float = option(1.29, "rf: weight of the middle times in mode sampling", within="[-1, 1.7519]")
    shift: float = option(1.0, "rf: shift of the times towards noise; 1 is none", within=POSITIVE)


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn."""

    method: str = option("euler", "sampler", ("euler", "heun", "ddpm", "ddim"))
    steps: int = option(250, "steps of the sampler", within=ONE_UP)
    guidance: float = option(1.5, "classifier-free guidance scale; 1 is none", within=ZERO_UP)
    guidance_low: float = option(0.0, "lowest normalised time at which guidance acts", within="[0, 1]")
    guidance_high: float = option(1.0, "highest normalised time at which guidance acts", within="[0, 1]")
    batch: int = option(64, "images a rank draws at once", within=ONE_UP)
    seed: int = option(0, "seed of the images", within=ZERO_UP)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    steps: int = option(500_000, "optimizer steps", within=ONE_UP)
    global_batch: int = option(256, "images of an optimizer step, over all ranks", within=ONE_UP)
    accumulation: int = option(1, "micro-batches of an optimizer step", within=ONE_UP)
    lr: float = option(1e-4, "peak learning rate", within=POSITIVE)
    beta1: float = option(0.9, "AdamW: decay of the first moment", within="[0, 1)")
    beta2: float = option(0.999, "AdamW: decay of the second moment", within="[0, 1)")
    eps: float = option(1e-8, "AdamW: epsilon", within=POSITIVE)
    weight_decay: float = option(0.0, "AdamW: weight decay", within=ZERO_UP)
    warmup: int = option(0, "steps of linear warm-up; a preset's own is at most a tenth of train.steps", within=ZERO_UP)
    schedule: str = option("constant", "learning rate after the warm-up", ("constant", "cosine"))
    min_lr: float = option(0.0, "learning rate at the end of the cosine", within=ZERO_UP)
    clip: float = option(0.5, "largest gradient norm; 0 turns clipping off", within=ZERO_UP)
    ema: float = option(0.9999, "decay of the averaged weights", within="[0, 1)")
    ema_warmup: bool = option(
        False, "update t averages with decay min(ema, (1 + t) / (10 + t)); decided at the first start of a run"
    )
    optimizer: str = option("torch", "whose fused AdamW", ("torch", "apex", "deepspeed"))
    deepspeed: str = option("bf16_zero1", "name of a file in ds_configs, or a path to a .json file")
    compile: bool = option(False, "torch.compile the dense layers; the first step then takes minutes")
    seed: int = option(0, "seed of the initial weights", within=ZERO_UP)
    timeout: float = option(600.0, "seconds before a hanging collective ends the run", within=POSITIVE)
    step_timeout: float = option(
        300.0, "seconds in one section of a step after which a hang is named and ends the run", within=POSITIVE
    )
    log_every: int = option(10, "steps between metrics", within=ONE_UP)
    save_every: int = option(5000, "steps between checkpoints; 0 saves only the last", within=ZERO_UP)
    save_minutes: float = option(
        0.0,
        "also save a checkpoint so many minutes after the last one began, by rank 0's clock; 0: by steps alone",
        within=ZERO_UP,
    )
    snapshot_every: int = option(
        0, "steps between snapshots of the averaged weights alone, which are all kept; 0 saves none", within=ZERO_UP
    )
    keep: int = option(2, "newest checkpoints kept", within=ONE_UP)
    keep_every: int = option(0, "also keep checkpoints of steps that this divides; 0 keeps none", within=ZERO_UP)
    max_failed_saves: int = option(3, "failed saves in a row that end the run", within=ONE_UP)
    sample_every: int = option(0, "steps between sample grids; 0 draws none", within=ZERO_UP)
    max_bad_steps: int = option(3, "skipped updates in a row that end the run", within=ONE_UP)
    spike: float = option(
        0.0, "skip updates whose gradient norm exceeds this many recent medians; 0 skips none", within=ZERO_UP
    )


@dataclass(frozen=True)
class Layout:
    """The sizes of the process groups of a run, and the images of a rank's micro-batch."""

    world: int
    tp: int
    ep: int
    dp: int
    edp: int
    etp: int
    micro_batch: int


@dataclass(frozen=True)
class Config:
    """Everything a run is told; made by `resolve`."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()

    def layout(self, world: int) -> Layout:
        """The process groups over `world` ranks; raises ConfigError where they do not come out even."""
        if problems := sentences(self, world_rules(self, world)):
            raise ConfigError(problems)
        tp, ep = self.parallel.tp, self.parallel.ep
        etp = tp if self.parallel.expert_tp else 1
        dp = world // tp
        micro_batch = self.train.global_batch // (dp * self.train.accumulation)
        return Layout(world, tp, ep, dp, world // (ep * etp), etp, micro_batch)


def ratio_of(width: int, size: int) -> float:
    """The ratio whose width, int(size · ratio), is `width`: division alone may round below it."""
    ratio = width / size
    return ratio if int(size * ratio) == width else math.nextafter(ratio, math.inf)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dicts, section by section."""
    return asdict(config)


# ---- rules, and how they are told

# The fields it is about, the one to blame first; what it demands, with the remedy.
Rule = tuple[tuple[str, ...], str]


def sentences(config: Config, broken: Iterable[Rule], refused: Iterable[str] = ()) -> list[str]:
    """The broken rules with the value of the field to blame, but none that speaks of a refused field."""
    values = {f"{section}.{name}": v for section, s in to_dict(config).items() for name, v in s.items()}
    return [f"{keys[0]} = {values[keys[0]]!r}: {rule}" for keys, rule in broken if not set(keys) & set(refused)]


def world_rules(config: Config, world: int) -> Iterator[Rule]:
    """The rules on the layout over `world` ranks, where they are broken."""
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
    dp = world // tp
    if world % tp == 0 and train.global_batch % (dp * train.accumulation):
        unit = dp * train.accumulation
        near = nearest_multiples(train.global_batch, unit)
        rule = f"must be a multiple of {dp} data ranks * {train.accumulation} micro-batches; nearest: {near}"
        yield ("train.global_batch", "train.accumulation", "parallel.tp"), rule

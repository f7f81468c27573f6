"""The options of a run: every section and key, with its default, its meaning and the values it may have.

The classes are frozen and typed, and the module imports no torch. `resolve.py` reads the options, `rules.py` holds the
rules between them. The layout over ranks and its rules are defined in this module because `Config.layout` needs them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megapromoe.config import class_groups, extensions
from megapromoe.config.reader import ONE_UP, POSITIVE, ZERO_UP, Numbers, nearest_divisors, nearest_multiples, option
from megapromoe.errors import ExitCode, Violations

ROUTERS = ("dense", "promoe", "promoe_ec", "promoe_linear", "classification", "kmeans", "tc", "ec", "diffmoe")
PROMOE_ROUTERS = ("promoe", "promoe_ec")  # routers with prototypes
GATE_ROUTERS = ("promoe_linear", "tc", "ec", "diffmoe")  # routers with a linear gate
GUIDED_ROUTERS = ("classification", "kmeans")
# Two-step routing: null images go to the unconditional expert, and a shared expert complements the routed ones.
TWO_STEP_ROUTERS = (*PROMOE_ROUTERS, "promoe_linear", *GUIDED_ROUTERS)
PUBLISHED_ROUTERS = ("dense", *PROMOE_ROUTERS, "tc", "ec", "diffmoe")
BALANCED_ROUTERS = ("promoe", "promoe_linear", "tc", "classification")  # routers that can have a balance loss
EXPERT_CHOICE_ROUTERS = ("promoe_ec", "ec", "diffmoe")
SAMPLING_METHODS = ("euler", "heun", "ddpm", "ddim")
TIME_INPUTS = ("dit", "repa", "sit")
ACTIVATIONS = ("gelu", "swiglu")
CONDITIONS = ("class", "text")
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
class ModelConfig:
    """The network: DiT's sizes, the router and the experts."""

    router: str = option(
        "promoe",
        "how experts are chosen: dense has none; ProMoE by token choice (promoe) or expert choice (promoe_ec), without"
        " prototypes (promoe_linear), by classes or by k-means; tc, ec and diffmoe are baselines; or one's own, see"
        " docs/library.md",
        ROUTERS,
        accepts=extensions.ROUTER.accepts,
    )
    hidden_size: int = option(384, "width D of the tokens, in channels", within=ONE_UP)
    depth: int = option(12, "number L of transformer blocks", within=ONE_UP)
    heads: int = option(6, "number of attention heads in each block", within=ONE_UP)
    patch_size: int = option(2, "side of a patch, in pixels of the input (latent pixels for latents)", within=ONE_UP)
    input_size: int = option(
        32, "side of the input, in pixels (latent pixels for latents, 8 image pixels each)", within=ONE_UP
    )
    in_channels: int = option(4, "number C of input channels", within=ONE_UP)
    condition: str = option(
        "class", "what an image is generated from: a class, or a text whose tokens take part in attention", CONDITIONS
    )
    num_classes: int = option(1000, "number of classes; the null class has the next label, num_classes", within=ONE_UP)
    text_width: int = option(0, "condition=text: width of a text feature, in channels", within=ZERO_UP)
    text_tokens: int = option(0, "condition=text: length of the longest text, in tokens", within=ZERO_UP)
    text_ffn: int = option(
        0,
        "condition=text: width of an MLP of the text tokens in each block but the last, in channels; 0: none",
        within=ZERO_UP,
    )
    mlp_ratio: float = option(4.0, "width of a dense MLP, as a multiple of hidden_size", within=POSITIVE)
    activation: str = option(
        "gelu",
        "hidden layer of MLPs and experts: gelu, one projection to the width and a tanh-GELU; swiglu, two projections"
        " to the width, of which one passes a SiLU and gates the other",
        ACTIVATIONS,
    )
    norm: str = option(
        "layer", "normalisation of the tokens in blocks and final layer: LayerNorm or RMSNorm", ("layer", "rms")
    )
    qk_norm: str = option(
        "none",
        "normalisation of the queries and keys of each head: none, LayerNorm or RMSNorm",
        ("none", "layer", "rms"),
    )
    positions: str = option(
        "sincos",
        "positions of tokens: sincos, a fixed table that is added to the tokens; rope, rotations of the queries and"
        " keys of each head by row and column",
        ("sincos", "rope"),
    )
    modulation: str = option(
        "block",
        "adaLN: a linear layer in each block (block), or one for all blocks (shared) with a learned table in each",
        ("block", "shared"),
    )
    learn_sigma: bool = option(True, "predict the variance of DDPM as well, with twice the output channels")
    time_input: str = option(
        "dit",
        "the value of the time embedding at model time t, which is 1000 for noise: dit t, repa t/1000, sit 1 - t/1000",
        TIME_INPUTS,
    )
    time_frequency_shift: int = option(
        0,
        "shift of the frequencies 10000^(-i / (128 - shift)) of the time embedding; 0 as in DiT, 1 as in diffusers",
        within="[0, 1]",
    )
    mlp_norm_eps: float = option(
        1e-6, "epsilon of the norm before an MLP or MoE; 1e-6 as in DiT, 1e-5 as in diffusers", within=POSITIVE
    )
    num_experts: int = option(12, "number E of routed experts in each MoE block", within=ONE_UP)
    # Under token choice exactly K for each token. Under expert choice each expert takes int(S / E * top_k) of an image.
    top_k: int = option(
        1, "number K of routed experts that process a token; the average under expert choice", within=ONE_UP
    )
    expert_ratio: float = option(2.0, "width F of a routed expert, as a multiple of hidden_size", within=POSITIVE)
    expert_width: int = option(
        0, "width F of a routed expert, in channels; 0: hidden_size * expert_ratio, rounded down", within=ZERO_UP
    )
    moe_every: int = option(
        2,
        "distance between MoE blocks, in blocks; 1: every block is one, 2: every second block, from the second on",
        within=ONE_UP,
    )
    shared_expert: bool = option(True, "ProMoE, classification, kmeans: add shared experts, which process every token")
    num_shared_experts: int = option(
        1,
        "number of shared experts in each MoE block, with shared_expert=true; their outputs are summed",
        within=ONE_UP,
    )
    shared_expert_width: int = option(
        0, "width of a shared expert, in channels; 0: the width of a routed expert", within=ZERO_UP
    )
    unconditional_expert: bool = option(
        True, "ProMoE, classification, kmeans: add unconditional experts, for the tokens of null-class images"
    )
    num_unconditional_experts: int = option(
        1,
        "number of unconditional experts in each MoE block, with unconditional_expert=true; their outputs are summed",
        within=ONE_UP,
    )
    score_function: str = option(
        "identity",
        "ProMoE, kmeans: function from an expert's score to its routing weight",
        ("identity", "sigmoid", "softmax"),
    )
    rcl_weight: float = option(1.0, "ProMoE: weight of the routing contrastive loss (RCL)", within=ZERO_UP)
    rcl_temperature: float = option(0.07, "ProMoE: temperature of the RCL, which divides its logits", within=POSITIVE)
    rcl_tokens: str = option(
        "all",
        "ProMoE: whether the RCL counts a token for all of its top_k experts, or for the first one only",
        ("all", "first"),
    )
    classification_weight: float = option(1.0, "classification: weight of the super-class loss", within=ZERO_UP)
    superclasses: str = option(
        class_groups.CONTIGUOUS,
        "classification: the super-class, and so the expert, of each class: contiguous, modulo, a YAML or JSON file, or"
        " a list such as 0,0,1",
    )
    kmeans_decay: float = option(
        0.9, "kmeans: decay of the running centroids at each step; 0 as published", within="[0, 1)"
    )
    capacity_factor: float = option(
        0.0,
        "most rows (pairs of token and expert) for an expert, as a multiple of an even share; further rows are dropped;"
        " 0: no limit",
        within=ZERO_UP,
    )
    batch_scope: str = option(
        "global",
        "images over which routers compute batch statistics: of all data-parallel ranks (global), or of each rank",
        ("global", "rank"),
    )
    balance_weight: float = option(0.0, "weight of the balance loss; 0: no balance loss", within=ZERO_UP)
    balance_form: str = option(
        "batch",
        "images over which the balance loss balances the experts: the batch, or each image (sequence)",
        ("batch", "sequence"),
    )
    capacity_predictor_weight: float = option(0.01, "DiffMoE: weight of the capacity predictor's loss", within=ZERO_UP)
    threshold_decay: float = option(
        0.95, "DiffMoE: decay of the running score thresholds at each step", within="[0, 1)"
    )

    @property
    def tokens(self) -> int:
        """Tokens S of an image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def has_text(self) -> bool:
        """Whether images are generated from texts."""
        return self.condition == "text"

    @property
    def sequence(self) -> int:
        """Tokens in the attention of an image: its own, and those of the longest text."""
        return self.tokens + self.text_tokens

    @property
    def position_constants(self) -> int:
        """Elements of the constant tables of positions, which are not trained; 0 for rotations."""
        return self.sequence * self.hidden_size if self.positions == "sincos" else 0

    @property
    def hidden_projections(self) -> int:
        """Projections from the tokens to the hidden width of an MLP or expert: 2 with a gate, else 1."""
        return 2 if self.activation == "swiglu" else 1

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
    def has_custom_router(self) -> bool:
        """Whether the router is a class that a user has defined."""
        return self.router not in ROUTERS

    @property
    def has_two_step_router(self) -> bool:
        """Whether the layer can have shared and unconditional experts: our two-step routers, and those of users."""
        return self.router in TWO_STEP_ROUTERS or self.has_custom_router

    @property
    def shared_experts(self) -> int:
        """Shared experts of an MoE layer; none without the two-step router."""
        return self.num_shared_experts if self.has_two_step_router and self.shared_expert else 0

    @property
    def unconditional_experts(self) -> int:
        """Experts that all tokens of null-class images visit; none without the two-step router."""
        return self.num_unconditional_experts if self.has_two_step_router and self.unconditional_expert else 0

    @property
    def out_channels(self) -> int:
        """Channels of the raw output: C, or 2C with `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int:
        """The label of images without a class."""
        return self.num_classes

    def tokens_per_expert(self, tokens: int) -> int:
        """Number of tokens, of `tokens`, that each expert takes under expert choice: int(tokens / E * top_k).

        At least 1 if there are any tokens: for ProMoE as published, for DiffMoE because its thresholds are updated with
        the score of the last token taken. Published EC may take none; such a configuration is refused.
        """
        count = int(tokens / self.num_experts * self.top_k)
        return count if self.router == "ec" else max(count, min(tokens, 1))

    @property
    def expert_capacity(self) -> int:
        """Number of tokens that an expert takes from one image under expert choice."""
        return self.tokens_per_expert(self.tokens)

    @property
    def rows_per_image(self) -> int:
        """Rows that an image's tokens send to routed experts in one MoE layer; for DiffMoE the mean over a large batch.

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

        DiffMoE selects among the tokens of the whole batch. With a capacity factor, the other rows decide which rows
        are dropped. What a user's router does is not known.
        """
        if self.router == "dense":
            return False
        return self.router == "diffmoe" or self.has_custom_router or self.capacity_factor > 0

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


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled."""

    method: str = option(
        "euler",
        "sampling method, or one's own, see docs/library.md",
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
    weight_decay: float = option(0.0, "AdamW: weight decay", within=ZERO_UP)
    warmup: int = option(
        0,
        "length of the linear warm-up of the learning rate, in steps; a preset's is at most a tenth of train.steps",
        within=ZERO_UP,
    )
    schedule: str = option("constant", "course of the learning rate after the warm-up", ("constant", "cosine"))
    min_lr: float = option(0.0, "learning rate at the end of the cosine schedule", within=ZERO_UP)
    max_grad_norm: float = option(
        0.5, "largest gradient norm; larger gradients are scaled down to it; 0: no clipping", within=ZERO_UP
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
    optimizer: str = option("adamw", "optimizer", ("adamw",))
    adamw_backend: str = option(
        "torch",
        "AdamW: implementation of the fused update",
        ("torch", "apex", "deepspeed"),
    )
    deepspeed: str = option(
        "bf16_zero1", "DeepSpeed configuration: the name of a file in ds_configs, or a path to a .json file"
    )
    compile: bool = option(False, "compile the blocks with torch.compile; the first step then takes minutes")
    seed: int = option(0, "seed of the initial weights", within=ZERO_UP)
    timeout: float = option(
        600.0, "longest duration of a collective, in seconds, after which the run ends with an error", within=POSITIVE
    )
    step_timeout: float = option(
        300.0,
        "longest duration of a section of a step, in seconds, after which the run reports a hang and ends",
        within=POSITIVE,
    )
    log_every: int = option(10, "number of steps between log lines and metrics", within=ONE_UP)
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
    max_failed_saves: int = option(3, "number of failed saves in a row that ends the run", within=ONE_UP)
    sample_every: int = option(0, "number of steps between pictures of samples; 0: none", within=ZERO_UP)
    max_bad_steps: int = option(3, "number of skipped updates in a row that ends the run", within=ONE_UP)
    spike_factor: float = option(
        0.0,
        "skip an update whose gradient norm exceeds this multiple of the median of recent norms; 0: skip none",
        within=ZERO_UP,
    )

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of `ema_decay`, one or more; the first is that of previews and the default of commands."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)


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
    """All options of a run; made by `resolve`."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()

    def layout(self, world: int) -> Layout:
        """The sizes of the process groups over `world` ranks. Raises ConfigError where a size does not divide."""
        if problems := sentences(self, world_rules(self, world)):
            raise ConfigError(problems)
        tp, ep = self.parallel.tp, self.parallel.ep
        etp = tp if self.parallel.expert_tp else 1
        dp = world // tp
        micro_batch = self.train.global_batch // (dp * self.train.accumulation)
        return Layout(world, tp, ep, dp, world // (ep * etp), etp, micro_batch)


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
    values = {f"{section}.{name}": v for section, s in to_dict(config).items() for name, v in s.items()}
    return [f"{keys[0]} = {values[keys[0]]!r}: {rule}" for keys, rule in broken if not set(keys) & set(refused)]


def world_rules(config: Config, world: int) -> Iterator[Rule]:
    """The broken rules on the layout over `world` ranks."""
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
    elif world % tp == 0:
        yield from _stratum_rules(config, train.global_batch // (dp * train.accumulation))


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

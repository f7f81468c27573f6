"""The options of the network, `model.*`; see `options.py`."""

from dataclasses import dataclass, replace

from megapromoe.config import class_groups, extensions
from megapromoe.config.reader import ONE_UP, POSITIVE, ZERO_UP, option

ROUTERS = (
    *("dense", "promoe", "promoe_ec", "promoe_linear", "classification", "kmeans", "gmm"),
    *("tc", "ec", "diffmoe", "race", "conditional"),
)
UNROUTED = ("dense", "conditional")  # values of `router` without routed experts
PROMOE_ROUTERS = ("promoe", "promoe_ec")  # routers with prototypes
GATE_ROUTERS = ("promoe_linear", "tc", "ec", "diffmoe")  # routers with a linear gate
GUIDED_ROUTERS = ("classification", "kmeans")
# Two-step routing: null images go to the unconditional expert, and a shared expert complements the routed ones.
TWO_STEP_ROUTERS = ("conditional", *PROMOE_ROUTERS, "promoe_linear", *GUIDED_ROUTERS, "gmm")
PUBLISHED_ROUTERS = ("dense", *PROMOE_ROUTERS, "tc", "ec", "diffmoe")
# Routers that can have a balance loss.
BALANCED_ROUTERS = ("promoe", "promoe_linear", "tc", "classification", "gmm")
BIASED_ROUTERS = ("promoe", "promoe_linear", "tc")  # routers that a bias can balance
BATCH_CHOICE_ROUTERS = ("diffmoe", "race")  # choose over a batch; how many rows a rank has depends on the scores
EXPERT_CHOICE_ROUTERS = ("promoe_ec", "ec", "diffmoe")
ROUTER_INPUTS = ("modulated", "unmodulated")
TIME_INPUTS = ("dit", "repa", "sit")
ACTIVATIONS = ("gelu", "swiglu")
CONDITIONS = ("class", "text")


@dataclass(frozen=True)
class ModelConfig:
    """The network: DiT's sizes, the router and the experts."""

    router: str = option(
        "promoe",
        "how experts are chosen: dense has none; conditional has one for classes or texts and one for null images;"
        " ProMoE by token choice (promoe) or expert choice (promoe_ec), without prototypes (promoe_linear), by classes,"
        " k-means or a Gaussian mixture (gmm); tc, ec, diffmoe and race are baselines; or one's own, see"
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
    position_scale: float = option(
        1.0,
        "factor on the rows and columns of the image tokens, for their positions; with 0.5, a grid of twice the side"
        " spans the positions of the old one",
        within=POSITIVE,
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
    shared_expert: bool = option(
        True, "ProMoE, classification, kmeans, gmm: add shared experts, which process every token"
    )
    num_shared_experts: int = option(
        1,
        "number of shared experts in each MoE block, with shared_expert=true; their outputs are summed",
        within=ONE_UP,
    )
    shared_expert_width: int = option(
        0, "width of a shared expert, in channels; 0: the width of a routed expert", within=ZERO_UP
    )
    unconditional_expert: bool = option(
        True, "ProMoE, classification, kmeans, gmm: add unconditional experts, for the tokens of null-class images"
    )
    num_unconditional_experts: int = option(
        1,
        "number of unconditional experts in each MoE block, with unconditional_expert=true; their outputs are summed",
        within=ONE_UP,
    )
    score_function: str = option(
        "identity",
        "ProMoE, kmeans, race: function from an expert's score to its routing weight",
        ("identity", "sigmoid", "softmax"),
    )
    router_input: str = option(
        "modulated",
        "tokens that routers score: those that the experts process, after the shift and scale of adaLN (modulated), or"
        " the normalised tokens before it (unmodulated)",
        ROUTER_INPUTS,
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
    mixture_variance: str = option(
        "diagonal",
        "gmm: variances of each expert's component: one for each channel (diagonal), or one for all (isotropic)",
        ("diagonal", "isotropic"),
    )
    mixture_weight: float = option(
        1.0, "gmm: weight of the negative log-likelihood by which the mixture is fitted to the tokens", within=ZERO_UP
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
    balance_bias: float = option(
        0.0,
        "promoe, promoe_linear, tc: step by which a bias of each expert moves after each update, so that the load of"
        " experts becomes even without a loss; the bias is added to scores for the choice of experts alone; 0: no bias",
        within=ZERO_UP,
    )
    capacity_predictor_weight: float = option(0.01, "DiffMoE: weight of the capacity predictor's loss", within=ZERO_UP)
    router_similarity_weight: float = option(1e-4, "race: weight of the router similarity loss", within=ZERO_UP)
    align_block: int = option(
        0,
        "number of blocks after which tokens are aligned with the features of a teacher in training (REPA), which"
        " `megapromoe encode --teacher` has stored; 0: no alignment",
        within=ZERO_UP,
    )
    align_width: int = option(0, "align_block: channels of the teacher's features", within=ZERO_UP)
    align_hidden: int = option(
        2048, "align_block: width of the hidden layers of the projector from tokens to features", within=ONE_UP
    )
    align_weight: float = option(0.5, "align_block: weight of the alignment loss", within=POSITIVE)
    threshold_decay: float = option(
        0.95, "DiffMoE, race: decay of the running score thresholds at each step", within="[0, 1)"
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

    @property
    def without_alignment(self) -> "ModelConfig":
        """The model without the projector of `align_block`, which only training needs."""
        return replace(self, align_block=0, align_width=0)

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
        """Rows that an image's tokens send to routed experts in one MoE layer; under a choice over batches their mean.

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
        if self.router in UNROUTED:
            return False
        return self.router == "diffmoe" or self.has_custom_router or self.capacity_factor > 0

    @property
    def superclass_of(self) -> tuple[int, ...]:
        """The super-class, and so the expert, of each class under router=classification."""
        return class_groups.superclass_table(self.superclasses, self.num_classes, self.num_experts)

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks whose MLP is an MoE, in order; none without routed experts."""
        return () if self.router in UNROUTED else self.expert_blocks

    @property
    def conditional_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with separate experts for null images and no routed ones (`router=conditional`)."""
        return self.expert_blocks if self.router == "conditional" else ()

    @property
    def expert_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that have experts of any kind instead of an MLP, in order; none for the dense DiT."""
        if self.router == "dense":
            return ()
        return tuple(i for i in range(self.depth) if (i + 1) % self.moe_every == 0)

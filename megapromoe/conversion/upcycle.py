"""Initial models from trained models: a ProMoE from a dense DiT, and a ProMoE with more experts.

Both return a `State` of step 0 without moments, whose tensors are computed when they are read. Noise is a function of
(seed, name, expert), so the order of reading does not matter.

Dense to ProMoE: a block's MLP, fc2(gelu(fc1 x)) or its SwiGLU, is a sum over its hidden units. "slice" divides the
units into n = width / expert width parts: the first part goes to the shared expert, the other parts go in turn to the
routed experts and the unconditional expert. "copy" (experts of the MLP's width) gives all units to each expert. The
output weights are scaled so that shared + routing weight · expert approximates the MLP: exactly for the null class with
two parts; for other classes up to the variation of the routing weight around its mean, which is measured on real
tokens.

Source: sparse upcycling, arXiv 2212.05055.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megapromoe.checkpoint.average import Average
from megapromoe.config.model_options import PROMOE_ROUTERS, ModelConfig
from megapromoe.config.options import Config
from megapromoe.conversion.state import State, is_finite, model_shapes
from megapromoe.conversion.stream import ConversionError
from megapromoe.data.sample_stream import SampleStream
from megapromoe.data.sources import open_dataset
from megapromoe.diffusion.objectives import make_objective
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import build


@dataclass(frozen=True)
class Prototypes:
    """The prototypes of one MoE layer.

    Attributes:
        prototype_ED: directions of the clusters of the layer's tokens.
        mean_weight: mean routing weight that they give.
    """

    prototype_ED: Tensor
    mean_weight: float


# ---- dense to ProMoE


def from_dense(
    dense: State,
    config: Config,
    prototypes: dict[int, Prototypes],
    how: str = "slice",
    noise: float = 0.01,
    weights: str = "ema",
    seed: int = 0,
) -> State:
    """A ProMoE of `config` whose experts are initialized from the MLPs of `dense`.

    Args:
        dense: the trained dense model.
        config: of the ProMoE.
        prototypes: index of an MoE block -> prototypes; see `cluster`.
        how: "slice" or "copy".
        noise: standard deviation of the noise on routed experts, relative to that of the tensor.
        weights: "ema" or "master": the weights of the dense model to start from.
        seed: of the noise.

    Raises ConversionError, which lists what does not fit: see `check_fit`.
    """
    check_fit(dense, config, how)
    old, new = dense.config.model, config.model
    shapes, _ = model_shapes(new)
    from_mlp = partial(_from_mlp, dense, config, prototypes, 1 if how == "copy" else old.mlp_width // new.moe_width)

    def read(kind: str, name: str) -> Tensor:
        if name in dense.shapes:
            return dense.read(weights, name)
        return from_mlp(lambda part: dense.read(weights, part), name, noise, seed)

    return _initial_state(dense, config, shapes, read, f"experts are {how}s of the MLPs, prototypes from k-means")


def check_fit(dense: State, config: Config, how: str) -> None:
    """Raises ConversionError, which lists all reasons, if `dense` cannot be converted to a ProMoE of `config`."""
    old, new = dense.config.model, config.model
    problems = []
    if old.router != "dense":
        problems.append(f"the source has model.router = {old.router}; it must be dense")
    if new.router not in PROMOE_ROUTERS:
        problems.append(f"model.router = {new.router}: must be promoe or promoe_ec")
    if old.has_text:
        problems.append("the source has model.condition = text; it must be class, since prototypes need tokens of data")
    same = ("hidden_size", "depth", "heads", "patch_size", "input_size", "in_channels", "num_classes")
    computed = ("time_input", "time_frequency_shift", "mlp_norm_eps")
    blocks = ("condition", "activation", "norm", "qk_norm", "positions", "position_scale", "modulation")
    for name in (*same, "mlp_ratio", *blocks, "learn_sigma", *computed):
        if getattr(old, name) != getattr(new, name):
            problems.append(f"model.{name} = {getattr(new, name)}: must be the source's {getattr(old, name)}")
    option, mlp = f"model.expert_ratio = {new.expert_ratio}", f"{old.mlp_ratio}"
    if new.expert_width:
        option, mlp = f"model.expert_width = {new.expert_width}", f"{old.mlp_width}"
    if how == "copy" and new.moe_width != old.mlp_width:
        problems.append(f"{option}: must be the MLP's {mlp} for copies; or use slices")
    if old.mlp_width % new.moe_width:
        problems.append(f"{option}: must divide the MLP's {mlp}")
    for name in ("num_shared_experts", "num_unconditional_experts"):
        if getattr(new, name) > 1:
            problems.append(f"model.{name} = {getattr(new, name)}: must be 1; several are not supported")
    if new.shared_width != new.moe_width:
        problems.append(f"model.shared_expert_width = {new.shared_expert_width}: must be 0, the other experts' width")
    if problems:
        raise ConversionError(f"{dense.where}: cannot be converted to this ProMoE:\n  " + "\n  ".join(problems))


def _from_mlp(
    dense: State,
    config: Config,
    prototypes: dict[int, Prototypes],
    parts: int,
    mlp: Callable[[str], Tensor],
    name: str,
    noise: float,
    seed: int,
) -> Tensor:
    """One tensor of an MoE layer, float32."""
    model = config.model
    prefix, _, inside = name.partition(".mlp.")
    layer = prototypes[int(prefix.split(".")[1])]
    if inside == "router.prototypes":
        # The norm of newly initialized prototypes (normal, σ 0.02), to which AdamW's step size fits.
        return F.normalize(layer.prototype_ED, dim=-1) * 0.02 * model.hidden_size**0.5
    role, projection, kind = inside.split(".")
    tensor = mlp(f"{prefix}.mlp.{projection}.{kind}")

    def part_of(index: int, scale: float) -> Tensor:
        """The tensor of an expert with the index-th part of the hidden units and a scaled output."""
        width = model.moe_width
        units = slice(index * width, (index + 1) * width)
        if projection == "fc1":  # a SwiGLU has two projections to the hidden units
            return tensor.unflatten(0, (model.hidden_projections, -1))[:, units].flatten(0, 1)
        if kind == "weight":
            return tensor[:, units] * scale
        # The output bias must be added once: by the shared expert, which processes every token, if there is one.
        return tensor * (1.0 if role == "shared" else 0.0 if model.shared_expert else scale / _parts(parts, model))

    if role == "shared":
        return part_of(0, _scale_of_shared(parts)).contiguous()
    others = _parts(parts, model)
    first = 1 if model.shared_expert and parts > 1 else 0
    share = 0.5 if model.shared_expert and parts == 1 else 1.0
    if role == "unconditional":
        return part_of(first, share * others).contiguous()
    routed = []
    for expert in range(model.num_experts):
        part = part_of(first + expert % others, share * others / layer.mean_weight)
        routed.append(_noisy(part, noise, seed, name, expert))
    return torch.stack(routed)


def _parts(parts: int, model) -> int:
    """The number of parts of the hidden units that are divided among the experts other than the shared one."""
    return parts - 1 if model.shared_expert and parts > 1 else parts


def _scale_of_shared(parts: int) -> float:
    return 0.5 if parts == 1 else 1.0


@torch.no_grad()
def moe_inputs(dense: State, config: Config, images: int, weights: str = "ema") -> dict[int, Tensor]:
    """The inputs of the routers in the blocks that will be MoE layers: block -> tokens (T, D) of conditional images.

    The dense model runs on the first `images` samples of the stream of `config`, with noise as in training.
    """
    model = _load_model(dense, weights)
    dataset = open_dataset(config)
    stream = SampleStream(dataset, config.data.seed, 0.0, config.data.flip, config.model.null_class)
    objective = make_objective(config)
    inputs: dict[int, list[Tensor]] = {block: [] for block in config.model.moe_blocks}
    hooks = []
    for block, tokens in inputs.items():
        if config.model.router_input == "unmodulated":
            norm = model.blocks[block].get_submodule("norm2")
            hooks.append(norm.register_forward_hook(lambda *call, to=tokens: to.append(call[2].flatten(0, 1))))
        else:
            mlp = model.blocks[block].get_submodule("mlp")
            hooks.append(mlp.register_forward_pre_hook(lambda *call, to=tokens: to.append(call[1][0].flatten(0, 1))))
    batch = 64
    for first in range(0, images, batch):
        samples = stream.batch(first, min(batch, images - first))
        x_BCHW, t_B = objective.corrupt(samples.clean_BCHW, samples.noise_BCHW, samples.u_B)
        model(x_BCHW, t_B, samples.labels_B, samples.num_conditional)
    for hook in hooks:
        hook.remove()
    return {block: torch.cat(tokens) for block, tokens in inputs.items()}


def cluster(x_TD: Tensor, config: Config, seed: int = 0) -> Prototypes:
    """Prototypes of a layer from its tokens (T, D), by spherical k-means, because routing uses cosine scores.

    With expert choice, the softmax is over the tokens of an image: the T tokens must then be those of whole images, in
    order.

    Raises ConversionError if there are fewer tokens than experts, or if a token is not finite.

    Source: sklearn.cluster.KMeans on normalised tokens.
    """
    from sklearn.cluster import KMeans  # slow to import

    experts, top_k = config.model.num_experts, config.model.top_k
    if len(x_TD) < experts:
        raise ConversionError(f"{len(x_TD)} tokens for {experts} prototypes: use more images")
    if not is_finite(x_TD):
        raise ConversionError(
            "tokens of the source hold NaN or infinity: its weights or the data are not finite or too large; use an"
            " earlier checkpoint"
        )
    unit_TD = F.normalize(x_TD.float(), dim=-1)
    clusters = KMeans(experts, n_init=1, random_state=seed).fit(unit_TD.numpy())
    prototype_ED = F.normalize(torch.from_numpy(clusters.cluster_centers_).float(), dim=-1)
    score_TE = unit_TD @ prototype_ED.T
    weight_TE = _weights(score_TE, config.model)
    chosen_TK = score_TE.topk(top_k, dim=-1).indices
    mean = float(weight_TE.gather(-1, chosen_TK).sum(-1).mean())
    # A mean cosine near zero would give unbounded scales; other weights have a positive lower bound.
    return Prototypes(prototype_ED, max(mean, 0.05) if config.model.score_function == "identity" else mean)


def _weights(score_TE: Tensor, model: ModelConfig) -> Tensor:
    """The routing weights (T, E) of all experts for each token, from the scores of whole images."""
    if model.score_function == "identity":
        return score_TE
    if model.score_function == "sigmoid":
        return score_TE.sigmoid()
    if model.router == "promoe":
        return score_TE.softmax(-1)
    return score_TE.unflatten(0, (-1, model.tokens)).softmax(1).flatten(0, 1)


# ---- more experts


def grow(
    small: State, config: Config, noise: float = 0.01, spread: float = 0.05, weights: str = "ema", seed: int = 0
) -> State:
    """A ProMoE with a multiple of the E experts of `small`: expert e is a copy of expert e mod E.

    Without noise, and with top_k = 1, its output equals that of `small`. With expert choice, each expert gets fewer
    tokens.

    Args:
        small: the trained model.
        config: that of `small`, with another `model.num_experts`.
        noise: standard deviation of the noise on each routed expert, relative to that of the tensor.
        spread: norm of the noise on each prototype, relative to the prototype; it separates the tokens of the copies.
        weights: "ema" or "master": the weights of `small` to start from.
        seed: of the noise.

    Raises ConversionError, which lists what does not fit.
    """
    old, new = small.config.model, config.model
    problems = []
    if old.router not in PROMOE_ROUTERS:
        problems.append(f"the source has model.router = {old.router}; it must be promoe or promoe_ec")
    if replace(new, num_experts=old.num_experts) != old:
        problems.append("the model may differ from the source's in model.num_experts only")
    if new.num_experts % old.num_experts or new.num_experts <= old.num_experts:
        problems.append(f"model.num_experts = {new.num_experts}: must be a multiple of the source's {old.num_experts}")
    if problems:
        raise ConversionError(f"{small.where}: cannot grow:\n  " + "\n  ".join(problems))
    shapes, _ = model_shapes(new)
    times = new.num_experts // old.num_experts

    def read(kind: str, name: str) -> Tensor:
        tensor = small.read(weights, name)
        if name.endswith(".router.prototypes"):
            length_E1 = tensor.norm(dim=-1, keepdim=True) / tensor.shape[1] ** 0.5
            return torch.cat([
                tensor + spread * length_E1 * torch.randn(tensor.shape, generator=_generator(seed, name, copy))
                for copy in range(times)
            ])  # fmt: skip
        if ".mlp.experts." not in name:
            return tensor
        if old.score_function == "softmax" and old.router == "promoe" and ".fc2." in name:
            tensor = tensor * times  # a softmax over `times` as many experts; with expert choice it is over tokens
        return torch.stack([
            _noisy(tensor[expert % old.num_experts], noise, seed, name, expert) for expert in range(new.num_experts)
        ])  # fmt: skip

    biases = {name: bias.repeat(times) for name, bias in small.buffers.items() if name.endswith(".balance_bias")}
    state = _initial_state(small, config, shapes, read, f"each of {old.num_experts} experts was split into {times}")
    return replace(state, buffers=biases)


# ---- common parts


def _initial_state(
    source: State, config: Config, shapes: dict[str, tuple[int, ...]], read: Callable[[str, str], Tensor], note: str
) -> State:
    """A state at the start of training: the average equals the weights, and there are no moments."""
    notes = [*source.notes, note]
    average = Average(None, 1.0, 0, config.train.ema_decays[0])
    return State(
        source.where, "upcycled", config, 0, 0, ("master", "ema"), shapes, {}, read, notes=notes, average=average
    )


def _noisy(tensor: Tensor, noise: float, seed: int, name: str, expert: int) -> Tensor:
    if not noise or name.endswith(".bias"):
        return tensor.contiguous()
    return tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=_generator(seed, name, expert))


def _generator(seed: int, name: str, expert: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _load_model(state: State, weights: str) -> DiT:
    """The unsharded model of a state, in eval mode."""
    model = build(state.config, UNSHARDED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.read(weights, name))
        for name, tensor in model.state_dict().items():
            if name in state.buffers:
                tensor.copy_(state.buffers[name])
    return model.eval().requires_grad_(False)

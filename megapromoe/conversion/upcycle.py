"""Models made from trained models: a ProMoE from a dense DiT, and a ProMoE with more experts.

Both give a `State` of step 0 without moments, whose tensors are made when they are read. Noise comes from (seed, name,
expert), so it does not matter in which order.

Dense to ProMoE. A block's MLP, fc2(gelu(fc1 x)), is a sum over its hidden units. "slice" deals the units out in n =
width / expert width parts: the shared expert takes the first, the routed experts and the unconditional one the others
in turn. "copy" (expert as wide as the MLP) gives all units to each. Output weights are scaled so that shared +
gate·expert is the MLP again where it can be: for the null class exactly with two parts, for others up to the gate's
spread around its mean, which is measured on real tokens. Source: sparse upcycling, arXiv 2212.05055.
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
from megapromoe.config.options import PROMOE_ROUTERS, Config, ModelConfig
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
    """Of one MoE layer: directions (E, D) of the clusters of its tokens, and the mean gate they would give."""

    prototype_ED: Tensor
    gate: float


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
    """A ProMoE of `config` whose experts are made from the MLPs of `dense`.

    Args:
        prototypes: of each MoE block, by its index; see `cluster`.
        how: "slice" or "copy".
        noise: standard deviation of what is added to the routed experts, over that of the tensor itself.
        weights: "ema" or "master", which of the dense model's to start from.

    Raises ConversionError listing what does not fit: see `check_fit`.
    """
    check_fit(dense, config, how)
    old, new = dense.config.model, config.model
    shapes, _ = model_shapes(new)
    make = partial(_from_mlp, dense, config, prototypes, 1 if how == "copy" else old.mlp_width // new.moe_width)

    def read(kind: str, name: str) -> Tensor:
        if name in dense.shapes:
            return dense.read(weights, name)
        return make(lambda part: dense.read(weights, part), name, noise, seed)

    return _fresh(dense, config, shapes, read, f"experts are {how}s of the MLPs, prototypes from k-means")


def check_fit(dense: State, config: Config, how: str) -> None:
    """Raises ConversionError listing why `dense` cannot become a ProMoE of `config`."""
    old, new = dense.config.model, config.model
    problems = []
    if old.router != "dense":
        problems.append(f"the source has model.router = {old.router}; it must be dense")
    if new.router not in PROMOE_ROUTERS:
        problems.append(f"model.router = {new.router}: must be promoe or promoe_ec")
    same = ("hidden_size", "depth", "heads", "patch_size", "input_size", "in_channels", "num_classes")
    computed = ("time_input", "time_frequency_shift", "mlp_norm_eps")
    for name in (*same, "mlp_ratio", "qk_norm", "learn_sigma", *computed):
        if getattr(old, name) != getattr(new, name):
            problems.append(f"model.{name} = {getattr(new, name)}: must be the source's {getattr(old, name)}")
    said, whole = f"model.expert_ratio = {new.expert_ratio}", f"{old.mlp_ratio}"
    if new.expert_width:
        said, whole = f"model.expert_width = {new.expert_width}", f"{old.mlp_width}"
    if how == "copy" and new.moe_width != old.mlp_width:
        problems.append(f"{said}: copies need the MLP's {whole}; or slice")
    if old.mlp_width % new.moe_width:
        problems.append(f"{said}: must divide the MLP's {whole}")
    for name in ("num_shared_experts", "num_unconditional_experts"):
        if getattr(new, name) > 1:
            problems.append(f"model.{name} = {getattr(new, name)}: must be 1, since an MLP is dealt out to one of each")
    if new.shared_width != new.moe_width:
        problems.append(f"model.shared_expert_width = {new.shared_expert_width}: must be 0, the other experts' width")
    if problems:
        raise ConversionError(f"{dense.where}: cannot become this ProMoE:\n  " + "\n  ".join(problems))


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
    made = prototypes[int(prefix.split(".")[1])]
    if inside == "router.prototypes":
        # As long as fresh ones (normal, σ 0.02), since AdamW's steps are of that scale.
        return F.normalize(made.prototype_ED, dim=-1) * 0.02 * model.hidden_size**0.5
    role, projection, kind = inside.split(".")
    whole = mlp(f"{prefix}.mlp.{projection}.{kind}")

    def part_of(index: int, scale: float) -> Tensor:
        """The tensor of an expert that holds the index-th part of the hidden units, its output scaled."""
        width = model.moe_width
        units = slice(index * width, (index + 1) * width)
        if projection == "fc1":
            return whole[units]
        if kind == "weight":
            return whole[:, units] * scale
        # The output bias belongs to the sum, and so to whom every token visits.
        return whole * (1.0 if role == "shared" else 0.0 if model.shared_expert else scale / _parts(parts, model))

    if role == "shared":
        return part_of(0, _scale_of_shared(parts)).contiguous()
    others = _parts(parts, model)
    first = 1 if model.shared_expert and parts > 1 else 0
    share = 0.5 if model.shared_expert and parts == 1 else 1.0
    if role == "unconditional":
        return part_of(first, share * others).contiguous()
    routed = []
    for expert in range(model.num_experts):
        one = part_of(first + expert % others, share * others / made.gate)
        routed.append(_noisy(one, noise, seed, name, expert))
    return torch.stack(routed)


def _parts(parts: int, model) -> int:
    """Parts of the hidden units that the experts other than the shared one deal out among themselves."""
    return parts - 1 if model.shared_expert and parts > 1 else parts


def _scale_of_shared(parts: int) -> float:
    return 0.5 if parts == 1 else 1.0


@torch.no_grad()
def moe_inputs(dense: State, config: Config, images: int, weights: str = "ema") -> dict[int, Tensor]:
    """What the MLPs of the blocks that will be MoE see: block -> tokens (T, D), of images that keep their label.

    The dense model runs on the first `images` samples of the stream of `config`, noised as in training.
    """
    model = _whole_model(dense, weights)
    dataset = open_dataset(config)
    loader = SampleStream(dataset, config.data.seed, 0.0, config.data.flip, config.model.null_class)
    objective = make_objective(config)
    seen: dict[int, list[Tensor]] = {block: [] for block in config.model.moe_blocks}
    hooks = [
        model.blocks[block]
        .get_submodule("mlp")
        .register_forward_pre_hook(lambda _, given, b=block: seen[b].append(given[0].flatten(0, 1)))
        for block in seen
    ]
    batch = 64
    for first in range(0, images, batch):
        samples = loader.batch(first, min(batch, images - first))
        x_BCHW, t_B = objective.corrupt(samples.clean_BCHW, samples.noise_BCHW, samples.u_B)
        model(x_BCHW, t_B, samples.labels_B, samples.num_conditional)
    for hook in hooks:
        hook.remove()
    return {block: torch.cat(tokens) for block, tokens in seen.items()}


def cluster(x_TD: Tensor, config: Config, seed: int = 0) -> Prototypes:
    """Prototypes of a layer from its tokens (T, D): spherical k-means, as routing goes by cosine.

    The softmax gate of expert choice is over an image's tokens: there the T tokens are those of whole images, in order.

    Raises ConversionError if there are fewer tokens than experts.

    Source: sklearn.cluster.KMeans on normalised tokens.
    """
    from sklearn.cluster import KMeans  # slow to import

    experts, top_k = config.model.num_experts, config.model.top_k
    if len(x_TD) < experts:
        raise ConversionError(f"{len(x_TD)} tokens for {experts} prototypes: use more images")
    if not is_finite(x_TD):
        raise ConversionError(
            "tokens of the source hold NaN or infinity: its weights, or the data, are not finite or far too large; use"
            " an earlier checkpoint"
        )
    unit_TD = F.normalize(x_TD.float(), dim=-1)
    found = KMeans(experts, n_init=1, random_state=seed).fit(unit_TD.numpy())
    prototype_ED = F.normalize(torch.from_numpy(found.cluster_centers_).float(), dim=-1)
    score_TE = unit_TD @ prototype_ED.T
    weight_TE = _weights(score_TE, config.model)
    chosen_TK = score_TE.topk(top_k, dim=-1).indices
    mean = float(weight_TE.gather(-1, chosen_TK).sum(-1).mean())
    # Cosines of tokens in all directions would ask for endless scales; the other gates have a positive lower bound.
    return Prototypes(prototype_ED, max(mean, 0.05) if config.model.gate == "identity" else mean)


def _weights(score_TE: Tensor, model: ModelConfig) -> Tensor:
    """The weight (T, E) of each expert's output for each token, from the scores of whole images."""
    if model.gate == "identity":
        return score_TE
    if model.gate == "sigmoid":
        return score_TE.sigmoid()
    if model.router == "promoe":
        return score_TE.softmax(-1)
    return score_TE.unflatten(0, (-1, model.tokens)).softmax(1).flatten(0, 1)


# ---- more experts


def grow(
    small: State, config: Config, noise: float = 0.01, spread: float = 0.05, weights: str = "ema", seed: int = 0
) -> State:
    """A ProMoE with a multiple of the experts of `small`: expert e starts as expert e mod E.

    Without noise, and with top_k = 1, it computes what `small` does. Expert choice gives each expert fewer tokens.

    Args:
        config: that of `small` but for `model.num_experts`.
        noise: standard deviation of what is added to each routed expert, over that of the tensor itself.
        spread: length of what is added to each prototype, over its own; it parts the tokens of a split expert.

    Raises ConversionError listing what does not fit.
    """
    old, new = small.config.model, config.model
    problems = []
    if old.router not in PROMOE_ROUTERS:
        problems.append(f"the source has model.router = {old.router}; it must be promoe or promoe_ec")
    if replace(new, num_experts=old.num_experts) != old:
        problems.append("the model may differ from the source's in model.num_experts alone")
    if new.num_experts % old.num_experts or new.num_experts <= old.num_experts:
        problems.append(f"model.num_experts = {new.num_experts}: must be a multiple of the source's {old.num_experts}")
    if problems:
        raise ConversionError(f"{small.where}: cannot grow:\n  " + "\n  ".join(problems))
    shapes, _ = model_shapes(new)
    times = new.num_experts // old.num_experts

    def read(kind: str, name: str) -> Tensor:
        whole = small.read(weights, name)
        if name.endswith(".router.prototypes"):
            length_E1 = whole.norm(dim=-1, keepdim=True) / whole.shape[1] ** 0.5
            return torch.cat([
                whole + spread * length_E1 * torch.randn(whole.shape, generator=_generator(seed, name, turn))
                for turn in range(times)
            ])  # fmt: skip
        if ".mlp.experts." not in name:
            return whole
        if old.gate == "softmax" and old.router == "promoe" and ".fc2." in name:
            whole = whole * times  # the same scores over so many times the experts; by expert choice: over tokens
        return torch.stack([
            _noisy(whole[expert % old.num_experts], noise, seed, name, expert) for expert in range(new.num_experts)
        ])  # fmt: skip

    return _fresh(small, config, shapes, read, f"each of {old.num_experts} experts was split into {times}")


# ---- what both share


def _fresh(
    source: State, config: Config, shapes: dict[str, tuple[int, ...]], read: Callable[[str, str], Tensor], note: str
) -> State:
    """A state at the start of training: weights, which are their own average, and no moments."""
    notes = [*source.notes, note]
    average = Average(None, 1.0, 0, config.train.ema)
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


def _whole_model(state: State, weights: str) -> DiT:
    """The model of a state on this process, in eval mode."""
    model = build(state.config, UNSHARDED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.read(weights, name))
        for name, tensor in model.state_dict().items():
            if name in state.buffers:
                tensor.copy_(state.buffers[name])
    return model.eval().requires_grad_(False)

"""Converts the config and names of diffusers' `DiTTransformer2DModel` to those of our dense DiT.

diffusers computes DiT with time frequencies 10000^(-i / 127) and an epsilon of 1e-5 before each MLP, DiT itself with
10000^(-i / 128) and 1e-6. `model.time_frequency_shift` and `model.mlp_norm_eps` reproduce diffusers' outputs. In
diffusers each block has a copy of the time and class embeddings; all must be equal, because DiT has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.conversion.starting_run import StartingRun
from megapromoe.conversion.state import check_same
from megapromoe.conversion.stream import ConversionError, Stored

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
POSITIONS = "pos_embed.pos_embed"  # saved by some versions
# Source: DiTTransformer2DModel.__init__ and BasicTransformerBlock: the defaults, and the only supported values.
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
_NEEDED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
_LARGEST = 100_000
_AS_DIFFUSERS = ("time_frequency_shift", "mlp_norm_eps")
_TIMES, _CLASSES = "norm1.emb.timestep_embedder.linear_", "norm1.emb.class_embedder.embedding_table.weight"


def native(path: Path, content: Any) -> Mapping[str, Any] | None:
    """Returns a config.json if it is that of diffusers' DiT; None if diffusers did not write it.

    Raises ConversionError for another model of diffusers.
    """
    if not isinstance(content, Mapping) or "megapromoe" in content:
        return None
    name = content.get("_class_name")
    if name in CLASSES:
        return content
    if "_diffusers_version" in content:
        raise ConversionError(f"{path}: is a {name} of diffusers; only {CLASSES[0]} is supported")
    return None


def config_of(path: Path, content: Mapping[str, Any], given: Config | None, notes: list[str]) -> Config:
    """The config of the model that a config.json describes; `given`, if there is one and it describes the same model.

    `given` may have DiT's time frequencies and epsilon, which differ from those of diffusers.

    Raises ConversionError if the model is not a supported DiT or differs from `given`, or ConfigError.
    """
    has = {key: content.get(key, value) for key, value in _DEFAULTS.items()}
    for key, value in _NEEDED.items():
        if content.get(key, value if content["_class_name"] == CLASSES[0] else None) != value:
            raise ConversionError(
                f"{path}: config.json has {key} = {content.get(key)!r}; only diffusers' DiT is supported, with"
                f" {key} = {value!r}"
            )
    if has["out_channels"] is None:
        has["out_channels"] = has["in_channels"]
    for key, value in has.items():
        if type(value) is not float if key == "norm_eps" else type(value) is not int or not 1 <= value <= _LARGEST:
            raise ConversionError(
                f"{path}: config.json has {key} = {value!r}; it must be a number, for sizes from 1 to {_LARGEST:,}"
            )
    if has["out_channels"] not in (has["in_channels"], 2 * has["in_channels"]):
        raise ConversionError(
            f"{path}: config.json has out_channels = {has['out_channels']}; it must be in_channels or twice in_channels"
        )
    model = {
        "router": "dense",
        "hidden_size": has["num_attention_heads"] * has["attention_head_dim"],
        "depth": has["num_layers"],
        "heads": has["num_attention_heads"],
        "patch_size": has["patch_size"],
        "input_size": has["sample_size"],
        "in_channels": has["in_channels"],
        "num_classes": has["num_embeds_ada_norm"],
        "learn_sigma": str(has["out_channels"] != has["in_channels"]).lower(),
        "time_frequency_shift": 1,
        "mlp_norm_eps": has["norm_eps"],
        "activation": "gelu",
        "norm": "layer",
        "qk_norm": "none",
        "positions": "sincos",
        "position_scale": 1.0,
        "modulation": "block",
        "condition": "class",
    }
    settings = [f"model.{key}={value}" for key, value in model.items()]
    described = resolve(overrides=[*settings, "data.source=unset"])
    if given is None:
        notes.append(
            "the model computes as diffusers does (model.time_frequency_shift=1,"
            f" model.mlp_norm_eps={has['norm_eps']:g}); the weights of DiT's release were trained with 0 and 1e-6: for"
            " those give a config with these values (--preset dit_xl --objective ddpm)"
        )
        return described
    for key in model:
        if key in _AS_DIFFUSERS:
            continue
        theirs, ours = getattr(described.model, key), getattr(given.model, key)
        if theirs != ours:
            raise ConversionError(
                f"{path}: config.json describes a model with model.{key} = {theirs}, but the given config has {ours};"
                " correct it, or leave the config out"
            )
    for key in _AS_DIFFUSERS:
        theirs, ours = getattr(described.model, key), getattr(given.model, key)
        if theirs != ours:
            notes.append(
                f"diffusers computes this model with model.{key} = {theirs}; the given config's {ours} is used"
            )
    return given


def config_for_run(path: Path, content: Mapping[str, Any], run: StartingRun) -> Config:
    """The config of the model that a config.json describes, with the conventions of a run that starts from it.

    Those are the objective, the time input, and the time frequencies and epsilon, which are DiT's or diffusers'.

    Raises ConversionError or ConfigError, see `config_of`.
    """
    described, ours = config_of(path, content, None, []), run.config
    computed = {name: getattr(ours.model, name) for name in ("time_input", *_AS_DIFFUSERS)}
    model = replace(described.model, **computed)
    return replace(described, model=model, diffusion=ours.diffusion, sample=ours.sample)


def our_names(path: Path, tensors: Mapping[str, Stored], config: Config) -> dict[str, Stored | list[Stored]]:
    """The tensors by our names; query, key and value projections of a block as a list.

    Raises ConversionError if names or shapes are not those of the config's model, or copies of an embedding differ.
    """
    model = config.model
    width, mlp, patch = model.hidden_size, model.mlp_width, (model.patch_size,) * 2
    shapes: dict[str, tuple[int, ...]] = {}
    out: dict[str, Stored | list[Stored]] = {}
    copies: dict[str, list[str]] = {}

    def add(ours: str, theirs: str, *shape: int) -> None:
        shapes[theirs] = shape
        copies.setdefault(ours, []).append(theirs)

    def linear(ours: str, theirs: str, outputs: int, inputs: int) -> None:
        add(f"{ours}.weight", f"{theirs}.weight", outputs, inputs)
        add(f"{ours}.bias", f"{theirs}.bias", outputs)

    add("x_embedder.proj.weight", "pos_embed.proj.weight", width, model.in_channels, *patch)
    add("x_embedder.proj.bias", "pos_embed.proj.bias", width)
    for block in range(model.depth):
        theirs, ours = f"transformer_blocks.{block}", f"blocks.{block}"
        linear("t_embedder.mlp.0", f"{theirs}.{_TIMES}1", width, 256)
        linear("t_embedder.mlp.2", f"{theirs}.{_TIMES}2", width, width)
        add("y_embedder.embedding_table.weight", f"{theirs}.{_CLASSES}", model.num_classes + 1, width)
        linear(f"{ours}.adaLN_modulation.1", f"{theirs}.norm1.linear", 6 * width, width)
        for part in "qkv":
            linear(f"{ours}.attn.qkv.{part}", f"{theirs}.attn1.to_{part}", width, width)
        linear(f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0", width, width)
        linear(f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj", mlp, width)
        linear(f"{ours}.mlp.fc2", f"{theirs}.ff.net.2", width, mlp)
    linear("final_layer.adaLN_modulation.1", "proj_out_1", 2 * width, width)
    linear("final_layer.linear", "proj_out_2", patch[0] * patch[1] * model.out_channels, width)
    check_same(path, {name: stored.shape for name, stored in tensors.items() if name != POSITIONS}, shapes)
    for ours, names in copies.items():
        _check_copies(path, [(name, tensors[name]) for name in names])
        head, part, kind = ours.rpartition(".")[0].rpartition(".")[0], *ours.split(".")[-2:]
        if part in ("q", "k", "v"):
            joined = out.setdefault(f"{head}.{kind}", [])
            assert isinstance(joined, list), "q, k and v of one projection"
            joined.append(tensors[names[0]])
        else:
            out[ours] = tensors[names[0]]
    return out


def _check_copies(path: Path, copies: list[tuple[str, Stored]]) -> None:
    """Raises ConversionError unless all copies of a tensor, of which one is kept, are equal."""
    if len(copies) < 2:
        return
    first_name, first = copies[0]
    kept = first.read()
    for name, stored in copies[1:]:
        if stored.dtype != first.dtype or not torch.equal(stored.read(), kept):
            raise ConversionError(
                f"{path}: {name} differs from {first_name}; its blocks have different embeddings, but a DiT has one"
            )

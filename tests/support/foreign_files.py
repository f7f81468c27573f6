"""Checkpoints as other projects write them, of one tiny dense DiT whose tensors are known."""

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.golden_states import config_that_runs, state_of

from megapromoe.config.options import Config
from megapromoe.nn.layers import position_table

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")
UPDATES = 10


CLASSES = "norm1.emb.class_embedder.embedding_table.weight"


def config() -> Config:
    return config_that_runs("dense")


@lru_cache
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Kind -> published name -> tensor, in the order of the published model; without positions."""
    state = state_of("dense")
    return {kind: {name: state.read(kind, name) for name in state.shapes} for kind in KINDS}


def positions() -> torch.Tensor:
    model = config().model
    return position_table(model.input_size // model.patch_size, model.hidden_size)[None]


def weights(kind: str = "master", dtype: torch.dtype = torch.float32, table: bool = True, prefix: str = "") -> dict:
    """A state dict of one kind under published names."""
    content = ({"pos_embed": positions()} if table else {}) | tensors()[kind]
    return OrderedDict((prefix + name, tensor.to(dtype)) for name, tensor in content.items())


def optimizer(extra: int = 0, **settings: Any) -> dict:
    """torch.optim.AdamW's state dict; parameter 0 is the fixed table, and the last `extra` are of other modules."""
    names = list(tensors()["master"])
    state = {
        i: {"step": torch.tensor(float(UPDATES)), **{kind: tensors()[kind][name] for kind in KINDS[2:]}}
        for i, name in enumerate(names, start=1)
    }
    train = config().train
    group = {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.eps, "weight_decay": train.weight_decay}
    return {"state": state, "param_groups": [{**group, **settings, "params": list(range(len(names) + 1 + extra))}]}


def saved(content: Callable[[], Any], name: str = "a.pth") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content(), folder / name)
        return folder / name

    return make


def training(opt: Callable[[], Any] = optimizer, **arguments: Any) -> dict:
    """What train.py of DiT and of its descendants saves."""
    content = {"model": weights(), "ema": weights("ema"), "opt": opt()}
    return content | ({"args": argparse.Namespace(**arguments)} if arguments else {})


def repa() -> dict:
    """REPA's: projectors between the blocks and the last layer, and the number of steps."""
    arguments = {"model": "SiT-S/2", "path_type": "linear", "prediction": "v", "proj_coeff": 0.5, "encoder_depth": 2}
    heads = {f"projectors.0.{i}.{kind}": torch.ones(2) for i in (0, 2) for kind in ("weight", "bias")}
    content = training(lambda: optimizer_with_heads(heads), **arguments)
    for key in ("model", "ema"):
        content[key] = with_heads(content[key], heads)
    return content | {"steps": 40}


def with_heads(names: dict, heads: dict) -> dict:
    """Names and tensors, those of heads before the last layer."""
    last = {name: tensor for name, tensor in names.items() if name.startswith("final_layer")}
    return {name: tensor for name, tensor in names.items() if name not in last} | heads | last


def optimizer_with_heads(heads: dict) -> dict:
    order = list(with_heads(weights(), heads))
    plain = optimizer(len(heads))
    moments = {name: plain["state"][i] for i, name in enumerate(weights()) if i}
    moments |= {name: {"step": torch.tensor(10.0), "exp_avg": t, "exp_avg_sq": t} for name, t in heads.items()}
    return plain | {"state": {i: moments[name] for i, name in enumerate(order) if name in moments}}


def broken_moment(change: Callable[[dict], Any]) -> Callable[[], dict]:
    def content() -> dict:
        state = optimizer()
        change(state)
        return training(lambda: state)

    return content


def safetensors_file(content: Callable[[], dict], name: str = "a.safetensors") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in content().items()}, folder / name)
        return folder / name

    return make


def sharded(change: Callable[[dict, Path], Any] = lambda index, folder: None) -> Callable[[Path], Path]:
    """Two files and an index, as huggingface_hub splits; `change` may spoil them."""

    def make(folder: Path) -> Path:
        content = weights(table=False)
        names, files = list(content), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        half = len(names) // 2
        for file, part in zip(files, (names[:half], names[half:]), strict=True):
            save_file({name: content[name].contiguous() for name in part}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": {n: files[i >= half] for i, n in enumerate(names)}}
        change(index, folder)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index))
        return path

    return make


def zero(change: Callable[[Path], Any] = lambda folder: None, ranks: int = 2) -> Callable[[Path], Path]:
    """A DeepSpeed folder of ZeRO-1 in bfloat16, as two ranks write it."""

    def make(folder: Path) -> Path:
        tag = folder / "global_step12"
        tag.mkdir()
        (folder / "latest").write_text(tag.name)
        shapes = OrderedDict((name, t.shape) for name, t in tensors()["master"].items())
        main = {"module": weights(dtype=torch.bfloat16), "param_shapes": [shapes], "global_steps": 12}
        torch.save(main | {"optimizer": None, "buffer_names": ["pos_embed"]}, tag / "mp_rank_00_model_states.pt")
        flats = {kind: torch.cat([t.flatten() for t in tensors()[kind].values()]) for kind in KINDS if kind != "ema"}
        size = -(-len(flats["master"]) // (2 * ranks)) * 2
        for rank in range(ranks):
            part = {kind: flat[rank * size : (rank + 1) * size].clone() for kind, flat in flats.items()}
            moments = {kind: torch.nn.functional.pad(part[kind], (0, size - len(part[kind]))) for kind in KINDS[2:]}
            state = {
                "single_partition_of_fp32_groups": [part["master"]],
                "base_optimizer_state": {"state": {0: {"step": torch.tensor(10.0), **moments}}, "param_groups": []},
                "partition_count": [ranks],
                "param_alignment_paddings": [[0] * len(shapes)],
            }
            torch.save({"optimizer_state_dict": state}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        change(tag)
        return folder

    return make


def diffusers(
    change: Callable[[dict, dict], Any] = lambda content, names: None, binary: bool = False
) -> Callable[[Path], Path]:
    """A folder of diffusers' DiTTransformer2DModel, written without diffusers; `change` may spoil it."""

    def make(folder: Path) -> Path:
        model = config().model
        content = {
            "_class_name": "DiTTransformer2DModel",
            "_diffusers_version": "0.36.0",
            "num_attention_heads": model.heads,
            "attention_head_dim": model.head_dim,
            "in_channels": model.in_channels,
            "out_channels": model.out_channels,
            "num_layers": model.depth,
            "sample_size": model.input_size,
            "patch_size": model.patch_size,
            "num_embeds_ada_norm": model.num_classes,
        }
        names = diffusers_names(tensors()["master"], model.depth)
        change(content, names)
        (folder / "config.json").write_text(json.dumps(content))
        if binary:
            torch.save(names, folder / "diffusion_pytorch_model.bin")
        else:
            save_file(names, folder / "diffusion_pytorch_model.safetensors")
        return folder

    return make


def diffusers_names(ours: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """Tensors of a dense DiT under diffusers' names. Source: diffusers' convert_dit_to_diffusers.py."""
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }
    for block in range(depth):
        inside = f"transformer_blocks.{block}"
        parts = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
        parts |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
        names |= {f"blocks.{block}.{part}": f"{inside}.{theirs}" for part, theirs in parts.items()}
    out = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            out[f"{names[module]}.{kind}"] = tensor.clone()
        elif ".qkv" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[f"transformer_{module.removesuffix('qkv')}".replace("attn", "attn1") + f"to_{letter}.{kind}"] = (
                    part.clone()
                )
        else:
            last = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
            theirs = last.get(module, "class_embedder.embedding_table")
            for block in range(depth):
                out[f"transformer_blocks.{block}.norm1.emb.{theirs}.{kind}"] = tensor.clone()
    return out


def pipeline(folder: Path) -> Path:
    (folder / "model_index.json").write_text("{}")
    (folder / "transformer").mkdir()
    return folder


def drop(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def set_in(index: dict, name: str, value: Any) -> None:
    index["weight_map"][name] = value


def with_nan() -> dict:
    content = weights()
    content["final_layer.linear.bias"] = torch.full_like(content["final_layer.linear.bias"], float("nan"))
    return content


def scaled_positions() -> dict:
    return weights() | {"pos_embed": 0.5 * positions()}


def more_positions() -> dict:
    return weights() | {"pos_embed": position_table(8, config().model.hidden_size)[None]}

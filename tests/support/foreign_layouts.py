"""Files as other projects write them: how each is made, and whether it is read or refused; docs/convert.md lists them.

All are of one tiny dense DiT (`TENSORS`: kind -> published name -> tensor), so that what is read can be compared.
"""

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Layout:
    """One foreign layout.

    Attributes:
        make: writes it into a folder, and returns the path to open.
        how: what the documentation says: "read ..." or "refused: ...".
        refused: what the message must say; empty if it is read.
        kinds: kinds that are read from the file; others start as they do without.
        notes: what a note must say, each.
        rounding: type to which the file's weights were rounded.
    """

    make: Callable[[Path], Path]
    how: str
    refused: str = ""
    kinds: tuple[str, ...] = KINDS
    notes: tuple[str, ...] = ()
    rounding: torch.dtype = torch.float32


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


CLASSES = "norm1.emb.class_embedder.embedding_table.weight"
WEIGHTS = ("master",)
SIT = {"model": "SiT-S/2", "path_type": "Linear", "prediction": "velocity"}
ASKED = "does not say what it was trained to predict"

LAYOUTS = {
    "`.pth`: names and tensors alone": Layout(
        saved(weights), "read as masters and averages; moments start at zero", kinds=WEIGHTS, notes=(ASKED,)
    ),
    "the same without `pos_embed`": Layout(
        saved(lambda: weights(table=False)), "read; positions are computed", kinds=WEIGHTS
    ),
    "`.pth` in bfloat16": Layout(
        saved(lambda: weights(dtype=torch.bfloat16)),
        "read, widened to float32, with a note",
        kinds=WEIGHTS,
        notes=("are bfloat16: widened to float32",),
        rounding=torch.bfloat16,
    ),
    "`.pth` in float16": Layout(
        saved(lambda: weights(dtype=torch.float16)),
        "read, widened to float32, with a note",
        kinds=WEIGHTS,
        notes=("are float16: widened to float32",),
        rounding=torch.float16,
    ),
    "`.pth` in float64": Layout(
        saved(lambda: weights(dtype=torch.float64)),
        "read, rounded to float32, with a note",
        kinds=WEIGHTS,
        notes=("are float64: rounded to float32",),
    ),
    "`.pth` in int8 or float8": Layout(
        saved(lambda: {name: t.to(torch.int8) for name, t in weights().items()}),
        "refused: quantised weights have scales that are not known",
        refused="is int8; weights must be float32",
    ),
    "names with `module.` (DistributedDataParallel)": Layout(
        saved(lambda: weights(prefix="module.")), "read without it", kinds=WEIGHTS, notes=("read without module.",)
    ),
    "names with `_orig_mod.` (torch.compile), also after `module.`": Layout(
        saved(lambda: weights(prefix="module._orig_mod.")),
        "read without them",
        kinds=WEIGHTS,
        notes=("read without _orig_mod., module.",),
    ),
    "names with `_fsdp_wrapped_module.` or `_checkpoint_wrapped_module.` within": Layout(
        saved(
            lambda: {
                f"_fsdp_wrapped_module.{name}".replace(
                    ".attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.attn."
                ): t
                for name, t in weights().items()
            }
        ),
        "read without them",
        kinds=WEIGHTS,
    ),
    "names with `_forward_module.` (Lightning's DeepSpeed)": Layout(
        saved(lambda: weights(prefix="_forward_module.")), "read without it", kinds=WEIGHTS
    ),
    "names with `ema.`, `ema_model.` alone": Layout(
        saved(lambda: weights("ema", prefix="ema_model.")), "read as averages, and as masters too", kinds=("ema",)
    ),
    "`model.` and `ema.` in one state dict": Layout(
        saved(lambda: {"state_dict": weights(prefix="model.") | weights("ema", prefix="ema.module.")}),
        "read as masters and averages",
        kinds=("master", "ema"),
    ),
    "two names that are one without wrappers": Layout(
        saved(lambda: weights() | weights(prefix="module.")),
        "refused: which is meant is not known",
        refused="are both pos_embed",
    ),
    "other names": Layout(
        saved(lambda: {"backbone.layer.weight": torch.zeros(3)}),
        "refused, with the file's own names beside those expected",
        refused="the file has, and the model has not: backbone.layer.weight\n  the model has, and the file has not: x_",
    ),
    "DiT: `model`, `ema`, `opt`, `args`": Layout(
        saved(lambda: training(model="DiT-S/2", image_size=256)),
        "read, with moments; `args` tell that it is DDPM's",
        notes=("its step; 10",),
    ),
    "SiT: `model`, `ema`, `opt`, `args`": Layout(
        saved(lambda: training(**SIT)), "read, with moments; its time and sign are turned (`model.time_input=sit`)"
    ),
    "REPA: the same and `steps`, `projectors.*`": Layout(
        saved(repa),
        "read, with moments, without the projectors (`model.time_input=repa`)",
        notes=("projectors are left out",),
    ),
    "DiffMoE: `model`, `ema`, `opt`, `args` with a path alone": Layout(
        saved(lambda: training(config="config/000.yaml")),
        "read, with moments; `args` do not tell what it predicts: give `--objective`",
        notes=(ASKED,),
    ),
    "SiT with `path_type` GVP or VP, or `prediction` score or noise": Layout(
        saved(lambda: training(**SIT | {"path_type": "GVP"})),
        "refused: there are straight paths with velocities alone",
        refused="path_type = GVP, prediction = velocity; only straight paths",
    ),
    "`state_dict`, `optimizer_states`, `global_step` (Lightning)": Layout(
        saved(lambda: {"state_dict": weights(), "optimizer_states": [optimizer()], "global_step": 7, "epoch": 1}),
        "read, with moments; what is not read is named",
        kinds=("master", "exp_avg", "exp_avg_sq"),
        notes=("not read: epoch",),
    ),
    "`model` and `state_dict` in one file": Layout(
        saved(lambda: {"model": weights(), "state_dict": weights("ema")}),
        "refused: which is meant is not known",
        refused="has model and state_dict",
    ),
    "averages as a list (`shadow_params`)": Layout(
        saved(lambda: {"model": weights(), "ema": {"decay": torch.ones(1), "shadow_params": []}}),
        "refused: which value is of which parameter is not told",
        refused="ema.shadow_params is no tensor",
    ),
    "an optimizer other than AdamW": Layout(
        saved(broken_moment(lambda o: o.update(state={1: {"momentum_buffer": torch.zeros(2)}}))),
        "read without moments, with a note",
        kinds=("master", "ema"),
        notes=("its optimizer is not AdamW (it holds momentum_buffer)",),
    ),
    "AdamW without some `exp_avg`": Layout(
        saved(broken_moment(lambda o: o["state"][3].pop("exp_avg"))), "refused", refused="the exp_avg of t_embedder"
    ),
    "AdamW's moments of another shape": Layout(
        saved(broken_moment(lambda o: o["state"][3].update(exp_avg_sq=torch.zeros(7)))),
        "refused",
        refused="the exp_avg_sq of t_embedder.* of another shape",
    ),
    "AdamW of more or fewer parameters": Layout(
        saved(lambda: training(lambda: optimizer(2))), "refused", refused="do not belong together"
    ),
    "AdamW whose `step` is no number": Layout(
        saved(broken_moment(lambda o: o["state"][3].update(step="ten"))),
        "refused",
        refused="step of .* is no whole number",
    ),
    "Python objects other than `argparse.Namespace` and plain values": Layout(
        saved(lambda: training() | {"args": Config()}),
        "refused, unopened: they could run code",
        refused="refused: it holds Python objects other than tensors",
    ),
    "positions that are not the model's": Layout(
        saved(scaled_positions), "refused: the model computes its positions", refused="its pos_embed .* is not what the"
    ),
    "another number of positions": Layout(
        saved(more_positions), "refused", refused=r"its pos_embed is \(1, 64, 32\), the config's model has 16 positions"
    ),
    "safetensors: names and tensors alone": Layout(
        safetensors_file(weights), "read as masters and averages; moments start at zero", kinds=WEIGHTS, notes=(ASKED,)
    ),
    "safetensors in half precision": Layout(
        safetensors_file(lambda: weights(dtype=torch.float16)),
        "read, widened to float32, with a note",
        kinds=WEIGHTS,
        notes=("are float16: widened to float32",),
        rounding=torch.float16,
    ),
    "safetensors with other positions": Layout(
        safetensors_file(scaled_positions),
        "refused: the model computes its positions",
        refused="is not what the config",
    ),
    "safetensors with another number of positions": Layout(
        safetensors_file(more_positions), "refused", refused="the config's model has 16 positions"
    ),
    "sharded safetensors: `*.safetensors.index.json`": Layout(sharded(), "read", kinds=WEIGHTS),
    "the same, a shard missing": Layout(
        sharded(lambda index, folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        "refused",
        refused="model-00002-of-00002.safetensors: is missing",
    ),
    "the same, a path instead of a file's name": Layout(
        sharded(lambda index, folder: set_in(index, "x_embedder.proj.bias", "../a.safetensors")),
        "refused",
        refused="'../a.safetensors' is no plain name",
    ),
    "the same, a tensor in two shards": Layout(
        sharded(
            lambda index, folder: save_file(
                {n: t.contiguous() for n, t in weights(table=False).items()},
                folder / "model-00002-of-00002.safetensors",
            )
        ),
        "refused",
        refused="and so does model-00001-of-00002.safetensors",
    ),
    "the same, a tensor in no shard": Layout(
        sharded(lambda index, folder: set_in(index, "more.weight", "model-00001-of-00002.safetensors")),
        "refused",
        refused="does not hold more.weight",
    ),
    "diffusers' `DiTTransformer2DModel` folder": Layout(
        diffusers(),
        "read: renamed, q, k and v joined, its time frequencies and epsilon kept",
        kinds=WEIGHTS,
        notes=("the model computes as diffusers does (model.time_frequency_shift=1, model.mlp_norm_eps=1e-05)",),
    ),
    "the same with `.bin`, as older versions wrote it": Layout(diffusers(binary=True), "read", kinds=WEIGHTS),
    "the same, blocks with embeddings of their own": Layout(
        diffusers(lambda content, names: names[f"transformer_blocks.1.{CLASSES}"].add_(1)),
        "refused: DiT has one",
        refused="transformer_blocks.1.norm1.* is not transformer_blocks.0.norm1",
    ),
    "the same, with another normalisation, activation, ...": Layout(
        diffusers(lambda content, names: content.update(activation_fn="geglu")),
        "refused",
        refused="config.json has activation_fn = 'geglu'",
    ),
    "another model of diffusers": Layout(
        diffusers(lambda content, names: content.update(_class_name="UNet2DConditionModel")),
        "refused",
        refused="is a UNet2DConditionModel of diffusers",
    ),
    "a whole pipeline of diffusers (`model_index.json`)": Layout(
        pipeline, "refused: give the folder `transformer` in it", refused="give its model, .*transformer"
    ),
    "DeepSpeed ZeRO-1 and 2 in half precision": Layout(
        zero(), "read: masters and moments are the ranks' float32 shards", kinds=("master", "exp_avg", "exp_avg_sq")
    ),
    "the same, a rank's file missing": Layout(
        zero(drop("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")), "refused", refused="but none of rank 0"
    ),
    "the same, without the last rank's file": Layout(
        zero(drop("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")), "refused", refused="was written by 2 ranks"
    ),
    "the same, without any shards": Layout(
        zero(lambda folder: [file.unlink() for file in folder.glob("bf16_*")]),
        "read, widened to float32, with a note",
        kinds=WEIGHTS,
        notes=("are bfloat16: widened to float32",),
        rounding=torch.bfloat16,
    ),
    "DeepSpeed ZeRO-3, or tensor parallelism": Layout(
        zero(lambda folder: (folder / "mp_rank_00_model_states.pt").rename(folder / "mp_rank_01_model_states.pt")),
        "refused: merge it with DeepSpeed first",
        refused="is split by tensor parallelism or ZeRO-3",
    ),
    "NaN or infinity in any of them": Layout(
        saved(with_nan),
        "refused when it is converted, with the tensor's name; `--allow-nonfinite` goes on",
        kinds=(),
    ),
}

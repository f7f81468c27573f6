"""Layouts of other projects' checkpoints: how each is made, and whether it is read; docs/convert.md has the table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.foreign_files import (
    CLASSES,
    KINDS,
    broken_moment,
    diffusers,
    drop,
    more_positions,
    optimizer,
    pipeline,
    repa,
    safetensors_file,
    saved,
    scaled_positions,
    set_in,
    sharded,
    training,
    weights,
    with_nan,
    zero,
)

from megapromoe.config.options import Config


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


WEIGHTS = ("master",)
SIT = {"model": "SiT-S/2", "path_type": "Linear", "prediction": "velocity"}
NO_OBJECTIVE = "does not contain its training objective"

LAYOUTS = {
    "`.pth`: only names and tensors": Layout(
        saved(weights), "read as masters and averages; moments start at zero", kinds=WEIGHTS, notes=(NO_OBJECTIVE,)
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
    "only names with `ema.`, `ema_model.`": Layout(
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
        refused="only in the file: backbone.layer.weight\n  only in the model: x_",
    ),
    "DiT: `model`, `ema`, `opt`, `args`": Layout(
        saved(lambda: training(model="DiT-S/2", image_size=256)),
        "read, with moments; `args` show that it is DDPM's",
        notes=("its step; 10",),
    ),
    "SiT: `model`, `ema`, `opt`, `args`": Layout(
        saved(lambda: training(**SIT)), "read, with moments; its time and sign are turned (`model.time_input=sit`)"
    ),
    "REPA: the same and `steps`, `projectors.*`": Layout(
        saved(repa),
        "read, with moments, without the projectors (`model.time_input=repa`)",
        notes=("projectors are omitted",),
    ),
    "DiffMoE: `model`, `ema`, `opt`, `args` with only a path": Layout(
        saved(lambda: training(config="config/000.yaml")),
        "read, with moments; `args` do not contain what it predicts: give `--objective`",
        notes=(NO_OBJECTIVE,),
    ),
    "SiT with `path_type` GVP or VP, or `prediction` score or noise": Layout(
        saved(lambda: training(**SIT | {"path_type": "GVP"})),
        "refused: only straight paths with velocities are supported",
        refused="path_type = GVP, prediction = velocity; only the linear path",
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
        refused="has both model and state_dict",
    ),
    "averages as a list (`shadow_params`)": Layout(
        saved(lambda: {"model": weights(), "ema": {"decay": torch.ones(1), "shadow_params": []}}),
        "refused: the file does not contain which value belongs to which parameter",
        refused="ema.shadow_params is not a tensor",
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
        refused="the exp_avg_sq of t_embedder.* has another shape",
    ),
    "AdamW of more or fewer parameters": Layout(
        saved(lambda: training(lambda: optimizer(2))), "refused", refused="are of different models"
    ),
    "AdamW whose `step` is no number": Layout(
        saved(broken_moment(lambda o: o["state"][3].update(step="ten"))),
        "refused",
        refused="step of .* is not a whole number",
    ),
    "Python objects other than `argparse.Namespace` and plain values": Layout(
        saved(lambda: training() | {"args": Config()}),
        "refused, unopened: they could run code",
        refused="refused: it holds Python objects other than tensors",
    ),
    "positions that are not the model's": Layout(
        saved(scaled_positions),
        "refused: the model computes its positions",
        refused="its pos_embed .* differs from the model's",
    ),
    "another number of positions": Layout(
        saved(more_positions), "refused", refused=r"its pos_embed is \(1, 64, 32\), the config's model has 16 positions"
    ),
    "safetensors: only names and tensors": Layout(
        safetensors_file(weights),
        "read as masters and averages; moments start at zero",
        kinds=WEIGHTS,
        notes=(NO_OBJECTIVE,),
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
        refused="differs from the model's",
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
        refused="'../a.safetensors' is not a plain name",
    ),
    "the same, a tensor in two shards": Layout(
        sharded(
            lambda index, folder: save_file(
                {n: t.contiguous() for n, t in weights(table=False).items()},
                folder / "model-00002-of-00002.safetensors",
            )
        ),
        "refused",
        refused="which is in model-00001-of-00002.safetensors too",
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
        refused="transformer_blocks.1.norm1.* differs from transformer_blocks.0.norm1",
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
        "refused when it is converted, with the tensor's name; `--allow-nonfinite` converts them",
        kinds=(),
    ),
}

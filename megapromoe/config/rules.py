"""The rules between options that hold for any number of ranks, each with its remedy."""

import math
import re
from collections.abc import Iterator

from megapromoe.config import class_groups
from megapromoe.config.data_options import FIXED_SIZES, UNSET
from megapromoe.config.expert_placement import AUTO, CONTIGUOUS
from megapromoe.config.model_options import (
    BIASED_ROUTERS,
    EXPERT_CHOICE_ROUTERS,
    GUIDED_ROUTERS,
    UNROUTED,
    ModelConfig,
)
from megapromoe.config.options import Config, Rule
from megapromoe.config.reader import nearest, nearest_divisors, nearest_multiples
from megapromoe.config.train_options import MAX_PROFILED, TrainConfig


def rules(config: Config) -> Iterator[Rule]:
    """The broken rules between fields, of those that hold for any number of ranks."""
    model, parallel, data, sample, train = (
        config.model,
        config.parallel,
        config.data,
        config.sample,
        config.train,
    )
    size, experts, tp = model.hidden_size, model.num_experts, parallel.tp

    if size % model.heads:
        near = nearest_divisors(model.heads, size)
        yield ("model.heads", "model.hidden_size"), f"must divide model.hidden_size = {size}; nearest: {near}"
    if model.positions == "rope" and size % model.heads == 0 and model.head_dim % 4:
        heads = [h for h in range(1, size + 1) if size % h == 0 and size // h % 4 == 0]
        remedy = f"nearest: {nearest(model.heads, heads)}" if heads else "none does, choose another model.hidden_size"
        rule = f"must divide model.hidden_size = {size} into heads of a multiple of 4 channels with rope; {remedy}"
        yield ("model.heads", "model.hidden_size", "model.positions"), rule
    if model.positions == "sincos" and size % 4:
        near = nearest_multiples(size, 4)
        rule = f"must be a multiple of 4 (sine and cosine of x and y); nearest: {near}"
        yield ("model.hidden_size", "model.positions"), rule
    if model.input_size % model.patch_size:
        near = nearest_divisors(model.patch_size, model.input_size)
        rule = f"must divide model.input_size = {model.input_size}; nearest: {near}"
        yield ("model.patch_size", "model.input_size"), rule

    for name, width in (("mlp_ratio", model.mlp_width), ("expert_ratio", model.moe_width)):
        if width < 1:
            rule = f"times model.hidden_size = {size} must be at least 1; use {1 / size:.3g} or more"
            yield (f"model.{name}", "model.hidden_size"), rule
    keys: tuple[str, ...]
    split: list[tuple[str, int, tuple[str, ...]]] = [("model.heads", model.heads, ("model.heads",))]
    if len(model.expert_blocks) < model.depth:
        keys = ("model.hidden_size", "model.mlp_ratio")
        split.append(("hidden_size * mlp_ratio", model.mlp_width, keys))
    if model.expert_blocks:
        # The shared and the unconditional experts are split like a dense MLP, the routed ones with expert_tp.
        inherited = model.shared_experts and not model.shared_expert_width
        if parallel.expert_tp or model.unconditional_experts or inherited:
            if model.expert_width:
                split.append(("model.expert_width", model.moe_width, ("model.expert_width",)))
            else:
                keys = ("model.hidden_size", "model.expert_ratio")
                split.append(("hidden_size * expert_ratio", model.moe_width, keys))
        if model.shared_experts and model.shared_expert_width:
            split.append(("model.shared_expert_width", model.shared_width, ("model.shared_expert_width",)))
    for name, width, keys in split:
        if width % tp:
            yield (
                ("parallel.tp", *keys),
                f"must divide {name} = {width}; nearest: {nearest_divisors(tp, width)}",
            )

    if model.router in UNROUTED:
        which = "experts" if model.router == "dense" else "routed experts"
        router = f"model.router = {model.router!r}, which has no {which}"
        if parallel.ep > 1:
            yield ("parallel.ep", "model.router"), f"must be 1 with {router}"
        if parallel.recompute == "moe":
            yield ("parallel.recompute", "model.router"), f"must be none, blocks or all with {router}"
    elif parallel.ep > experts:
        yield ("parallel.ep", "model.num_experts"), f"must be at most model.num_experts = {experts}"
    if model.router != "dense" and model.moe_every > model.depth:
        rule = f"must be at most model.depth = {model.depth}, or no block has experts (set router=dense)"
        yield ("model.moe_every", "model.depth", "model.router"), rule
    if parallel.replicas and parallel.placement == CONTIGUOUS:
        rule = (
            "must be 0 with parallel.placement = 'contiguous': which experts have copies is chosen from the load of the"
            " run; give parallel.placement=auto, or a file of `megapromoe routing place --replicas`"
        )
        yield ("parallel.replicas", "parallel.placement"), rule
    elif parallel.replicas and parallel.placement != AUTO:
        rule = (
            f"must be 0 with parallel.placement = {parallel.placement!r}: a file lists its copies itself, and"
            " `megapromoe routing place --replicas` writes them; leave the option out, or give parallel.placement=auto"
        )
        yield ("parallel.replicas", "parallel.placement"), rule
    yield from _condition_rules(config)
    yield from _alignment_rules(config)
    yield from layer_rules(model)
    if model.router == "ec" and model.expert_capacity < 1:
        most = model.tokens * model.top_k
        rule = f"must be at most {most} = tokens * top_k, or no expert selects a token of an image"
        fields = ("num_experts", "top_k", "input_size", "patch_size", "router")
        yield tuple(f"model.{field}" for field in fields), rule

    objective = config.diffusion.objective
    methods = {"rf": ("euler", "heun"), "ddpm": ("ddpm", "ddim")}[objective]
    other_methods = {"rf": ("ddpm", "ddim"), "ddpm": ("euler", "heun")}[objective]
    if sample.method in other_methods:
        rule = f"must be {', '.join(methods)}, unipc or dpm_solver++ with diffusion.objective = {objective!r}"
        yield ("sample.method", "diffusion.objective"), rule
    if objective == "ddpm" and sample.steps > 1000:
        yield (
            ("sample.steps", "diffusion.objective"),
            "must be at most 1000, the steps of DDPM's noise schedule",
        )
    if objective == "ddpm" and not model.learn_sigma:
        rule = "must be true with diffusion.objective = 'ddpm', which learns the variance"
        yield ("model.learn_sigma", "diffusion.objective"), rule
    if objective == "ddpm" and config.diffusion.shift_base:
        yield ("diffusion.shift_base", "diffusion.objective"), "must be 0 with diffusion.objective = 'ddpm'"
    if sample.guidance_low > sample.guidance_high:
        rule = f"must be at most sample.guidance_high = {sample.guidance_high}"
        yield ("sample.guidance_low", "sample.guidance_high"), rule

    if data.source in FIXED_SIZES:
        size = FIXED_SIZES[data.source]
        for name, needed in (("in_channels", 1), ("input_size", size), ("num_classes", 10)):
            if getattr(model, name) != needed:
                rule = (
                    f"must be {needed} with data.source = {data.source!r}: {size}x{size} pixels, 1 channel, 10 classes"
                )
                yield (f"model.{name}", "data.source"), rule
    stratum, rate = data.condition_dropout_stratum, data.condition_dropout
    if not data.drops_whole_numbers(stratum):
        nearest_counts = {math.floor(stratum * rate), math.ceil(stratum * rate)}
        rates = " or ".join(f"{count / stratum!r}" for count in sorted(nearest_counts) if count < stratum)
        rule = (
            f"times data.condition_dropout = {rate} must be a whole number, the labels dropped of each {stratum}"
            f" samples; set data.condition_dropout to {rates}, or data.condition_dropout_stratum to 0"
        )
        yield ("data.condition_dropout_stratum", "data.condition_dropout"), rule
    if data.source == "latents" and not data.path:
        yield ("data.path", "data.source"), "must be the folder of the latents with data.source = 'latents'"
    for name, sources in (("path", ("latents", "fashion_mnist")), ("test_path", ("latents",)), ("cache", ("latents",))):
        if getattr(data, name) and data.source not in sources:
            rule = f"must be empty with data.source = {data.source!r}; it is for {' and '.join(sources)}"
            if data.source == UNSET:
                rule = f"is for data.source = {' or '.join(sources)}: set that as well"
            yield (f"data.{name}", "data.source"), rule
    if data.source == "digits" and data.flip:
        yield ("data.flip", "data.source"), "must be false with data.source = 'digits': mirrored digits are not digits"

    if not train.init_from:
        for name in ("init_weights", "init_classes"):
            if (default := getattr(TrainConfig, name)) != getattr(train, name):
                rule = f"must be {default} without train.init_from, the checkpoint to start from"
                yield (f"train.{name}", "train.init_from"), rule
    elif model.has_text and train.init_classes != TrainConfig.init_classes:
        rule = "must be same with model.condition = 'text', which has no classes"
        yield ("train.init_classes", "model.condition"), rule
    yield from _watching_rules(config)
    yield from _muon_rules(config)
    if train.warmup > train.steps:
        yield ("train.warmup", "train.steps"), f"must be at most train.steps = {train.steps}"
    if train.decay_start >= 1 and train.decay_start != int(train.decay_start):
        yield ("train.decay_start",), "must be a whole number, a step, or a fraction below 1"
    elif train.schedule == "wsd" and not train.warmup <= train.decay_start_step < train.steps:
        rule = (
            f"must be a step from train.warmup = {train.warmup} to below train.steps = {train.steps}, or a fraction"
            f" such as 0.8 of these, not step {train.decay_start_step}"
        )
        yield ("train.decay_start", "train.steps", "train.warmup", "train.schedule"), rule
    if train.schedule in ("cosine", "wsd") and train.min_lr > train.lr:
        yield ("train.min_lr", "train.lr", "train.schedule"), f"must be at most train.lr = {train.lr}"


def _watching_rules(config: Config) -> Iterator[Rule]:
    """The broken rules on the options that only watch a run."""
    train, steps = config.train, config.train.profiled_steps
    if train.profile and not steps:
        rule = "must be FROM:TO, two step numbers from 1 of which TO is not the smaller one, such as 100:102"
        yield ("train.profile",), rule
    elif steps and steps[-1] > train.steps:
        yield ("train.profile", "train.steps"), f"must end at step {train.steps}, the last one (train.steps), or before"
    elif len(steps) > MAX_PROFILED:
        rule = f"must have at most {MAX_PROFILED} steps, not {len(steps)}: traces are large; three steps show the most"
        yield ("train.profile",), rule
    if train.wandb and not re.fullmatch(r"([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+", train.wandb):
        rule = "must be PROJECT or ENTITY/PROJECT, of letters, digits, '.', '-' and '_'"
        yield ("train.wandb",), rule


def _alignment_rules(config: Config) -> Iterator[Rule]:
    """The broken rules of the alignment with a teacher."""
    model, data = config.model, config.data
    if not model.align_block:
        if model.align_width:
            yield ("model.align_width", "model.align_block"), "must be 0 without model.align_block; or set that as well"
        return
    if model.align_block > model.depth:
        yield ("model.align_block", "model.depth"), f"must be at most model.depth = {model.depth}"
    if not model.align_width:
        rule = "must be the channels of the teacher's features, 1 or more, with model.align_block"
        yield ("model.align_width", "model.align_block"), rule
    if data.source not in ("latents", "synthetic", UNSET):
        rule = "must be latents or synthetic with model.align_block; other sources have no features of a teacher"
        yield ("data.source", "model.align_block"), rule


def _muon_rules(config: Config) -> Iterator[Rule]:
    """The broken rules of Muon."""
    train = config.train
    if train.optimizer != "muon":
        return
    if config.parallel.tp > 1:
        rule = (
            "must be 1 with train.optimizer = 'muon', which orthogonalises whole matrices, and tp divides them; use"
            " parallel.ep and ZeRO (train.deepspeed), or train.optimizer=adamw"
        )
        yield ("parallel.tp", "train.optimizer"), rule
    if train.adamw_backend not in ("torch", "fused"):
        rule = "must be torch or fused with train.optimizer = 'muon', which runs beside AdamW in one optimizer"
        yield ("train.adamw_backend", "train.optimizer"), rule
    if train.muon_scale == "original" and not train.muon_lr:
        rule = (
            "must be given with train.muon_scale = 'original', whose updates are larger than those of AdamW: use"
            " train.muon_lr=0.02, its author's, or train.muon_scale=match_rms_adamw"
        )
        yield ("train.muon_lr", "train.muon_scale"), rule


def _condition_rules(config: Config) -> Iterator[Rule]:
    """The broken rules of classes and texts."""
    model, data = config.model, config.data
    if not model.has_text:
        for name in ("text_width", "text_tokens", "text_ffn"):
            if getattr(model, name):
                rule = "must be 0 with model.condition = 'class'; or set model.condition=text"
                yield (f"model.{name}", "model.condition"), rule
        return
    needed = {"text_width": "the channels of the text features", "text_tokens": "the most tokens of a text"}
    for name, what in needed.items():
        if not getattr(model, name):
            yield (f"model.{name}", "model.condition"), f"must be {what}, 1 or more, with model.condition = 'text'"
    for name in ("num_classes", "superclasses"):
        default = getattr(ModelConfig, name)
        if getattr(model, name) != default:
            rule = f"must be {default}, its default, with model.condition = 'text', which has no classes"
            yield (f"model.{name}", "model.condition"), rule
    if model.router == "classification":
        rule = "must be another with model.condition = 'text', which has no classes"
        yield ("model.router", "model.condition"), rule
    if data.source not in ("latents", "synthetic", UNSET):
        rule = "must be latents or synthetic with model.condition = 'text'; other sources have no captions"
        yield ("data.source", "model.condition"), rule
    if config.train.sample_every and data.source == "synthetic":
        rule = "must be 0 with data.source = 'synthetic' and model.condition = 'text': it has no captions in words"
        yield ("train.sample_every", "data.source", "model.condition"), rule
    if model.text_ffn % config.parallel.tp:
        near = nearest_divisors(config.parallel.tp, model.text_ffn)
        rule = f"must divide model.text_ffn = {model.text_ffn}; nearest: {near}"
        yield ("parallel.tp", "model.text_ffn"), rule


def layer_rules(model: ModelConfig) -> Iterator[Rule]:
    """The broken rules of the options of an MoE layer, which also hold for a layer outside of our models."""
    if model.router not in UNROUTED and model.top_k > model.num_experts:
        yield ("model.top_k", "model.num_experts"), f"must be at most model.num_experts = {model.num_experts}"
    yield from _guided_rules(model)
    if model.balance_bias and model.router not in BIASED_ROUTERS:
        rule = f"must be 0 with model.router = {model.router!r}; it is for {', '.join(BIASED_ROUTERS)}"
        yield ("model.balance_bias", "model.router"), rule
    yield from _dense_expert_rules(model)
    if model.capacity_factor and model.router == "race":
        rule = "must be 0 with model.router = 'race', whose rows on a rank depend on the scores of the whole batch"
        yield ("model.capacity_factor", "model.router"), rule
    if model.capacity_factor and model.router in (*UNROUTED, *EXPERT_CHOICE_ROUTERS):
        rule = (
            f"must be 0 with model.router = {model.router!r}, which never assigns more than an even share to an expert"
        )
        yield ("model.capacity_factor", "model.router"), rule


def _dense_expert_rules(model: ModelConfig) -> Iterator[Rule]:
    """The broken rules of the options of shared and unconditional experts, for a model without such experts."""
    if model.router == "dense":  # ignores all options of experts
        return
    if model.router == "conditional" and not model.unconditional_expert:
        rule = "must be true with model.router = 'conditional', which has experts for null images; or set router=dense"
        yield ("model.unconditional_expert", "model.router"), rule
    for kind, count, others in (
        ("shared", model.shared_experts, [("shared_expert_width", 0)]),
        ("unconditional", model.unconditional_experts, []),
    ):
        if count:
            continue
        two_step = model.has_two_step_router
        why = (
            f"model.{kind}_expert = false"
            if two_step
            else f"model.router = {model.router!r}, which has no {kind} expert"
        )
        for name, neutral in [(f"num_{kind}_experts", 1), *others]:
            if getattr(model, name) != neutral:
                keys = (f"model.{name}", f"model.{kind}_expert" if two_step else "model.router")
                yield keys, f"must be {neutral} with {why}"


def _guided_rules(model: ModelConfig) -> Iterator[Rule]:
    """The broken rules of the routers that are guided by classes or k-means."""
    if model.router not in GUIDED_ROUTERS:
        return
    router = f"with model.router = {model.router!r}"
    if model.top_k != 1:
        yield ("model.top_k", "model.router"), f"must be 1 {router}, whose super-classes or clusters do not overlap"
    if model.router == "classification":
        keys = ("model.superclasses", "model.num_classes", "model.num_experts", "model.router")
        for problem in class_groups.superclass_problems(model.superclasses, model.num_classes, model.num_experts):
            yield keys, problem
        return
    if model.batch_scope != "global":
        rule = f"must be global {router}, whose centroids are the same on all ranks"
        yield ("model.batch_scope", "model.router"), rule
    if model.balance_weight:
        rule = f"must be 0 {router}, which has no parameters to balance; k-means moves centroids of dead experts"
        yield ("model.balance_weight", "model.router"), rule

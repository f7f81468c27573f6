"""The options `train.*`: the optimizer, the schedule, checkpoints and limits of training."""

import re
from dataclasses import dataclass

from megapromoe.config import class_groups
from megapromoe.config.reader import ONE_UP, POSITIVE, ZERO_UP, Numbers, option

MAX_PROFILED = 100  # steps: a trace of a step of XL has some 100 MB before compression


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
    weight_decay: float = option(0.0, "AdamW and Muon: weight decay", within=ZERO_UP)
    warmup: int = option(
        0,
        "length of the linear warm-up of the learning rate, in steps; a preset's is at most a tenth of train.steps",
        within=ZERO_UP,
    )
    schedule: str = option(
        "constant",
        "course of the learning rate after the warm-up: constant; a cosine to train.min_lr; or constant until"
        " train.decay_start and then a decay to train.min_lr (warm-up, stable, decay: wsd)",
        ("constant", "cosine", "wsd"),
    )
    decay_start: float = option(
        0.8, "wsd: where the decay begins, as a step, or below 1 as a fraction of train.steps", within=POSITIVE
    )
    decay_shape: str = option(
        "1-sqrt",
        "wsd: course of the decay, at a share p of it: 1 - p (linear) or 1 - sqrt(p) (1-sqrt)",
        ("linear", "1-sqrt"),
    )
    min_lr: float = option(0.0, "learning rate at the end of the schedules cosine and wsd", within=ZERO_UP)
    max_grad_norm: float = option(
        0.5,
        "largest gradient norm; larger gradients are scaled down to it; 0: no clipping; with Muon it is the norm of"
        " AdamW's parameters, which alone are clipped",
        within=ZERO_UP,
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
    optimizer: str = option(
        "adamw",
        "optimizer: AdamW, or Muon for the matrices of attention, MLPs and experts and AdamW for all other parameters",
        ("adamw", "muon"),
    )
    muon_lr: float = option(
        0.0,
        "Muon: peak learning rate, which follows the same schedule as train.lr, that of AdamW; 0: train.lr",
        within=ZERO_UP,
    )
    muon_momentum: float = option(0.95, "Muon: decay of the momentum", within="[0, 1)")
    muon_nesterov: bool = option(True, "Muon: Nesterov's momentum")
    muon_steps: int = option(
        5, "Muon: number of Newton-Schulz steps by which a matrix is orthogonalised", within="[1, 100]"
    )
    muon_scale: str = option(
        "match_rms_adamw",
        "Muon: factor of an update of m outputs and n inputs: 0.2 * sqrt(max(m, n)), which suits learning rates of"
        " AdamW (match_rms_adamw), or sqrt(max(1, m / n)) (original)",
        ("match_rms_adamw", "original"),
    )
    adamw_backend: str = option(
        "torch",
        "AdamW: implementation of the fused update; 'fused' compiles one of its own, which includes clipping, averaged"
        " weights and the cast to the parameters",
        ("torch", "apex", "deepspeed", "fused"),
    )
    deepspeed: str = option(
        "bf16_zero1", "DeepSpeed configuration: the name of a file in ds_configs, or a path to a .json file"
    )
    gradient_reduction: str = option(
        "auto",
        "how ZeRO stages 1 and 2 sum gradients over the ranks: each rank gets the sum of its shard (reduce_scatter), or"
        " DeepSpeed all-reduces everything, twice the bytes (all_reduce); auto: reduce_scatter, but all_reduce with"
        " Muon and with offloading. Other stages have one way only",
        ("auto", "reduce_scatter", "all_reduce"),
    )
    compile: bool = option(False, "compile the blocks with torch.compile; the first step then takes minutes")
    seed: int = option(0, "seed of the initial weights", within=ZERO_UP)
    init_from: str = option(
        "",
        "start a new run from the weights of a checkpoint of any format (docs/finetune.md): a run, a step, a .pth, a"
        " .safetensors, a folder of diffusers or DeepSpeed; empty: from train.seed. A run that resumes ignores it",
    )
    init_weights: str = option(
        "ema",
        "init_from: the weights to take: averaged (ema, or ema=DECAY of several), or as trained (master)",
        ("ema", "master"),
        accepts=lambda value: value.startswith("ema="),
        form="ema=DECAY",
    )
    init_classes: str = option(
        "same",
        "init_from: the source's class of each class: the same number (same), none (new), or a YAML or JSON file of"
        " new: old; a class without one starts as the mean of the old ones",
        ("same", "new"),
        accepts=class_groups.is_file,
        form="FILE.yaml",
    )
    timeout: float = option(
        600.0, "longest duration of a collective, in seconds, after which the run ends with an error", within=POSITIVE
    )
    step_timeout: float = option(
        300.0,
        "longest duration of a section of a step, in seconds, after which the run reports a hang and ends",
        within=POSITIVE,
    )
    log_every: int = option(10, "number of steps between log lines and metrics", within=ONE_UP)
    routing_trace_every: int = option(
        0,
        "number of steps between records of the rows that each expert gets from each rank, in routing_trace.jsonl"
        " (docs/routing.md); 0: none. A model without routed experts records nothing",
        within=ZERO_UP,
    )
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
    save_in_background: bool = option(
        True,
        "train while a checkpoint is written, from a copy in host memory; false: without a copy, training waits",
    )
    max_failed_saves: int = option(3, "number of failed saves in a row that ends the run", within=ONE_UP)
    sample_every: int = option(0, "number of steps between pictures of samples; 0: none", within=ZERO_UP)
    max_bad_steps: int = option(3, "number of skipped updates in a row that ends the run", within=ONE_UP)
    spike_factor: float = option(
        0.0,
        "skip an update whose gradient norm exceeds this multiple of the median of recent norms; 0: skip none",
        within=ZERO_UP,
    )
    wandb: str = option(
        "",
        "project of Weights & Biases, or ENTITY/PROJECT, to which rank 0 also sends the metrics; empty: none. The"
        " environment variable WANDB_MODE=offline works without a network",
    )
    profile: str = option(
        "", "steps FROM:TO, such as 100:102, of which each rank writes a trace and a memory snapshot; empty: none"
    )

    @property
    def profiled_steps(self) -> range:
        """The steps of `profile`, numbered from 1; empty without it, and for another form, which a rule refuses."""
        match = re.fullmatch(r"([1-9][0-9]{0,11}):([1-9][0-9]{0,11})", self.profile)
        return range(int(match[1]), int(match[2]) + 1) if match else range(0)

    @property
    def decay_start_step(self) -> int:
        """The number of steps before the decay of the schedule wsd."""
        return round(self.decay_start * self.steps) if self.decay_start < 1 else int(self.decay_start)

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of `ema_decay`, one or more; the first is that of previews and the default of commands."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

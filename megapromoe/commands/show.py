"""`megapromoe show`: prints the presets, or a resolved config with its size and layout."""

import argparse
import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields

from megapromoe.commands.command_line import positive
from megapromoe.commands.options import OVERRIDES, config_options, resolve_options
from megapromoe.config import extensions
from megapromoe.config.data_options import UNSET
from megapromoe.config.options import Config
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import ConfigError, check, check_trainable, resolve, to_yaml
from megapromoe.planning.cost import flops_per_image, memory_per_rank, parameters

EPILOG = OVERRIDES
JOB = False


def arguments(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    parser.add_argument(
        "--ranks", metavar="N", type=positive, help="number of ranks; default: the smallest number that tp and ep allow"
    )
    parser.add_argument(
        "--which-ranks",
        metavar="N,N,...",
        type=_numbers,
        help="print those of these numbers of ranks on which the configuration can run, one a line",
    )
    parser.add_argument(
        "--to-train", action="store_true", help="also check what only training needs: data.source must be set"
    )
    parser.add_argument("--keys", action="store_true", help="list every config key with its default and its meaning")


def run(options: argparse.Namespace, launch) -> int:
    if options.keys:
        lines = _keys()
    elif options.which_ranks is not None:
        lines = possible_ranks(resolve_options(options, None), options.which_ranks)
    elif (
        options.preset is None
        and options.config is None
        and options.ranks is None
        and not (options.overrides or options.to_train)
    ):
        lines = _presets()
    else:
        config = resolve_options(options, options.ranks)
        world = options.ranks or _fewest_ranks(config)
        check(config, world)
        if options.to_train:
            check_trainable(config)
        lines = describe(config, world)
    print("\n".join(lines))
    return 0


def possible_ranks(config: Config, numbers: Iterable[int]) -> Iterator[str]:
    """The numbers of ranks, of those given, on which the configuration can run."""
    for number in numbers:
        with contextlib.suppress(ConfigError):
            check(config, number)
            yield str(number)


def _numbers(text: str) -> list[int]:
    return [positive(number) for number in text.split(",")]


def _fewest_ranks(config: Config) -> int:
    tp, ep = config.parallel.tp, config.parallel.ep
    return tp * ep if config.parallel.expert_tp else math.lcm(tp, ep)


def _presets() -> Iterator[str]:
    yield "preset               router          D   L     E K    parameters        active  GFLOP/image  data"
    for name in PRESETS:
        config = resolve(name)
        model, count = config.model, parameters(config.model)
        experts = f"{model.num_experts:4} {model.top_k}" if model.moe_blocks else "   - -"
        flops = flops_per_image(model).forward / 1e9
        source = "yours" if config.data.source == UNSET else config.data.source
        yield (
            f"{name:20} {model.router:11} {model.hidden_size:5} {model.depth:3}  {experts} {count.total:13,}"
            f" {count.active:13,} {flops:12.4g}  {source}, {config.train.steps:,} steps"
        )
    yield ""
    yield "D hidden size, L blocks, E routed experts, K of them per token; parameters include the constant table of"
    yield "positions; active: parameters that process a token; GFLOP of a forward pass."
    yield "data yours: set data.source=latents data.path=DIR, or data.source=synthetic for timing."
    yield "megapromoe show --preset NAME prints one in full, --keys lists all keys."


def _keys() -> Iterator[str]:
    defaults = Config()
    for section in fields(Config):
        values = getattr(defaults, section.name)
        yield f"{section.name}: {str(type(values).__doc__).splitlines()[0]}"
        for f in fields(values):
            choices = [
                *f.metadata["choices"],
                *([f.metadata["form"] or extensions.FORM] if f.metadata["accepts"] else []),
            ]
            valid = " | ".join(choices) or _interval(f.metadata["within"])
            default = getattr(values, f.name)
            text = str(default).lower() if isinstance(default, bool) else default  # as in YAML: true, not True
            setting = f"{section.name}.{f.name}={text}"
            yield f"  {setting:36} {f.metadata['help']}" + (f" ({valid})" if valid else "")
        yield ""


def _interval(within: str) -> str:
    """An interval such as "[0, 1)" in words; "" for all numbers and for values that are no numbers."""
    if not within or within == "(-inf, inf)":
        return ""
    low, high = within[1:-1].split(", ")
    if high == "inf":
        return f"{low} or more" if within[0] == "[" else f"above {low}"
    return f"from {low} to {'' if within[-1] == ']' else 'below '}{high}"


def describe(config: Config, world: int) -> Iterator[str]:
    """The config as YAML, then its size and layout as comments; together a file that --config reads."""
    model, layout = config.model, config.layout(world)
    count, flops = parameters(model), flops_per_image(model)
    yield to_yaml(config)
    yield "# size"
    yield f"# parameters: total {count.total:,}  trainable {count.trainable:,}  active {count.active:,}"
    yield "#   (total and active include the constant table of positions)"
    yield f"# FLOPs per image: forward {flops.forward:,}  training step {flops.training:,}"
    yield f"#   {'part':22} {'parameters':>15} {'forward FLOPs':>19}"
    for part, number in count.by_part.items():
        yield f"#   {part:22} {number:15,} {flops.by_part.get(part, 0):19,}"
    yield "#"
    yield f"# layout over {world} rank{'s' * (world > 1)}"
    yield f"# tensor parallel tp {layout.tp} x data parallel dp {layout.dp}"
    if model.moe_blocks:
        split = f" x each expert over {layout.etp}" if layout.etp > 1 else ""
        yield f"# expert parallel ep {layout.ep} x expert data parallel edp {layout.edp}{split}"
        share, more = divmod(model.num_experts, layout.ep)
        counts = ((share + 1, more), (share, layout.ep - more))
        ranks = ", ".join(f"{n} on {r} rank{'s' * (r > 1)}" for n, r in counts if r)
        placements = config.placements_in_file()
        if not placements:
            yield f"# routed experts of each MoE block: {ranks} of an ep group"
        for block, placement in placements.items():
            listed = " | ".join(", ".join(map(str, owned)) for owned in placement.experts_of_rank)
            yield f"# routed experts of block {block} on the ranks of an ep group: {listed}"
    if layout.shard_ranks:
        experts = f", of routed experts over {layout.edp_shard} of edp {layout.edp}" if model.moe_blocks else ""
        yield f"# optimizer states over {layout.dp_shard} of dp {layout.dp}{experts}"
    train = config.train
    yield (
        f"# global batch {train.global_batch} = micro-batch {layout.micro_batch} x dp {layout.dp}"
        f" x accumulation {train.accumulation}"
    )
    memory = memory_per_rank(config, world)
    states = ("parameters", "gradients", "optimizer", "ema")
    listed = "  ".join(f"{name} {size_in_words(getattr(memory, name))}" for name in states)
    yield f"# states on the fullest rank, without activations: {listed}"
    yield f"#   on the device {size_in_words(memory.device)}, on the host {size_in_words(memory.host)}"


def size_in_words(count: int) -> str:
    """A number of bytes with a unit."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"

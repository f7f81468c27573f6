"""The small form of each documented command: what stands for a placeholder, what is replaced, what is appended.

`small(command)` gives the words that a test runs in a folder made by `workspace`. A command that no rule of `RULES`
matches raises `NoRule`: whoever documents a new kind of command writes the rule by which it is run.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

from support.measured_files import recorded_run

# Placeholders of the documents, and what stands for them in the folder.
PLACEHOLDERS = {
    r"\s*\[[^]]*\]": "",  # optional words
    r"\s\.\.\.(?=\s|$)": "",
    r"\|\S+": "",  # other choices
    r"\bSTUDY(_DIR)?\b": "runs/study",
    r"\$run\b": "runs/digits",
    r"\bDIR\b": "latents/train",
    r"\bSOURCE\b": "runs/digits",
    r"\bDEST\b": "runs/dest",
    r"-JOBID\b": "",
    r"\bruns/first\b": "runs/digits",  # of the same content: commands that differ only in these are run once
}
# Numbers that are small in a test. Steps of checkpoints are those of the runs in the folder.
SMALLER = {
    r"--num-images \d+": "--num-images 12",
    r"--step \d+": "--step 2",
    r"step-00000250": "step-00000001",
    r"step-00000500": "step-00000002",
    r"--count \d+": "--count 1",
    r"--class 207": "--class 2",
    r"--layers \S+": "--layers 1",
    r"--steps 15": "--steps 2",
    r"--resolution 64": "--resolution 16",
    r"train\.profile=\S+": "train.profile=1:2",
    r"train\.decay_start=\S+": "train.decay_start=1",
    r"--batch 64": "--batch 4",
}
TRAIN = "train.steps=2 train.warmup=0 train.log_every=1 train.save_every=0 train.sample_every=0 train.global_batch=16"
TRAIN += " train.deepspeed=fp32_zero1 model.hidden_size=32 model.depth=2 model.heads=2 model.input_size=8"
TRAIN += " model.patch_size=2 sample.steps=2 train.timeout=60"
TINY = "model.hidden_size=16 model.heads=2 model.depth=2"  # of the runs in the folder


class NoRule(AssertionError):
    """A documented command that no rule says how to run."""


@dataclass(frozen=True)
class Small:
    """What is run for a documented command.

    Attributes:
        words: a command line of `megapromoe` without that word, or of a shell script.
        ranks: processes that run it.
        kind: "run" runs it; "script" runs it by bash; "parse" only reads its options; "elsewhere" is covered by `by`.
        cheap: it takes no torch, so the quick level runs it.
        by: the test that runs it, or the reason that no test can.
    """

    words: list[str] = field(default_factory=list)
    ranks: int = 1
    kind: str = "run"
    cheap: bool = False
    by: str = ""


def _train(words: list[str], ranks: int) -> Small:
    layout = {word.split("=")[0]: int(word.split("=")[1]) for word in words if re.match(r"parallel\.[te]p=\d+$", word)}
    ranks = max([1, *layout.values()]) if ranks > 1 else 1
    words = [word.replace("runs/", "new/") if words[i - 1] == "--run-dir" else word for i, word in enumerate(words)]
    digits = "digits" in words or "--preset" not in words
    source = [] if digits or "data.source=latents" in words else ["data.source=synthetic", "data.size=64"]
    latents = (
        ["model.in_channels=2", "model.num_classes=3", "model.input_size=8"] if "data.source=latents" in words else []
    )
    more = [word for word in TRAIN.split() if not (latents and "input_size" in word)]
    words = [word for word in words if word != "train.steps=300"]
    if any(word.startswith("train.init_from=") for word in words):
        more += TINY.split()  # the sizes of the run that it starts from
        words = [word.replace("runs/base", "runs/digits") for word in words]
    return Small([*words, *more, *source, *latents], ranks)


def _shown(words: list[str], ranks: int) -> Small:
    return Small(words, cheap=True)


def _plan(words: list[str], ranks: int) -> Small:
    """Measurements are replaced by recorded ones, which are of the preset digits on a CPU."""
    if "--rehearse" in words:
        return Small(words, kind="elsewhere", by="tests/programs/test_plan_rehearsal.py")
    if "--measured" in words:
        option, small = "", []
        for word in words:
            option = word if word.startswith("--") else option
            if option in ("--measured", "--validate") and word != option:
                name = "two-64" if option == "--validate" else "check.json" if word.endswith(".json") else "one-32"
                word = str(recorded_run(name))
            small.append("digits" if option == "--preset" and word != option else word)
        words = small
    return Small(words, cheap=True)


def _sample(words: list[str], ranks: int) -> Small:
    ranks = 4 if "--ep" in words else min(ranks, 2)
    if "--out" in words:
        place = words.index("--out") + 1
        digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:6]  # documents name a file for several requests
        words = [*words[:place], f"new/{digest}-{words[place]}", *words[place + 1 :]]
    if words[-1].endswith(".png"):  # a picture of pixels; the run of promoe_xl draws latents
        words = [word.replace("runs/promoe_xl", "runs/digits") for word in words]
    return Small([*words, "sample.batch=4", *([] if "--steps" in words else ["sample.steps=2"])], ranks)


def _evaluate(words: list[str], ranks: int) -> Small:
    if "--images" in words:  # a set of pictures has no folders of classes, which `photos` has for `encode`
        return Small([*["pictures" if word == "photos/" else word for word in words], "--sha256", "HASH"], 1)
    few = [] if "--steps" in words else ["sample.steps=2"]
    if "inception.pth" in words:
        return Small([*words, "--sha256", "HASH", "sample.batch=12", *few], min(ranks, 2))
    # A classifier of digits has 128 features, and their covariance needs more images than that.
    words = ["130" if words[i - 1] == "--num-images" else word for i, word in enumerate(words)]
    words = ["digits" if word == "fashion_mnist" else word for word in words]
    return Small(
        [*[word for word in words if word not in ("--split", "test")], "sample.batch=130", *few], min(ranks, 2)
    )


def _routing(words: list[str], ranks: int) -> Small:
    if "trace" in words:
        words = [word.replace("runs/traced", "runs/digits") for word in words]
        return Small(["1,2" if words[i - 1] == "--route-steps" else word for i, word in enumerate(words)])
    return Small([*words, "--tokens", "20"])


def _encode(words: list[str], ranks: int) -> Small:
    words = [word.replace("latents/train", "latents/new") for word in words]
    # On one rank: ranks of `encode` meet without a process group, in a store that ends with the process of rank 0, and
    # a worker of the tests goes on. Several ranks are in tests/programs/test_hangs.py.
    return Small([*words, "--workers", "1", "--shard-size", "8"])


def _benchmark(words: list[str], ranks: int) -> Small:
    """One small model in two rounds on the CPU; the tables of docs/benchmarks.md are not filled.

    Commands that differ only in their sizes, rounds and folder, or in the order of their options, have the same small
    form. What one command has measured, the next ones keep, as they do for users without `--again`. A compiler takes
    long for each model: two are compiled, once. `tests/parallel/test_benchmark.py` compiles others.
    """
    options: dict[str, list[str]] = {}
    for word in words[2:]:
        if word.startswith("--"):
            options[word] = []
        else:
            [*options.values()][-1].append(word)
    dropped = ("--fill", "--out", "--rounds", "--sizes", "--experts", "--batch", "--device", "--again", "--capture")
    for option in (*dropped, "--trace-step", "--trace-block"):
        options.pop(option, None)
    if "--trace" in options:
        options["--trace"] = ["runs/digits"]
    if "--compile" in options:
        options |= {"--implementations": ["ours", "dense"], "--routing": ["real"]}
    chosen = [word for option in sorted(options) for word in (option, *options[option])]
    words_of_folder = [word.replace("/", "-") for word in chosen if word != "--quick"]
    folder = "-".join(words_of_folder)  # has the results of equal settings
    quick = ["--sizes", "digits", "--batch", "8", "--rounds", "2", "--steps", "2", "--device", "cpu", "--ranks", "2"]
    return Small([*words[:2], *chosen, *quick, "--out", f"runs/benchmark-{folder}"])


def _study(words: list[str], ranks: int) -> Small:
    action = words[1]
    if action == "recipes":
        return Small(words, cheap=True)
    if action == "plan" and words[2].startswith("paper/"):  # documents plan one recipe in several ways
        digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:6]
        return Small([*words[:2], f"new/{digest}", "--recipe", *words[2:]], cheap=True)
    words = [word.replace("runs/", "studies/") if i == 2 else word for i, word in enumerate(words)]
    if action == "plan":
        words += ["--recipe", "digits"] if len(words) == 3 else []  # in the place of "..."
        words[2] = words[2].replace("studies/", "new/")
        if "--measure" in words:  # what is measured is small: of a recipe of its own
            words = [*words[:2], "new/measured", *["tiny.yaml" if word == "digits" else word for word in words[3:]]]
            words[2] += "-" + hashlib.sha256(" ".join(words).encode()).hexdigest()[:6]
            return Small(words)
        words = [
            "digits" if word == "larger.yaml" else word for word in words
        ]  # tests/programs/test_study_extension.py
        return Small(words, cheap=True)
    if action not in ("plan", "submit"):  # studies of the same content: commands that differ only in these are run once
        words[2] = re.sub("digits_study|fashion_routers|fashion", "study", words[2])
    if action == "run" and "--jobs" in words:  # which trains the whole study too
        words[2] = words[2].replace("studies/", "jobs/")
    if action == "submit":
        return Small([*words, "--dry-run"], cheap=True)
    if "--ranks" in words:
        return Small(words, kind="elsewhere", by="tests/programs/test_study_placement.py")
    if "--evaluate" in words:  # the small study draws nothing
        return Small(words, kind="elsewhere", by="tests/programs/test_study_jobs.py")
    if action == "report":
        return Small(words, kind="elsewhere", by="tests/programs/test_study_report.py")
    if action == "collect":
        return Small([*words, "--draws", "8"])
    if action == "plot":
        return Small([*words, "--draws", "8"])
    if action == "power":  # the small study has one seed
        return Small(words, kind="elsewhere", by="tests/unit/test_study_power.py")
    return Small(words)


def _data(words: list[str], ranks: int) -> Small:
    more = {"speed": ["--seconds", "1", "--batch", "4"], "show": ["--autoencoder", "none"], "check": []}
    return Small([*words, *more[words[1]]])


def _check(words: list[str], ranks: int) -> Small:
    more = [] if "--preset" not in words else [*TRAIN.split(), "data.source=synthetic", "data.size=64"]
    layout = [word for word in words if word.startswith("parallel.ep")]
    kept = [word for word in words if word not in layout]
    return Small([*kept, *more, *(["parallel.ep=2"] if layout else []), "--min-free-gib", "0.001"], min(ranks, 2))


def _convert(words: list[str], ranks: int) -> Small:
    if "--preset" in words:
        words = [*words, *TINY.split(), "model.input_size=8", "model.patch_size=2", "model.in_channels=1",
                 "model.num_classes=10", "model.num_experts=4", "data.source=digits", "data.flip=false"]  # fmt: skip
    if "--what" in words or "--to" not in words:
        return Small(words)
    dest = next(i for i, word in enumerate(words) if i > 1 and not word.startswith("-"))
    return Small([*words[:dest], "new/" + words[dest].rpartition("/")[2], *words[dest + 1 :]])


def _upcycle(words: list[str], ranks: int) -> Small:
    if words == ["upcycle", "--help"]:
        return Small(words, cheap=True)
    words = [words[0], words[1], words[2].replace("runs/", "new/"), *words[3:]]
    return Small([*words, "sample.batch=16"])


COMMANDS: dict[str, Callable[[list[str], int], Small]] = {
    "show": _shown,
    "plan": _plan,
    "launchers": lambda words, ranks: Small([words[0], "new/launchers"], cheap=True),
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "routing": _routing,
    "convert": _convert,
    "inspect": lambda words, ranks: Small(words),
    "superclasses": lambda words, ranks: Small(words, cheap=True),  # its help
    "upcycle": _upcycle,
    "encode": _encode,
    "data": _data,
    "check": _check,
    "study": _study,
    "benchmark": _benchmark,
}
TOOLS = {"tools/benchmark.py": "benchmark"}
# Commands of others, which no test of ours can run; what they name is checked where something can be.
ELSEWHERE = {
    r"make (\w[\w-]*)(?: TORCH=\S+)?$": "target",
    r"(\.venv/bin/)?pip install -e \. -c (\S+)$": "file",
    r"(\.venv/bin/)?pip install (torch(?:==[\d.]+)?|pre-commit)$": "a package of PyPI",
    r"\.venv/bin/pre-commit install$": "file:.pre-commit-config.yaml",
    r"\.venv/bin/python -m pytest -q (\S+)$": "file",
    r"tensorboard --logdir \S+$": "a program of a package that we need",
    r"(git clone URL megapromoe|cd megapromoe|python3 -m venv \.venv|\. \.venv/bin/activate)$": "of the shell",
    r"(tail -F \S+|scancel JOBID|apt-get install dataset-fashion-mnist)$": "of the system",
    r"(mkdir -p runs|tar -xf docs/studies/\S+ -C runs)$": "of the system",
    r"megapromoe superclasses (?!--help).*$": "tests/unit/test_superclasses.py",
    r"megapromoe encode (--captions|--scenes) .*$": "tests/unit/test_text_encoder.py",
    r"megapromoe encode (--latents \S+|--images \S+\.(parquet|tar)'?) .*$": "tests/unit/test_tables.py",
    r"megapromoe (encode .* --teacher|train .* model\.align_block=\d+) .*$": "tests/unit/test_teacher.py",
    r"(?:torchrun .*)?megapromoe sample --run-dir runs/(?:scenes|t2i) .*$": "tests/parallel/test_prompt_sampling.py",
    r"megapromoe data (check|show) (latents/scenes .*|DIR --text-encoder .*)$": "tests/unit/test_text_encoder.py",
    r"python -m megapromoe\.evaluation\.scene_tasks$": "tests/unit/test_scene_tasks.py",
    r"megapromoe routing --run-dir runs/scenes.*$": "tests/parallel/test_text_routing.py",
    r"(?:torchrun .*)?megapromoe evaluate --run-dir runs/scenes.*$": "tests/parallel/test_scene_scores.py",
    r"megapromoe routing place .*$": "tests/unit/test_place_command.py",
    r"torchrun .* megapromoe train .* parallel\.placement=placement\.yaml$": "tests/parallel/test_placed_training.py",
    r"megapromoe study \w+ runs/scenes_study.*$": "tests/programs/test_studies.py",
    r"megapromoe study (collect paper/t7|(plan|run) runs/small( .*)?)$": "tests/programs/test_paper_recipes.py",
    r"python tools/measure_plan\.py .*$": "file:tools/measure_plan.py",
    r"python tools/train_scenes\.py.*$": "tests/programs/test_train_scenes.py",
    r"torchrun .* megapromoe train --preset scenes .*$": "tests/programs/test_train_scenes.py",
    r"python tools/gpu_run\.py (all|step) .*$": "tests/programs/test_gpu_run.py",
    r"megapromoe train .*train\.init_from=(?!runs/base ).*$": "tests/unit/test_starting_weights.py",
    r"python examples/finetune_digits\.py .*$": "tests/programs/test_examples.py",
    r"megapromoe convert (0400000\.pt|SiT-XL-2-256\.pt) .*$": "tests/unit/test_foreign_layouts.py",
    r"megapromoe convert DiT-XL-2-256/transformer .*$": "tests/unit/test_diffusers_dit.py",
}


@functools.cache
def small(text: str) -> Small:
    """The small form of a documented command. Raises NoRule."""
    for pattern, by in ELSEWHERE.items():
        if match := re.match(pattern, text):
            return Small([match[match.lastindex]] if match.lastindex else [], kind="elsewhere", by=by)
    for pattern, replacement in (PLACEHOLDERS | SMALLER).items():
        text = re.sub(pattern, replacement, text)
    words, ranks, env = shlex.split(text), 1, []
    while re.match(r"[A-Z_]+=", words[0]):
        env.append(words.pop(0))
    if words[0] == "sbatch" or words[0] == "bash" or words[0].startswith("launchers/"):
        script = next(i for i, word in enumerate(words) if word.startswith("launchers/"))
        options = [word for word in words[1:script] if word != "--dry-run" and "scaling" not in words[script]]
        rest = [word for word in words[script + 1 :] if word != "--dry-run"]
        return Small([*env, words[script], *rest[:1], "--dry-run", *options, *rest[1:]], kind="script")
    if words[0] in ("torchrun", "deepspeed", "mpirun", "srun"):
        words, ranks = launched(words)
    if words[0] == "python" and words[1] in TOOLS:
        words = ["megapromoe", TOOLS[words[1]], *words[2:]]
    if words[0] != "megapromoe" or words[1] not in COMMANDS:
        raise NoRule(f"{text!r}: write in {__file__} how a test runs this command")
    return COMMANDS[words[1]](words[1:], ranks)


def launched(words: list[str]) -> tuple[list[str], int]:
    """The command that a launcher starts, as the launcher itself reads its words, and on how many processes."""
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        options = parse_args(words[1:])
        assert options.module and options.training_script == "megapromoe"
        return ["megapromoe", *options.training_script_args], int(options.nproc_per_node)
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        options = parse_args(words[1:])
        assert options.module and options.user_script == "megapromoe"
        return ["megapromoe", *options.user_args], 8
    start = words.index("megapromoe")
    assert all(word.startswith("-") or words[i] == "-n" for i, word in enumerate(words[1:start]))
    return words[start:], 8

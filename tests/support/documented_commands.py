"""Every command line in the documents, in the `--help` of the commands and in the comments of launchers."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from megapromoe import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "megapromoe" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
PROGRAMS = (
    *(
        "megapromoe",
        "torchrun",
        "deepspeed",
        "mpirun",
        "srun",
        "sbatch",
        "scancel",
        "bash",
        "python",
        "python3",
        "make",
    ),
    *("pip", "git", "apt-get", "tail", "tensorboard", ".", "cd"),
)
# Starts a command: a program, a path of one, or variables before either.
_COMMAND = re.compile(
    rf"(?:[A-Z_]+=\S* +)*(?:{'|'.join(map(re.escape, PROGRAMS))}|launchers/\w+\.sh|\.venv/\S+)(?: |$)"
)


@dataclass(frozen=True)
class Documented:
    """A command line, and where it stands."""

    text: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def commands_in(text: str, place: str) -> list[Documented]:
    """The commands of lines of code: continued lines are joined, comments and descriptions in a column are cut off."""
    commands = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        words = re.split(r"\s{2,}|\s#", line.strip())[0]
        for part in words.split(" && "):
            if _COMMAND.match(part) and " " in part:
                commands.append(Documented(part, place))
    return commands


def in_documents() -> list[Documented]:
    """Of fenced blocks of shell, and of indented lines that are commands."""
    commands = []
    for document in DOCUMENTS:
        text, place = document.read_text(), str(document.relative_to(ROOT))
        for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S):
            commands += commands_in(block, place)
        outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        indented = "\n".join(line for line in outside.splitlines() if re.match(r" {4}\S", line))
        commands += commands_in(indented, place)
    return commands


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Of the program, of every command, and of every command of `study`, by the words that print their help."""
    by_words = {"megapromoe --help": cli._parser(None)}
    for name in cli.COMMANDS:
        chosen = _children(cli._parser(name))[name]
        by_words[f"megapromoe {name} --help"] = chosen
        by_words |= {f"megapromoe {name} {inner} --help": parser for inner, parser in _children(chosen).items()}
    return by_words


def helps() -> dict[str, str]:
    """The text of each `--help`."""
    return {words: parser.format_help() for words, parser in parsers().items()}


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def in_helps() -> list[Documented]:
    """Of the epilogs: their indented lines. Lines of usage, which hold brackets or bars, are no commands."""
    commands = []
    for place, text in helps().items():
        after_usage = text.partition("\n\n")[2]
        lines = re.sub(r"\\\n\s*", "", after_usage).splitlines()
        commands += commands_in("\n".join(line for line in lines if re.match(r"  \S", line)), place)
    return commands


def in_launchers() -> list[Documented]:
    """Of the comments that are a launcher's help, and of the help that is common to those for SLURM."""
    commands = []
    for script in sorted((ROOT / "launchers").glob("*.sh")):
        place, text = f"launchers/{script.name}", script.read_text()
        commands += commands_in("\n".join(re.findall(r"^##   (\S.*)$", text, flags=re.M)), place)
        for quoted in re.findall(r'HELP="\n(.*?)"', text, flags=re.S):
            commands += commands_in(quoted.replace("$size", "promoe_b"), place)
    return commands


def documented() -> list[Documented]:
    """All of them, each text once."""
    by_text = {command.text: command for command in [*in_documents(), *in_helps(), *in_launchers()]}
    return list(by_text.values())

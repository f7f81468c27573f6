"""Former spellings of flags, accepted for one release with a notice that names the present one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Command, or command of `study`, -> former spelling -> present one. torchrun refuses a flag with which several of its
# own begin, even after the name of the program: `--run`, `--num`. The others had two meanings or two names.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "plan": {"--batch": "--global-batch", "--json": "--report"},
    "check": {"--run": "--run-dir", "--expect-gbps": "--expect-gbs"},
    "train": {"--run": "--run-dir"},
    "sample": {"--run": "--run-dir", "--num": "--num-images", "--per-class": "--count", "--classes": "--labels"},
    "evaluate": {"--run": "--run-dir", "--num": "--num-images", "--classes": "--labels"},
    "routing": {"--run": "--run-dir", "--images": "--num-images"},
    "upcycle": {"--images": "--num-images"},
    "study plan": {"--steps": "--train-steps"},
    "study submit": {"--at-once": "--jobs"},
    "benchmark": {"--images": "--batch", "--contenders": "--implementations"},
}


def renamed(command: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replaces the former spellings of a command's flags, with the value as the next word or after an equals sign.

    Returns the words in the present spelling, and a notice of one line, or no notice.
    """
    next_word = "".join(words[list(words).index(command) + 1 :][:1]) if command in words else ""
    return with_new_names(words, RENAMED.get(command) or RENAMED.get(f"{command} {next_word}") or {})


def with_new_names(words: Sequence[str], new: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """As `renamed`, with the table `new` from former to present spellings."""
    flags = [word.partition("=")[0] for word in words]
    changed = [new[flag] + word[len(flag) :] if flag in new else word for flag, word in zip(flags, words, strict=True)]
    used = [f"{flag} is now spelled {new[flag]}" for flag in dict.fromkeys(flags) if flag in new]
    notice = [f"{', '.join(used)}; the next release refuses the former spelling"] if used else []
    return changed, notice

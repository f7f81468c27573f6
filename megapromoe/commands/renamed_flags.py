"""Old spellings of flags, which version 0.1 still accepts with a notice. Version 0.2 removes this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megapromoe import __version__

# Command, or command of `study`, -> old spelling -> new spelling. torchrun refuses every flag that is the beginning of
# several of its own, even behind the name of the program it starts: the first two are. Others had two meanings.
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
    """Replaces the old spellings of a command's flags, with the value as the next word or after an equals sign.

    Returns the words in the new spelling, and a notice of one line, or no notice.
    """
    next_word = "".join(words[list(words).index(command) + 1 :][:1]) if command in words else ""
    return with_new_names(words, RENAMED.get(command) or RENAMED.get(f"{command} {next_word}") or {})


def with_new_names(words: Sequence[str], new: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """As `renamed`, with the table `new` from old to new spellings."""
    flags = [word.partition("=")[0] for word in words]
    changed = [new[flag] + word[len(flag) :] if flag in new else word for flag, word in zip(flags, words, strict=True)]
    used = [f"{flag} is now {new[flag]}" for flag in dict.fromkeys(flags) if flag in new]
    notice = (
        [f"{', '.join(used)}: version {__version__} accepts the old spelling, the next one does not"] if used else []
    )
    return changed, notice

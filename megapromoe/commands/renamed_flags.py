"""Former spellings of flags, accepted for one release with a notice that names the present one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megapromoe.commands.command_line import SETTING

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
# A flag that is a former spelling only with a value, as in `--json FILE`; alone it has a present meaning.
WITH_VALUE = {("plan", "--json")}


def renamed(command: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replaces the former spellings of a command's flags, with the value as the next word or after an equals sign.

    Returns the words in the present spelling, and a notice of one line, or no notice.
    """
    next_word = "".join(words[list(words).index(command) + 1 :][:1]) if command in words else ""
    table = RENAMED.get(command) or RENAMED.get(f"{command} {next_word}") or {}
    alone = {flag for name, flag in WITH_VALUE if name == command and not _has_value(words, flag)}
    return with_new_names(words, {flag: new for flag, new in table.items() if flag not in alone})


def _has_value(words: Sequence[str], flag: str) -> bool:
    """Whether a value follows a flag: not another flag and not a setting."""
    for i, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return True
        after = words[i + 1] if word == flag and i + 1 < len(words) else "-"
        if word == flag and not after.startswith("-") and not SETTING.match(after):
            return True
    return False


def with_new_names(words: Sequence[str], new: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """As `renamed`, with the table `new` from former to present spellings."""
    flags = [word.partition("=")[0] for word in words]
    changed = [new[flag] + word[len(flag) :] if flag in new else word for flag, word in zip(flags, words, strict=True)]
    used = [f"{flag} is now spelled {new[flag]}" for flag in dict.fromkeys(flags) if flag in new]
    notice = [f"{', '.join(used)}; the next release refuses the former spelling"] if used else []
    return changed, notice

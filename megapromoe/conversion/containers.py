"""The layouts of training scripts' torch.save files: which key holds which kind of tensors.

======================  ======================================================================
the ProMoE release      model_state_dict, ema_model_state_dict, optimizer_state_dict, step
DiT, SiT                model, ema, opt, args
REPA                    the same and steps
Lightning               state_dict, optimizer_states, global_step
a bare state dict       names and tensors
======================  ======================================================================

Wrappers add prefixes to the names of tensors: `module.` (DistributedDataParallel), `_orig_mod.` (torch.compile),
`_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, `_forward_module.`, `model.`; averaged weights have `ema.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.conversion.stream import ConversionError, Stored

_KEYS = {
    "master": ("model_state_dict", "model", "state_dict", "module", "net"),
    "ema": ("ema_model_state_dict", "ema", "ema_state_dict", "model_ema", "ema_model", "state_dict_ema"),
    "optimizer": ("optimizer_state_dict", "opt", "optimizer", "optimizer_states"),
    "step": ("step", "steps", "train_steps", "global_step", "global_steps"),
    "arguments": ("args",),
}
_RELEASE = ("model_state_dict", "ema_model_state_dict")  # the keys of the ProMoE release
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")
_LEADING = ("module", "_forward_module", "model", "net", "online_model")
_AVERAGED = ("ema", "ema_model", "model_ema")
_COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")  # scalars that weight averaging saves
_PROJECTORS = "projectors."  # REPA's heads for its alignment loss; sampling does not use them


@dataclass(frozen=True)
class Container:
    """The content of one file.

    Attributes:
        kinds: "master", "ema" or both -> name without wrappers -> tensor, in the order of the file.
        keys: "master" or "ema" -> the key in the file.
        projectors: names of REPA's heads; `kinds` does not contain them, but the optimizer has their states.
        parameters: names of `kinds["master"]` and `projectors`, in the order of the file.
        optimizer: the optimizer's state dict, unchecked, or None.
        step: number of steps, unchecked, or None.
        arguments: the arguments of the training script.
        is_release: whether the file has the layout of the ProMoE release.
        notes: messages for the user about the file.
    """

    kinds: dict[str, dict[str, Stored]]
    keys: dict[str, str]
    projectors: tuple[str, ...]
    parameters: tuple[str, ...]
    optimizer: Any
    step: Any
    arguments: Mapping[str, Any]
    is_release: bool
    notes: list[str]


def unpack(path: Path, tree: Any) -> Container:
    """Interprets the content that `read_pickle` returned for `path`. Raises ConversionError if no layout fits."""
    is_bare = isinstance(tree, Mapping) and bool(tree) and all(isinstance(value, Stored) for value in tree.values())
    content: Mapping[str, Any] = {"model_state_dict": tree} if is_bare else tree
    keys = _choose_keys(path, content) if isinstance(content, Mapping) else {}
    sets: dict[str, str] = {kind: keys[kind] for kind in ("master", "ema") if kind in keys}
    if not sets:
        holds = ", ".join(map(str, list(tree)[:6])) if isinstance(tree, Mapping) else type(tree).__name__
        raise ConversionError(
            f"{path}: holds {holds or 'nothing'}; weights must be under {', '.join(_KEYS['master'][:3])} or"
            f" {', '.join(_KEYS['ema'][:2])}, or be the whole content of the file"
        )
    notes: list[str] = []
    kinds: dict[str, dict[str, Stored]] = {}
    projectors: list[str] = []
    parameters: list[str] = []
    for kind, key in sets.items():
        tensors = check_tensors(path, key, content[key])
        for kept, names in _without_wrappers(path, kind, tensors, notes).items():
            if kept in kinds:
                raise ConversionError(
                    f"{path}: has averaged weights under {sets['ema']} and inside {sets['master']}; save a file with"
                    " one of them"
                )
            heads = [name for name in names if name.startswith(_PROJECTORS)]
            if kept == "master" or not parameters:
                projectors, parameters = heads, list(names)
            kinds[kept] = {name: stored for name, stored in names.items() if name not in heads}
    if projectors:
        notes.append(f"{len(projectors)} tensors of projectors are omitted: only REPA's training loss uses them")
    others = [key for key in content if key not in keys.values()] if not is_bare else []
    if others:
        notes.append(f"not read: {', '.join(map(str, others[:6]))}{' ...' if len(others) > 6 else ''}")
    return Container(
        kinds,
        {kind: sets.get(kind, next(iter(sets.values()))) for kind in kinds},
        tuple(projectors),
        tuple(parameters),
        _single_optimizer(content.get(keys.get("optimizer", ""))),
        content.get(keys.get("step", "")),
        arguments if isinstance(arguments := content.get(keys.get("arguments", "")), Mapping) else {},
        {*_RELEASE, "step"} <= content.keys(),
        notes,
    )


def _choose_keys(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """The keys of `_KEYS` that the file has: kind -> key. Raises ConversionError if two keys are of the same kind."""
    chosen = {}
    for kind, names in _KEYS.items():
        present = [name for name in names if content.get(name) not in (None, {}, [])]
        if len(present) > 1 and kind in ("master", "ema", "optimizer"):
            raise ConversionError(
                f"{path}: has both {present[0]} and {present[1]}, so the choice is ambiguous; save a file with one of"
                " them"
            )
        if present:
            chosen[kind] = present[0]
    return chosen


def _single_optimizer(value: Any) -> Any:
    """Unwraps the list of one optimizer that Lightning saves."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def check_tensors(path: Path, name: str, tensors: Any) -> Mapping[str, Stored]:
    """Returns `tensors`; raises ConversionError unless it is a mapping of names to tensors."""
    if not isinstance(tensors, Mapping) or not all(isinstance(n, str) for n in tensors):
        raise ConversionError(f"{path}: its {name} is not a mapping of names to tensors")
    if wrong := [n for n, t in tensors.items() if not isinstance(t, Stored)]:
        raise ConversionError(f"{path}: {name}.{wrong[0]} is not a tensor")
    return tensors


def _without_wrappers(
    path: Path, kind: str, tensors: Mapping[str, Stored], notes: list[str]
) -> dict[str, dict[str, Stored]]:
    """Kind -> name without wrappers -> tensor; "master" and "ema" if a state dict holds averaged weights too.

    Raises ConversionError if two tensors have the same name without wrappers.
    """
    out: dict[str, dict[str, Stored]] = {}
    origins: dict[tuple[str, str], str] = {}
    removed: set[str] = set()
    for name, stored in tensors.items():
        bare, wrappers, averaged = strip_wrappers(name)
        if bare in _COUNTERS and stored.nbytes <= 8:
            continue
        key = ("ema" if averaged else kind, bare)
        if key in origins:
            raise ConversionError(f"{path}: {origins[key]} and {name} are both {bare}; save a file without wrappers")
        origins[key] = name
        removed.update(wrappers)
        out.setdefault(key[0], {})[bare] = stored
    if removed:
        notes.append(f"names are read without {', '.join(f'{wrapper}.' for wrapper in sorted(removed))}")
    return out


def strip_wrappers(name: str) -> tuple[str, list[str], bool]:
    """A tensor's name without wrappers, the removed wrappers, and whether one of them marks an averaged weight."""
    parts = name.split(".")
    wrappers = [part for part in parts if part in _ANYWHERE]
    parts = [part for part in parts if part not in _ANYWHERE]
    averaged = False
    while len(parts) > 1 and parts[0] in (*_LEADING, *_AVERAGED):
        averaged = averaged or parts[0] in _AVERAGED
        wrappers.append(parts.pop(0))
    return ".".join(parts), wrappers, averaged

"""What files of torch.save hold under which key: the layouts of training scripts, understood as kinds of ours.

======================  ======================================================================
the ProMoE release      model_state_dict, ema_model_state_dict, optimizer_state_dict, step
DiT, SiT                model, ema, opt, args
REPA                    the same and steps
Lightning               state_dict, optimizer_states, global_step
a bare state dict       names and tensors
======================  ======================================================================

Wrappers put their name into those of tensors: `module.` (DistributedDataParallel), `_orig_mod.` (torch.compile),
`_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, `_forward_module.`, `model.`; averages stand under `ema.`.
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
_COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")  # of averages, single numbers
_PROJECTORS = "projectors."  # REPA's heads for its alignment loss; sampling does not use them


@dataclass(frozen=True)
class Container:
    """What one file holds.

    Attributes:
        kinds: "master" or "ema", or both -> name without wrappers -> tensor, in the order of the file.
        keys: "master" or "ema" -> the key in the file.
        projectors: names of REPA's heads, which are in no `kinds`; the optimizer has states of them.
        parameters: names of `kinds["master"]` and `projectors`, in the order of the file.
        optimizer: the optimizer's state dict, unchecked, or None.
        step: number of steps, unchecked, or None.
        arguments: of the training script.
        is_release: whether it is laid out as the ProMoE release writes.
        notes: what a reader should know of it.
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
    """Understands what `read_pickle` returned for `path`. Raises ConversionError if no layout fits."""
    is_bare = isinstance(tree, Mapping) and bool(tree) and all(isinstance(value, Stored) for value in tree.values())
    content: Mapping[str, Any] = {"model_state_dict": tree} if is_bare else tree
    keys = _choose_keys(path, content) if isinstance(content, Mapping) else {}
    sets: dict[str, str] = {kind: keys[kind] for kind in ("master", "ema") if kind in keys}
    if not sets:
        holds = ", ".join(map(str, list(tree)[:6])) if isinstance(tree, Mapping) else type(tree).__name__
        raise ConversionError(
            f"{path}: holds {holds or 'nothing'}; weights stand under {', '.join(_KEYS['master'][:3])},"
            f" {', '.join(_KEYS['ema'][:2])}, or are the whole file"
        )
    notes: list[str] = []
    kinds: dict[str, dict[str, Stored]] = {}
    projectors: list[str] = []
    parameters: list[str] = []
    for kind, key in sets.items():
        tensors = check_tensors(path, key, content[key])
        for kept, names in _without_wrappers(path, kind, tensors, notes).items():
            if kept in kinds:
                raise ConversionError(f"{path}: has averages under {sets['ema']} and within {sets['master']}")
            heads = [name for name in names if name.startswith(_PROJECTORS)]
            if kept == "master" or not parameters:
                projectors, parameters = heads, list(names)
            kinds[kept] = {name: stored for name, stored in names.items() if name not in heads}
    if projectors:
        notes.append(f"{len(projectors)} tensors of projectors are left out: REPA's loss uses them, sampling does not")
    others = [key for key in content if key not in keys.values()] if not is_bare else []
    if others:
        notes.append(f"not read: {', '.join(map(str, others[:6]))}{' ...' if len(others) > 6 else ''}")
    return Container(
        kinds,
        {kind: sets.get(kind, next(iter(sets.values()))) for kind in kinds},
        tuple(projectors),
        tuple(parameters),
        _the_optimizer(content.get(keys.get("optimizer", ""))),
        content.get(keys.get("step", "")),
        arguments if isinstance(arguments := content.get(keys.get("arguments", "")), Mapping) else {},
        {*_RELEASE, "step"} <= content.keys(),
        notes,
    )


def _choose_keys(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """What of `_KEYS` the file has: kind -> key. Raises ConversionError if two keys mean one thing."""
    chosen = {}
    for kind, names in _KEYS.items():
        present = [name for name in names if content.get(name) not in (None, {}, [])]
        if len(present) > 1 and kind in ("master", "ema", "optimizer"):
            raise ConversionError(
                f"{path}: has {present[0]} and {present[1]}, and it is not known which to take; save a file that has"
                " one of them"
            )
        if present:
            chosen[kind] = present[0]
    return chosen


def _the_optimizer(value: Any) -> Any:
    """Lightning saves a list of optimizers, of which a diffusion model has one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def check_tensors(path: Path, name: str, tensors: Any) -> Mapping[str, Stored]:
    """`tensors`; raises ConversionError unless it is a mapping of names to tensors."""
    if not isinstance(tensors, Mapping) or not all(isinstance(n, str) for n in tensors):
        raise ConversionError(f"{path}: its {name} is no mapping of names to tensors")
    if wrong := [n for n, t in tensors.items() if not isinstance(t, Stored)]:
        raise ConversionError(f"{path}: {name}.{wrong[0]} is no tensor")
    return tensors


def _without_wrappers(
    path: Path, kind: str, tensors: Mapping[str, Stored], notes: list[str]
) -> dict[str, dict[str, Stored]]:
    """Kind -> name without wrappers -> tensor; "ema" beside "master" where a state dict holds averages too.

    Raises ConversionError if two tensors come to have one name.
    """
    out: dict[str, dict[str, Stored]] = {}
    origins: dict[tuple[str, str], str] = {}
    seen: set[str] = set()
    for name, stored in tensors.items():
        bare, wrappers, averaged = strip_wrappers(name)
        if bare in _COUNTERS and stored.nbytes <= 8:
            continue
        place = ("ema" if averaged else kind, bare)
        if place in origins:
            raise ConversionError(f"{path}: {origins[place]} and {name} are both {bare}; save a file without wrappers")
        origins[place] = name
        seen.update(wrappers)
        out.setdefault(place[0], {})[bare] = stored
    if seen:
        notes.append(f"names are read without {', '.join(f'{one}.' for one in sorted(seen))}")
    return out


def strip_wrappers(name: str) -> tuple[str, list[str], bool]:
    """A tensor's name without wrappers, the wrappers, and whether one of them says that it is an average."""
    parts = name.split(".")
    wrappers = [part for part in parts if part in _ANYWHERE]
    parts = [part for part in parts if part not in _ANYWHERE]
    averaged = False
    while len(parts) > 1 and parts[0] in (*_LEADING, *_AVERAGED):
        averaged = averaged or parts[0] in _AVERAGED
        wrappers.append(parts.pop(0))
    return ".".join(parts), wrappers, averaged

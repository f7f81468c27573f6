"""The routing patterns that are compared: how many tokens each expert gets.

=========  ==============================================================================================
real       what the router of the initialised model decides for latents of pure noise
balanced   every expert gets the same number of tokens, or one more
skewed     half of the tokens go to expert 0, none to the last, the others share the rest by Zipf's law
recorded   as in a recorded step of a training run (`routing_trace.py`); a pattern names the rows: `recorded_pattern`
=========  ==============================================================================================

All but the real routing need no change of the measured layer: its input tokens are moved towards the prototype of
their planned expert (`bias_tokens_towards`), so that each router chooses as usual and its time is measured. In a whole
model, where other blocks compute the tokens, the scores of the planned experts are raised instead (`PlannedChoice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from megapromoe.nn.moe.routers import PrototypeRouter

ROUTINGS = ("real", "balanced", "skewed")
RECORDED = "recorded"  # needs a trace, so it is not among `ROUTINGS`
MARGIN = 0.1  # by which the cosine of the planned expert must be the largest; rounding errors are far smaller


def recorded_pattern(rows_E: Sequence[int]) -> str:
    """The pattern in which each expert gets the share of the tokens that it had of these rows, one of them or more."""
    return f"{RECORDED} {' '.join(map(str, rows_E))}"


def planned_counts(pattern: str, tokens: int, experts: int) -> list[int]:
    """Tokens of each expert under "balanced" or "skewed" routing or a `recorded_pattern`; they sum to `tokens`.

    The remainder of recorded shares goes to the experts with the largest fractions.
    """
    if pattern.startswith(RECORDED):
        rows_E = [int(rows) for rows in pattern.split()[1:]]
        if len(rows_E) != experts or not any(rows_E):
            raise ValueError(f"the pattern {pattern!r} is not of {experts} experts, or has no rows")
        count_E = [tokens * rows // sum(rows_E) for rows in rows_E]
        fullest_first = sorted(range(experts), key=lambda e: -(tokens * rows_E[e] % sum(rows_E)))
        for expert in fullest_first[: tokens - sum(count_E)]:
            count_E[expert] += 1
        return count_E
    if pattern == "balanced":
        return [tokens // experts + (e < tokens % experts) for e in range(experts)]
    if experts < 2:
        return [tokens]
    harmonic = sum(1 / e for e in range(1, experts - 1)) or 1.0
    share_E = [0.5, *(0.5 / e / harmonic for e in range(1, experts - 1)), 0.0]
    count_E = [int(tokens * share) for share in share_E]
    count_E[0] += tokens - sum(count_E)
    return count_E


def planned_experts(pattern: str, tokens: int, experts: int, seed: int = 0) -> Tensor:
    """The expert of each token, int64 (tokens,), in a random order that the seed determines."""
    count_E = torch.tensor(planned_counts(pattern, tokens, experts))
    expert_T = torch.repeat_interleave(torch.arange(experts), count_E)
    return expert_T[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))]


def bias_tokens_towards(x_TD: Tensor, expert_T: Tensor, prototype_ED: Tensor) -> Tensor:
    """Moves tokens towards the prototype of their planned expert until it is the nearest to each; same shape.

    Raises ValueError if no distance is enough, because two prototypes have the same direction.
    """
    unit_ED = F.normalize(prototype_ED.float(), dim=-1)
    distance = 1.0
    while distance < 1e4:
        moved_TD = (x_TD.float() + distance * unit_ED[expert_T]).to(x_TD.dtype)
        best_T2 = (moved_TD.float() @ unit_ED.T).topk(min(2, len(unit_ED)), dim=-1)
        is_clear = (best_T2.values[:, 0] - best_T2.values[:, -1] > MARGIN).all() or len(unit_ED) == 1
        if is_clear and torch.equal(best_T2.indices[:, 0], expert_T):
            return moved_TD
        distance *= 2
    raise ValueError(f"tokens do not reach {len(unit_ED)} experts of width {unit_ED.shape[1]}: prototypes are parallel")


class PlannedChoice:
    """Replaces `PrototypeRouter.choose`: raises the scores of planned experts above all others, then chooses.

    It costs one addition. The routing weights are those of the scores as they were.
    """

    def __init__(self, router: PrototypeRouter, pattern: str):
        self.router, self.pattern = router, pattern

    def __call__(self, score_BSE: Tensor) -> Tensor:
        raised = _raise_in_a_graph if torch.compiler.is_compiling() else raise_planned
        return type(self.router).choose(self.router, raised(score_BSE, self.pattern))


def raise_planned(score_BSE: Tensor, pattern: str) -> Tensor:
    """Cosines (B, S, E), with 3 added to that of each token's planned expert."""
    return score_BSE + _bonus(tuple(score_BSE.shape), pattern, score_BSE.dtype, score_BSE.device)


@cache
def _bonus(shape: tuple[int, ...], pattern: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    B, S, E = shape
    onehot_TE = F.one_hot(planned_experts(pattern, B * S, E), E).to(device, dtype)
    return 3 * onehot_TE.view(B, S, E)  # cosines differ by at most 2


# In a compiled graph the number of images is not known, and the planned experts depend on it.
_raise_in_a_graph = torch.library.custom_op("megapromoe::raise_planned", raise_planned, mutates_args=())
_raise_in_a_graph.register_fake(lambda score_BSE, pattern: torch.empty_like(score_BSE))

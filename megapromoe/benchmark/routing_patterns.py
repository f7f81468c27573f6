"""Who visits whom: the routings that are compared side by side.

=========  ==============================================================================================
real       what the router of the model as initialised makes of the noisiest latents
balanced   every expert gets the same number of tokens, to one
skewed     half of the tokens go to expert 0, none to the last, the others share the rest by Zipf's law
=========  ==============================================================================================

Balanced and skewed routing are brought about without touching a layer under test: the tokens lean towards the
prototype of their planned expert (`lean`), so each router decides by itself and pays for it. Inside of a model, where
tokens are made by the blocks before, the scores of the planned experts are raised instead (`Raised`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megapromoe.nn.moe.prototypes import Choose
from megapromoe.nn.moe.routers import PrototypeRouter

ROUTINGS = ("real", "balanced", "skewed")
MARGIN = 0.1  # by which a planned expert must win: more than any rounding


def counts(kind: str, tokens: int, experts: int) -> list[int]:
    """Tokens of each expert under "balanced" or "skewed" routing; they sum to `tokens`."""
    if kind == "balanced":
        return [tokens // experts + (e < tokens % experts) for e in range(experts)]
    if experts < 2:
        return [tokens]
    harmonic = sum(1 / e for e in range(1, experts - 1)) or 1.0
    share_E = [0.5, *(0.5 / e / harmonic for e in range(1, experts - 1)), 0.0]
    found = [int(tokens * share) for share in share_E]
    found[0] += tokens - sum(found)
    return found


def plan(kind: str, tokens: int, experts: int, seed: int = 0) -> Tensor:
    """The expert of each token, int64 (tokens,), in a shuffled order fixed by the seed."""
    count_E = torch.tensor(counts(kind, tokens, experts))
    expert_T = torch.repeat_interleave(torch.arange(experts), count_E)
    return expert_T[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))]


def lean(x_TD: Tensor, expert_T: Tensor, prototype_ED: Tensor) -> Tensor:
    """Tokens moved along their planned expert's prototype until it is the nearest to all of them; same shape.

    Raises ValueError if that does not come about: two prototypes point in one direction.
    """
    unit_ED = F.normalize(prototype_ED.float(), dim=-1)
    pull = 1.0
    while pull < 1e4:
        moved_TD = (x_TD.float() + pull * unit_ED[expert_T]).to(x_TD.dtype)
        best_T2 = (moved_TD.float() @ unit_ED.T).topk(min(2, len(unit_ED)), dim=-1)
        clear = (best_T2.values[:, 0] - best_T2.values[:, -1] > MARGIN).all() or len(unit_ED) == 1
        if clear and torch.equal(best_T2.indices[:, 0], expert_T):
            return moved_TD
        pull *= 2
    raise ValueError(f"tokens do not reach {len(unit_ED)} experts of width {unit_ED.shape[1]}: prototypes are parallel")


class Raised:
    """A router's scores with those of the planned experts raised above all others. Costs one addition."""

    def __init__(self, router: PrototypeRouter, kind: str):
        self.router, self.kind = router, kind
        self.raises: dict[tuple, Tensor] = {}
        self.similarity = type(router).similarity

    def __call__(self, x_BSD: Tensor, choose: Choose | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raised = None if choose is None else lambda score_BSE: choose(self.plus(score_BSE))
        score_BSE, sum_ED, count_E = self.similarity(self.router, x_BSD, raised)
        return self.plus(score_BSE), sum_ED, count_E

    def plus(self, score_BSE: Tensor) -> Tensor:
        if (key := tuple(score_BSE.shape)) not in self.raises:
            B, S, E = key
            onehot_TE = F.one_hot(plan(self.kind, B * S, E), E).to(score_BSE)
            self.raises[key] = 3 * onehot_TE.view(B, S, E)  # cosines differ by 2 at most
        return score_BSE + self.raises[key]

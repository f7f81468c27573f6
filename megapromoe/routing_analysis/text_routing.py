"""Records the routing of a model of texts: which image tokens go to which expert, for which words and tasks.

Letters: L MoE layers, M noise levels, N images, S tokens of an image, E experts, G groups of tokens, W words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megapromoe.config.options import Config
from megapromoe.diffusion.noise import image_noise
from megapromoe.nn.dit import DiT
from megapromoe.routing_analysis.captioned_images import CaptionedImages, TokenGroups
from megapromoe.routing_analysis.measures import NO_EXPERT, information, load
from megapromoe.routing_analysis.observe import (
    Routing,
    chosen_layers,
    count_rows,
    count_visits,
    main_expert,
    router_calls,
    rows_of,
)

LEAST_IMAGES = 5  # with a word, and without it
MOST_WORDS = 200  # the most frequent


@dataclass(frozen=True)
class GroupRows:
    """The rows of groups of tokens.

    Attributes:
        kind, names: see `TokenGroups`.
        rows_MLGE: number of rows, int64.
    """

    kind: str
    names: tuple[str, ...]
    rows_MLGE: np.ndarray

    @property
    def rows_LGE(self) -> np.ndarray:
        """Rows over all noise levels."""
        return self.rows_MLGE.sum(0)

    @property
    def load_LGE(self) -> np.ndarray:
        """Share of each group's rows that each expert processes; 0 for a group without rows."""
        return load(self.rows_LGE)

    @property
    def information_L(self) -> np.ndarray:
        """Mutual information of group and expert in bits."""
        return information(self.rows_LGE)

    def numbers(self) -> dict[str, Any]:
        """The numbers for JSON."""
        return {
            "names": self.names,
            "rows": self.rows_MLGE[:, 0].sum((0, 2)),
            "load": self.load_LGE,
            "load_by_level": load(self.rows_MLGE),
            "information_bits": self.information_L,
            "information_bits_by_level": information(self.rows_MLGE),
        }


@dataclass(frozen=True)
class TextRouting:
    """The recorded routing of images with texts.

    Attributes:
        routing: as for classes; all images are of one class.
        captions: of the images.
        rows_MLNE: number of rows of each image and expert, int64.
        groups: rows of groups of tokens.
    """

    routing: Routing
    captions: tuple[str, ...]
    rows_MLNE: np.ndarray
    groups: tuple[GroupRows, ...]


def measure_text_routing(
    model: DiT,
    config: Config,
    images: CaptionedImages,
    levels: Sequence[float],
    blocks: Sequence[int] | None = None,
    progress: Callable[[int], Any] = lambda images: None,
) -> TextRouting:
    """Records the routing of images at each of `levels`; arguments as for `measure_routing`.

    Raises RoutingError for a model without experts, and for blocks or noise levels that are not valid; DatasetError if
    captions are damaged.
    """
    layers = chosen_layers(config, blocks, levels)
    m, levels = config.model, tuple(sorted(levels))
    L, E, S, N = len(layers), m.num_experts, m.tokens, len(images.captions)
    noise_NCHW = image_noise(config.sample.seed, images.noise_numbers, images.clean_NCHW.shape[1:])
    rows_MLNE = np.zeros((len(levels), L, N, E), dtype=np.int64)
    rows = [np.zeros((len(levels), L, len(groups.names), E), dtype=np.int64) for groups in images.groups]
    visits_LV = np.zeros((L, E + 1), dtype=np.int64)
    expert_LNS = np.full((L, N, S), NO_EXPERT)
    calls_of_levels = router_calls(model, config, images.clean_NCHW, noise_NCHW, images.condition_of, levels, progress)
    for number, part, calls in calls_of_levels:
        B = part.stop - part.start
        for layer, (_, routed) in enumerate(calls[place] for place in layers):
            token_R, expert_R = rows_of(routed.assignment)
            rows_MLNE[number, layer, part] = count_rows(token_R // S, expert_R, B, E)
            visits_LV[layer] += count_visits(token_R, B * S, E)
            for groups, rows_MLGE in zip(images.groups, rows, strict=True):
                rows_MLGE[number, layer] += _rows_of_groups(groups, part, token_R, expert_R, E)
            if number == len(levels) // 2:
                expert_LNS[layer, part] = main_expert(routed.assignment, B * S).reshape(B, S)
    blocks = tuple(m.moe_blocks[place] for place in layers)
    rows_MLCE, one_class_N = rows_MLNE.sum(2, keepdims=True), np.zeros(N, dtype=np.int64)
    routing = Routing(blocks, levels, rows_MLCE, visits_LV, expert_LNS, images.clean_NCHW, one_class_N)
    counted = tuple(GroupRows(g.kind, g.names, r) for g, r in zip(images.groups, rows, strict=True))
    return TextRouting(routing, images.captions, rows_MLNE, counted)


def _rows_of_groups(
    groups: TokenGroups, part: slice, token_R: np.ndarray, expert_R: np.ndarray, experts: int
) -> np.ndarray:
    """Number of rows (G, E) of a batch; tokens in no group are not counted."""
    group_R = groups.group_NS[part].flatten()[token_R]
    counted_R = group_R >= 0
    return count_rows(group_R[counted_R], expert_R[counted_R], len(groups.names), experts)


# ---- words


@dataclass(frozen=True)
class WordLoads:
    """The loads of experts over images whose caption has a word, and over those whose caption has not.

    Attributes:
        words: the most frequent first.
        count_W: number of captions that have the word.
        load_LWE, without_LWE: means over these images, and over the others.
        error_LWE: standard error of the difference.
    """

    words: tuple[str, ...]
    count_W: np.ndarray
    load_LWE: np.ndarray
    without_LWE: np.ndarray
    error_LWE: np.ndarray

    @property
    def lift_LWE(self) -> np.ndarray:
        """See `word_lift`."""
        return word_lift(self.load_LWE, self.without_LWE)

    @property
    def standard_errors_LWE(self) -> np.ndarray:
        """The difference of the loads in standard errors; 0 if they are equal, also without any variance."""
        difference_LWE = self.load_LWE - self.without_LWE
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(difference_LWE == 0, 0.0, difference_LWE / self.error_LWE)


def word_lift(load_E: np.ndarray, without_E: np.ndarray) -> np.ndarray:
    """Lift of a word: the mean share of an image's rows that an expert processes, over the images whose caption has the
    word, divided by the same mean over the images whose caption has not. 1: the expert takes as much of both, 2: twice
    as much of the images with the word. A word stands for what else is in its images too. The standard error of the
    difference of both means is over images; of many words a few differ by two or three standard errors by chance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(load_E == without_E, 1.0, load_E / without_E)


def words_of(caption: str) -> set[str]:
    """The words of a caption in lower case, without punctuation."""
    return {word.strip("'-") for word in re.findall(r"[\w'-]+", caption.lower())} - {""}


def word_loads(rows_LNE: np.ndarray, captions: Sequence[str], least: int = LEAST_IMAGES) -> WordLoads:
    """The loads for each word that at least `least` captions have and as many have not, up to `MOST_WORDS`."""
    in_captions = [words_of(caption) for caption in captions]
    counts: dict[str, int] = {}
    for words in in_captions:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    chosen = sorted(word for word, count in counts.items() if least <= count <= len(captions) - least)
    chosen = sorted(chosen, key=lambda word: -counts[word])[:MOST_WORDS]
    load_LNE = load(rows_LNE)
    L, N, E = load_LNE.shape
    load_LWE, without_LWE, error_LWE = (np.zeros((L, len(chosen), E)) for _ in range(3))
    for number, word in enumerate(chosen):
        has_N = np.array([word in words for words in in_captions])
        with_LnE, without_LnE = load_LNE[:, has_N], load_LNE[:, ~has_N]
        load_LWE[:, number], without_LWE[:, number] = with_LnE.mean(1), without_LnE.mean(1)
        variances = (some.var(1, ddof=1) / some.shape[1] for some in (with_LnE, without_LnE))
        error_LWE[:, number] = np.sqrt(sum(variances))
    return WordLoads(tuple(chosen), np.array([counts[word] for word in chosen]), load_LWE, without_LWE, error_LWE)

"""All measures of the experts of a model of texts, as numbers and as sections of a report.

Only conditional images are analysed, as for classes. Words come from the captions. Scenes have descriptions too, which
tell what each image token shows, and prompts of six tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megapromoe.config.options import Config
from megapromoe.nn.dit import DiT
from megapromoe.routing_analysis import measures, text_figures
from megapromoe.routing_analysis.expert_weights import Experts, moe_layers
from megapromoe.routing_analysis.measures import definition
from megapromoe.routing_analysis.sections import MEASURES, Section, Table, definitions_of, load_sections
from megapromoe.routing_analysis.text_routing import (
    LEAST_IMAGES,
    GroupRows,
    TextRouting,
    WordLoads,
    word_lift,
    word_loads,
)

TABLE_LAYERS = 4  # in tables; the JSON file has all
TITLES = {
    "digit": "Experts and the digits that tokens show",
    "colour": "Experts and the colours that tokens show",
    "task": "Experts and tasks",
    "task of tokens with ink": "Experts and tasks, tokens with ink",
}


def analyse_texts(
    model: DiT, config: Config, of_data: TextRouting, of_tasks: TextRouting | None, top_k: int
) -> tuple[dict[str, Any], list[Section]]:
    """Computes all measures; returns them for JSON, and the sections of the report.

    Args:
        of_data: the routing of training images with their captions.
        of_tasks: the routing of images that show the prompts of the tasks; None: there are none.
        top_k: as in `Request`.
    """
    routing, blocks = of_data.routing, of_data.routing.blocks
    groups = [*of_data.groups, *(of_tasks.groups if of_tasks else ())]
    words = word_loads(of_data.rows_MLNE.sum(0), of_data.captions)
    by_level = [word_loads(rows_LNE, of_data.captions) for rows_LNE in of_data.rows_MLNE]
    evenness_ML = measures.evenness(routing.load_MLE)
    experts = Experts.of(moe_layers(model, blocks), config, blocks, top_k)
    divergence_L = _word_divergence(words)
    bits_ML = {f"information about the {g.kind}": measures.information(g.rows_MLGE) for g in groups}
    if words.words:
        bits_ML["divergence of words"] = np.stack([_word_divergence(of_level) for of_level in by_level])
    of_classes = ("class_information_bits", "class_share")
    numbers = {
        **{key: value for key, value in routing.numbers().items() if key not in of_classes},
        "levels": routing.levels,
        "load_by_level": routing.load_MLE,
        "load_entropy_by_level": evenness_ML,
        "experts_of_a_token": routing.visits_LV / routing.visits_LV.sum(1, keepdims=True),
        "words": _numbers_of_words(words, by_level),
        "word_divergence_bits": divergence_L,
        "groups": {g.kind: g.numbers() for g in groups},
        "task_images": len(of_tasks.captions) if of_tasks else 0,
        **{f"{g.kind.replace(' ', '_')}_information_bits": g.information_L for g in groups},
        **experts.numbers(),
        "definitions": {
            **{name: definition(MEASURES[name]) for name in ("load", "evenness", "information", "jensen_shannon")},
            **{name: definition(MEASURES[name]) for name in ("cosine_matrix", "subspace_overlap")},
            "word_lift": definition(word_lift),
        },
    }
    side = config.model.input_size // config.model.patch_size
    noise = f"noise level {routing.middle:g}, a quantile of the levels of training"
    sections = [_section_of_groups(g, of_data, of_tasks) for g in groups]
    if words.words:
        sections.append(
            Section(
                "words",
                "Experts and words",
                [("lift", definition(word_lift))],
                text_figures.words_figure(blocks, words),
                [
                    f"The most frequent words that at least {LEAST_IMAGES} captions have and {LEAST_IMAGES} have not."
                    f" A dot marks a difference of more than {text_figures.NOTICED} standard errors."
                ],
                [_table_of_words(blocks, words)],
            )
        )
    if bits_ML:
        sections.append(
            Section(
                "information",
                "Words and tokens over layers and noise levels",
                definitions_of("information", "jensen_shannon"),
                text_figures.information_figure(blocks, routing.levels, bits_ML),
                ["Of words: the mean over words of the divergence of the loads with and without the word."],
            )
        )
    sections += [
        *load_sections(routing, evenness_ML),
        Section(
            "maps",
            "From tokens to experts",
            [("token map", "Images, and for each of their tokens (patches) the expert with the largest weight.")],
            text_figures.captions_figure(of_data, side),
            [f"At {noise}."],
        ),
        *experts.sections(routing),
    ]
    return numbers, sections


def _word_divergence(words: WordLoads) -> np.ndarray:
    """The Jensen-Shannon divergence (L,) of the loads with a word and without it, in bits, the mean over words."""
    pairs_LW = zip(words.load_LWE, words.without_LWE, strict=True)
    divergence = measures.jensen_shannon
    return np.array([np.mean([divergence(*pair) for pair in zip(*both, strict=True)] or [np.nan]) for both in pairs_LW])


def _numbers_of_words(words: WordLoads, by_level: Sequence[WordLoads]) -> list[dict[str, Any]]:
    return [
        {
            "word": word,
            "images": int(words.count_W[number]),
            "load": words.load_LWE[:, number],
            "load_without": words.without_LWE[:, number],
            "lift": words.lift_LWE[:, number],
            "standard_errors": words.standard_errors_LWE[:, number],
            "lift_by_level": [of_level.lift_LWE[:, number] for of_level in by_level],
        }
        for number, word in enumerate(words.words)
    ]


def _section_of_groups(groups: GroupRows, of_data: TextRouting, of_tasks: TextRouting | None) -> Section:
    blocks = of_data.routing.blocks
    notes = [f"Each row of a heat map adds up to 1. Counted over {len(of_data.routing.levels)} noise levels."]
    if of_tasks is not None and groups in of_tasks.groups:
        notes.append(
            f"{len(of_tasks.captions)} real pictures of the prompts of the tasks, which name combinations that training"
            " never shows; the model gets the noisy picture and its prompt."
        )
    else:
        notes.append("A token shows a digit if its patch has ink of it; the colour is that which the caption names.")
    return Section(
        groups.kind.replace(" ", "_"),
        TITLES.get(groups.kind, f"Experts and each {groups.kind}"),
        definitions_of("load", "information"),
        text_figures.groups_figure(blocks, groups),
        notes,
        [table_of_groups(blocks, groups)],
    )


def _some_layers(blocks: Sequence[int]) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, len(blocks) - 1, min(TABLE_LAYERS, len(blocks))).round()})


def table_of_groups(blocks: Sequence[int], groups: GroupRows) -> Table:
    """The load of the experts over the tokens of each group, in some layers."""
    layers, (_, _, E) = _some_layers(blocks), groups.load_LGE.shape
    rows_G = groups.rows_LGE.sum(2)[0]
    header = [groups.kind, "tokens", *(f"block {blocks[i]}, expert {e}" for i in layers for e in range(E))]
    rows = []
    for number, name in enumerate(groups.names):
        load_E = [groups.load_LGE[i, number, e] for i in layers for e in range(E)]
        shown = [f"{value:.3f}" if rows_G[number] else "" for value in load_E]
        rows.append([name, f"{rows_G[number]:,}", *shown])
    return header, rows


def _table_of_words(blocks: Sequence[int], words: WordLoads) -> Table:
    """For each word the expert whose load differs most, in standard errors, in some layers."""
    layers = _some_layers(blocks)
    header = ["word", "captions", *(f"block {blocks[i]}: expert, lift, standard errors" for i in layers)]
    rows = []
    for number, word in enumerate(words.words[: text_figures.SHOWN_WORDS]):
        cells = []
        for layer in layers:
            errors_E = words.standard_errors_LWE[layer, number]
            expert = int(np.abs(errors_E).argmax())
            lift = words.lift_LWE[layer, number, expert]
            cells.append(f"{expert}, {lift:.2f}, {errors_E[expert]:+.1f}")
        rows.append([word, str(words.count_W[number]), *cells])
    return header, rows

"""Statistics of a routing trace and of recorded routes, against numbers that are known."""

import json

import numpy as np
import pytest

from megapromoe.recorded_routes import FixedTokens, Routes, RoutesError, changed_share, read_routes, write_routes
from megapromoe.routing_analysis.figures import png
from megapromoe.routing_analysis.trace import drift_of, load_series, numbers_of, quantiles, tables_of
from megapromoe.routing_analysis.trace_figure import trace_figure
from megapromoe.routing_trace import TraceRecord, checked_line, encode

TOKENS = FixedTokens("ema", (1, 3), (0.1, 0.5), (0, 7, 14), experts=4, tokens=5)


def trace_of(file, rows_NRME, ep=1, group=1):
    blocks = tuple(range(1, 2 * len(rows_NRME[0][0]), 2))
    records = [
        TraceRecord(10 * number, blocks, np.array(rows_RME), ep, group) for number, rows_RME in enumerate(rows_NRME, 1)
    ]
    file.write_bytes(b"".join(map(encode, records)))
    return load_series(file)


def routes(step: int, expert_LMNS=None, of=TOKENS) -> Routes:
    if expert_LMNS is None:
        expert_LMNS = np.random.default_rng(step).integers(-1, of.experts, of.shape)
    return Routes(step, of, expert_LMNS)


def test_fullest_expert_and_rank_over_mean(tmp_path):
    """Two data ranks of one expert-parallel group; rank 0 has experts 0 and 1, rank 1 has 2 and 3."""
    first = [[[8, 0, 0, 0]], [[0, 0, 8, 0]]]  # of each expert: 8, 0, 8, 0; of each rank: 8, 8
    second = [[[6, 2, 0, 0]], [[4, 4, 0, 0]]]  # 10, 6, 0, 0; 16, 0
    none = [[[0, 0, 0, 0]], [[0, 0, 0, 0]]]
    series = trace_of(tmp_path / "trace", [first, second, none], ep=2, group=2)
    assert series.steps_N.tolist() == [10, 20, 30] and series.layouts == ((2, 2),)
    np.testing.assert_array_equal(series.expert_NM[:, 0], [2, 2.5, np.nan])
    np.testing.assert_array_equal(series.rank_NM[:, 0], [1, 2, np.nan])
    np.testing.assert_array_equal(series.step_N, [1, 2, np.nan])
    numbers = numbers_of(series)
    assert numbers["records_without_rows"].tolist() == [1]
    assert numbers["fullest_expert_over_mean"]["p50"].tolist() == [2.25]
    assert numbers["fullest_expert_over_mean"]["max"].tolist() == [2.5]
    assert numbers["fullest_rank_over_mean_of_the_step"] == {"p50": 1.5, "p95": 1.95, "max": 2.0}
    assert numbers["load_over_mean"].tolist() == [[18 / 8, 6 / 8, 8 / 8, 0]]
    assert tables_of(numbers) == [
        [
            ["fullest / mean", *(f"{what} {name}" for what in ("expert", "rank") for name in ("p50", "p95", "max"))],
            ["block 1", "2.25", "2.48", "2.50", "1.50", "1.95", "2.00"],
            ["all blocks", "", "", "", "1.50", "1.95", "2.00"],
        ]
    ]


def test_the_step_is_weighted_by_rows(tmp_path):
    """Without expert parallelism a rank processes its own rows. A layer of few rows counts little for the step."""
    series = trace_of(tmp_path / "trace", [[[[30, 0], [1, 1]], [[0, 10], [6, 0]]]])
    assert series.rank_NM.tolist() == [[1.5, 1.5]] and series.expert_NM.tolist() == [[1.5, 1.75]]
    assert series.step_N.tolist() == [(30 + 6) / (20 + 4)]


def test_quantiles_leave_out_what_is_undefined():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    for name, expected in {"p50": 2.0, "max": 3.0}.items():
        np.testing.assert_array_equal(quantiles(values)[name], [expected, np.nan])


def test_a_trace_of_null_batches_alone_has_a_picture_and_a_table(tmp_path):
    series = trace_of(tmp_path / "trace", np.zeros((3, 2, 2, 4), dtype=int))
    assert tables_of(numbers_of(series))[0][1] == ["block 1", *["no rows"] * 6]
    assert png(trace_figure(series)).startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (700, 1, 5, 48)], ids=str)
def test_pictures_of_few_and_of_many(tmp_path, shape):
    """Each record is in one column of the heat map, also if several share a column."""
    series = trace_of(tmp_path / "trace", np.random.default_rng(0).integers(0, 9, shape))
    figure = trace_figure(series, drift_of([routes(10), routes(20), routes(30)]))
    maps = [ax for ax in figure.axes if ax.get_title().startswith("block")]
    assert len(maps) == shape[2] and maps[0].images[0].get_array().shape == (shape[3], min(shape[0], 300))
    assert png(figure).startswith(b"\x89PNG")


def test_drift_is_the_share_of_tokens_that_changed():
    before, after = routes(10), routes(20)
    changed = before.expert_LMNS.copy()
    changed[0, 0, 0, :3] = (changed[0, 0, 0, :3] + 1) % 4  # three of 30 tokens
    changed[1] = -1  # all tokens that had an expert
    had_one = (before.expert_LMNS[1] >= 0).mean()
    assert 0 < had_one < 1
    assert changed_share(before, routes(20, changed)).tolist() == [3 / 30, had_one]
    assert changed_share(before, routes(20, before.expert_LMNS)).tolist() == [0, 0]
    other = FixedTokens("master", *list(vars(TOKENS).values())[1:])
    with pytest.raises(RoutesError, match="step 10 are of other tokens, layers or weights than those of step 20"):
        changed_share(before, routes(20, of=other))
    pairs = drift_of([before, after, before])
    assert [(pair["from"], pair["to"]) for pair in pairs] == [(10, 20), (20, 10)]
    assert pairs[0]["changed"].tolist() == pairs[1]["changed"].tolist() == changed_share(before, after).tolist()


def test_routes_are_read_back(tmp_path):
    file, written = tmp_path / "new" / "routes.jsonl", [routes(10), routes(20)]
    write_routes(file, written)
    for expected, read in zip(written, read_routes(file), strict=True):
        assert (read.step, read.of) == (expected.step, TOKENS) and np.array_equal(
            read.expert_LMNS, expected.expert_LMNS
        )


def damaged(lines: list[bytes]) -> dict[str, tuple[bytes, str]]:
    values = json.loads(lines[1])
    del values["crc32"]
    changes = {
        "levels": ([0.1, 1.5], "noise levels are not between"),
        "images": ([], "sizes do not fit"),
        "tokens": (6, "number of numbers is wrong"),
        "experts": (3, "it has the expert 3 of 3"),
        "blocks": ([1, "3"], "not natural numbers"),
        "step": (10, "its step do not fit the line before"),
        "weights": ("master", "its tokens or its step do not fit"),
        "routes": ("", "numbers cannot be read|number of numbers is wrong"),
    }
    cases = {
        name: (lines[0] + checked_line(values | {name: new}), f"line 2.*{rule}")
        for name, (new, rule) in changes.items()
    }
    cases["cut off"] = (b"".join(lines)[:-9], "line 2: is damaged: it is no record")
    cases["a changed digit"] = (lines[0].replace(b'"step": 10', b'"step": 11') + lines[1], "line 1.*checksum differs")
    cases["nothing"] = (b"", "is empty")
    cases["a trace"] = (encode(TraceRecord(1, (1,), np.ones((1, 1, 2), dtype=int), 1, 1)), "line 1.*keys step, ep")
    return cases


def test_damaged_routes_are_refused_in_a_sentence(tmp_path):
    file = tmp_path / "routes.jsonl"
    write_routes(file, [routes(10), routes(20)])
    for content, rule in damaged(file.read_bytes().splitlines(keepends=True)).values():
        file.write_bytes(content)
        with pytest.raises(RoutesError, match=rule) as refused:
            read_routes(file)
        assert str(refused.value).startswith(str(file)) and "\n" not in str(refused.value)
    file.unlink()
    with pytest.raises(RoutesError, match="cannot be read.*routing trace --routes writes this file"):
        read_routes(file)

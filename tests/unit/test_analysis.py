"""The measures against brute force, and the routing report of models of every router."""

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.digits_models import tiny
from support.levels import full

from megapromoe.config.model_options import ROUTERS, UNROUTED
from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import Digits
from megapromoe.routing_analysis import figures, measures, report
from megapromoe.routing_analysis.analysis import MEASURES, Request, analyse, choose_subsets
from megapromoe.routing_analysis.observe import Routing, RoutingError, Tokens, measure_routing
from megapromoe.routing_analysis.report import page, plain

TOOL = Path(__file__).parents[2] / "tools" / "plot_routing.py"
RNG = np.random.default_rng(0)


# ---- measures


def test_load_and_evenness():
    rows = np.array([[2, 6, 0, 0], [0, 0, 0, 0], [5, 5, 5, 5]])
    share = measures.load(rows)
    np.testing.assert_allclose(share, [[0.25, 0.75, 0, 0], [0, 0, 0, 0], [0.25] * 4])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(4)
    np.testing.assert_allclose(measures.evenness(share), [entropy, 0, 1], atol=1e-12)


def test_information_by_brute_force():
    rows = RNG.integers(0, 9, (5, 4))
    p = rows / rows.sum()
    expected = sum(
        p[c, e] * math.log2(p[c, e] / (p[c].sum() * p[:, e].sum())) for c in range(5) for e in range(4) if p[c, e]
    )
    assert measures.information(rows) == pytest.approx(expected)


def test_divergences_by_hand():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert measures.kullback_leibler(p, q) == pytest.approx(1.0)  # log2(0.5 / 0.25)
    assert measures.kullback_leibler(q, p) == math.inf
    middle = (p + q) / 2
    by_hand = sum(0.5 * a * math.log2(a / m) for part in (p, q) for a, m in zip(part, middle, strict=True) if a)
    assert measures.jensen_shannon(p, q) == measures.jensen_shannon(q, p) == pytest.approx(by_hand)
    assert measures.jensen_shannon(np.array([1, 0]), np.array([0, 1])) == pytest.approx(1.0)
    assert measures.jensen_shannon(p, p) == 0 and math.isnan(measures.jensen_shannon(p, np.zeros(3)))


def test_subset_load_pools_rows():
    rows_CE = np.array([[1, 3], [5, 1], [0, 0], [2, 8]])
    share = measures.subset_load(rows_CE, {"a": (0, 1), "none": (2,), "b": (1, 3)})
    np.testing.assert_allclose(share, [[0.6, 0.4], [0, 0], [7 / 16, 9 / 16]])


def test_cosines():
    vectors = RNG.normal(size=(3, 7))
    for i, j in np.ndindex(3, 3):
        expected = vectors[i] @ vectors[j] / math.sqrt(vectors[i] @ vectors[i] * (vectors[j] @ vectors[j]))
        assert measures.cosine_matrix(vectors)[i, j] == pytest.approx(expected)
    assert not measures.cosine_matrix(np.zeros((2, 3))).any()


def test_overlap_is_the_mean_squared_cosine_of_principal_angles():
    from scipy.linalg import subspace_angles

    weights, k = RNG.normal(size=(3, 12, 9)), 4
    overlap = measures.subspace_overlap(weights, k)
    for i, j in np.ndindex(3, 3):
        bases = []
        for w in (weights[i], weights[j]):  # the top eigenvectors of W·Wᵀ, by another route
            values, vectors = np.linalg.eigh(w @ w.T)
            bases.append(vectors[:, np.argsort(values)[-k:]])
        assert overlap[i, j] == pytest.approx(np.mean(np.cos(subspace_angles(*bases)) ** 2))
    np.testing.assert_allclose(np.diag(overlap), 1)
    axes = np.stack([np.diag([9, 9, 1, 1, 1, 1]), np.diag([1, 1, 9, 9, 1, 1]), np.diag([1, 9, 9, 1, 1, 1])])
    np.testing.assert_allclose(measures.subspace_overlap(axes, 2), [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]])


def test_random_subspaces_overlap_by_k_over_n():
    weights = RNG.normal(size=(16, 48, 96))
    assert measures.off_diagonal_mean(measures.subspace_overlap(weights, 6)) == pytest.approx(6 / 48, rel=0.05)


def test_off_diagonal_mean():
    assert measures.off_diagonal_mean(np.array([[9, 1, 2], [3, 9, 4], [5, 6, 9]])) == 3.5
    assert math.isnan(measures.off_diagonal_mean(np.ones((1, 1))))


def test_distance_ratio_by_brute_force():
    x, group = RNG.normal(size=(40, 5)), RNG.integers(-1, 4, 40)
    middle = {g: np.mean([x[t] for t in range(40) if group[t] == g], axis=0) for g in range(4)}
    apart = [np.linalg.norm(middle[a] - middle[b]) for a in range(4) for b in range(a)]
    within = [np.linalg.norm(x[t] - middle[group[t]]) for t in range(40) if group[t] >= 0]
    assert measures.distance_ratio(x, group) == pytest.approx(np.mean(apart) / np.mean(within))
    assert math.isnan(measures.distance_ratio(x, np.zeros(40)))


def test_tight_groups_have_a_large_ratio_and_are_found():
    truth = np.arange(200) % 10
    x = 20 * RNG.normal(size=(10, 8))[truth] + 0.1 * RNG.normal(size=(200, 8))
    groups = measures.clusters(x)
    assert len(set(zip(truth, groups, strict=True))) == 10
    assert measures.distance_ratio(x, groups) == measures.distance_ratio(x, truth) > 50


def test_t_sne_keeps_neighbours_and_repeats_itself():
    x = np.concatenate([RNG.normal(size=(30, 6)), RNG.normal(size=(30, 6)) + 40])
    place = measures.t_sne(x)
    assert place.shape == (60, 2) and np.array_equal(place, measures.t_sne(x))
    nearest = np.argsort(((place[:, None] - place[None]) ** 2).sum(-1), axis=1)[:, 1]
    assert ((nearest < 30) == (np.arange(60) < 30)).all()


def test_every_measure_has_a_definition():
    for measure in MEASURES.values():
        text = measures.definition(measure)
        assert len(text) > 40 and "Args:" not in text and "Source:" not in text


# ---- what is collected


def test_tokens_are_what_the_router_saw():
    model, config = tiny("sample.batch=7")
    routing = measure_routing(model, config, Digits(), images=20, levels=(0.2, 0.8), tokens=50)
    assert routing.levels == (0.2, 0.8) and routing.middle == 0.8 and routing.rows_MLCE.shape[0] == 2
    router = model.blocks[1].mlp.router
    again = router(torch.from_numpy(routing.tokens.x_LTD[0])[:, None]).assignment.expert_R
    np.testing.assert_array_equal(again.numpy(), routing.tokens.expert_LT[0])
    all_tokens = measure_routing(model, config, Digits(), images=20, levels=(0.8,), tokens=20 * 16).tokens
    np.testing.assert_array_equal(all_tokens.class_T.reshape(20, 16)[:, 0], routing.labels)
    assert len(routing.tokens.class_T) == 50


def test_visits_count_the_experts_of_tokens():
    model, config = tiny("model.router=promoe_ec", "model.top_k=2")
    routing = measure_routing(model, config, Digits(), images=9)
    assert routing.visits_LV.sum() == 9 * 16 * 3
    assert routing.visits_LV[0] @ np.arange(5) == routing.rows_MLCE.sum() == 9 * 3 * 4 * 8


def test_only_the_chosen_blocks():
    model, config = tiny("model.depth=6")
    every = measure_routing(model, config, Digits(), images=6, tokens=10)
    some = measure_routing(model, config, Digits(), images=6, blocks=[5, 1], tokens=10)
    assert every.blocks == (1, 3, 5) and some.blocks == (1, 5)
    np.testing.assert_array_equal(some.rows_LCE, every.rows_LCE[[0, 2]])
    np.testing.assert_array_equal(some.tokens.x_LTD, every.tokens.x_LTD[[0, 2]])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks": [0, 1]}, "layers: 0: must be blocks with experts: 1"),
        ({"blocks": []}, "layers: none: must be"),
        ({"levels": (0.5, 1.0)}, "levels: 1.0 must lie in"),
        ({"levels": ()}, "levels: at least one"),
    ],
)
def test_what_cannot_be_measured(changes, message):
    model, config = tiny()
    with pytest.raises(RoutingError, match=re.escape(message)):
        measure_routing(model, config, Digits(), images=2, **changes)


# ---- the report


@pytest.mark.parametrize(
    "router", [name if name == "kmeans" else full(name) for name in ROUTERS if name not in UNROUTED]
)
def test_every_router_can_be_analysed(router):
    model, config = tiny(f"model.router={router}")
    dataset = Digits()
    routing = measure_routing(model, config, dataset, images=30, tokens=60)
    numbers, sections = analyse(model, config, dataset, routing, {"even": (0, 2), "odd": (1, 3)}, Request())
    content = json.loads(json.dumps(plain(numbers), allow_nan=False))
    assert np.shape(content["subset_load"]) == (1, 2, 4) and np.shape(content["router_cosine"]) == (1, 4, 4)
    assert np.shape(content["load_by_level"]) == (3, 1, 4) and np.sum(content["experts_of_a_token"]) == pytest.approx(
        1, abs=1e-4
    )
    assert ("superclass_accuracy" in content) == (router == "classification")
    assert len({section.name for section in sections}) == 9
    unrouted = content["experts_of_a_token"][0][0]
    assert any("no expert" in note for section in sections for note in section.notes) == (unrouted > 0)
    shots = {section.name: figures.png(section.figure) for section in sections}
    text = page({"run": "<tiny>", "step": 3, "weights": "ema", "router": router, **numbers}, sections, shots)
    assert text.count("data:image/png;base64,") == 9 and "&lt;tiny&gt;" in text and 'src="http' not in text
    pictures = re.findall(r"base64,([^\"]+)", text)
    assert [base64.b64decode(part) for part in pictures] == list(shots.values())


def test_superclass_accuracy():
    model, config = tiny("model.router=classification")
    routing = measure_routing(model, config, Digits(), images=40, tokens=20)
    numbers, _ = analyse(model, config, Digits(), routing, {"all": range(10)}, Request())
    maps = routing.expert_LNS[0]
    assert (maps == maps[:, :1]).all(), "all tokens of an image go to one expert"
    rows = routing.rows_LCE[0]
    right = sum(rows[c, config.model.superclass_of[c]] for c in range(10))
    assert numbers["superclass_accuracy"] == [right / rows.sum()]


def test_subsets_to_compare(tmp_path):
    config = resolve("digits")
    assert choose_subsets(config, Digits(), None) == {str(c): (c,) for c in range(10)}
    file = tmp_path / "subsets.yaml"
    file.write_text("round: [0, 6, 8-9]\nloops: [8]\n")
    assert choose_subsets(config, Digits(), file) == {"round": (0, 6, 8, 9), "loops": (8,)}
    large = resolve("promoe_s")
    first, second = choose_subsets(large, None, None).values()
    assert len(first) == len(second) == 200 and not set(first) & set(second) and max(first + second) < 1000


@pytest.mark.full
def test_many_of_everything_fits_the_pictures():
    rng, L, C, E = np.random.default_rng(1), 6, 100, 48
    tokens = Tokens(rng.normal(size=(L, 40, 8)), rng.integers(-1, E, (L, 40)), rng.integers(0, C, 40))
    rows = rng.integers(0, 9, (3, L, C, E))
    images, labels = rng.normal(size=(C, 4, 8, 8)), np.arange(C)
    maps = rng.integers(-1, E, (L, C, 16))
    routing = Routing(tuple(range(1, 13, 2)), (0.1, 0.5, 0.9), rows, np.ones((L, E + 1)), maps, images, labels, tokens)
    names = [f"class number {c}" for c in range(C)]
    shares = rng.random((L, 30, E))
    drawn = [
        figures.shares_figure(routing, names),
        figures.load_figure(routing),
        figures.levels_figure(routing, measures.evenness(routing.load_MLE)),
        figures.maps_figure(routing, names, 4),
        figures.scatter_figure(routing, tokens.x_LTD[:3, :, :2], [0, 2, 5], names),
        figures.subsets_figure(routing, names[:30], shares, np.full((L, 30, 30), np.nan)),
        figures.matrices_figure(routing, rng.random((L, E, E)), "cosine"),
        figures.lines_figure(routing, {"a": rng.random(L)}, "overlap", {"random": 0.1}),
    ]
    for figure in drawn:
        assert figures.png(figure).startswith(b"\x89PNG") and figure.get_figheight() < 20


# ---- the program


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What `load_model` and `run_config` give for a run, without one."""
    model, config = tiny()
    return tmp_path_factory.mktemp("runs") / "tiny", {
        "load_model": lambda *a, **k: (model, config, 7),
        "run_config": lambda run: config,
    }


def test_the_report_of_a_run(saved, tmp_path, monkeypatch):
    run, functions = saved
    for name, function in functions.items():
        monkeypatch.setattr(report, name, function)
    request = Request(images=30, tokens=40, levels=(0.5,))
    numbers = report.write_routing_report(run, tmp_path / "out", request, pictures=True)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"routing.html", "routing.json", "tokens.png", "subsets.png"} <= written and len(written) == 2 + 9
    assert json.loads((tmp_path / "out" / "routing.json").read_text()) == plain(numbers)
    assert numbers["run"] == "tiny" and numbers["step"] == 7


@pytest.mark.parametrize(
    "request_, message",
    [(Request(layers=(2,)), "must be blocks with experts"), (Request(top_k=17), "must be in 1..16")],
)
def test_nothing_is_written_for_what_cannot_be_shown(saved, tmp_path, monkeypatch, request_, message):
    run, functions = saved
    for name, function in functions.items():
        monkeypatch.setattr(report, name, function)
    with pytest.raises(RoutingError, match=re.escape(message)):
        report.write_routing_report(run, tmp_path / "out", request_)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_the_program_refuses_in_words(tmp_path):
    def run_command(*words):
        done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    code, text = run_command("--run-dir", str(tmp_path), "--levels", "a,b")
    assert code == 2 and "must be numbers separated by commas, not 'a,b'" in text
    code, text = run_command("--run-dir", str(tmp_path))
    assert code == 1 and "has no config.yaml, so it is no run" in text

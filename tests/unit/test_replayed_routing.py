"""The benchmark replays the load of a recorded step: exactly in shares, in one layer and in each layer of a model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megapromoe.benchmark import models, suite
from megapromoe.benchmark.layer import Settings, check_load, first_layer, measure_layer
from megapromoe.benchmark.routing_patterns import RECORDED, planned_counts, planned_experts, recorded_pattern
from megapromoe.cli import main
from megapromoe.routing_trace import TRACE_FILE, TraceError, TraceRecord, encode

ROWS_ME = np.array([[30, 10, 0, 8], [1, 2, 3, 90]])  # as uneven as no pattern of the benchmark
DIGITS = suite.config_of("digits")
SETTINGS = Settings(torch.device("cpu"), torch.float32, 1, 2, 4, ("ours", "loop", "dense"), null=0.25)


@pytest.fixture
def run(tmp_path):
    """A trace of two ranks: step 10 has the rows, step 20 is of null images in block 1."""
    rows = [np.stack([ROWS_ME // 2, ROWS_ME - ROWS_ME // 2]), np.stack([ROWS_ME * [[0], [1]]] * 2)]
    records = [TraceRecord(10 * n, (1, 3), rows_RME, 1, 1) for n, rows_RME in enumerate(rows, 1)]
    (tmp_path / TRACE_FILE).write_bytes(b"".join(map(encode, records)))
    return tmp_path


def replayed(run, step=10, block=None, experiment="layer", **case) -> Settings:
    values = {"size": "digits", "experts": 4, "images": 4, "routing": RECORDED}
    return suite.replay(SETTINGS, [suite.BenchmarkCase(experiment, **values | case)], run, step, block)


@pytest.mark.parametrize("tokens", [48, 1, 1000, 4096])
def test_counts_have_the_recorded_shares(tokens):
    for rows_E in ROWS_ME.tolist():
        pattern = recorded_pattern(rows_E)
        count_E = planned_counts(pattern, tokens, 4)
        assert sum(count_E) == tokens
        assert all(abs(n - tokens * rows / sum(rows_E)) < 1 for n, rows in zip(count_E, rows_E, strict=True))
        assert torch.bincount(planned_experts(pattern, tokens, 4), minlength=4).tolist() == count_E
    assert planned_counts(recorded_pattern([3, 0, 1]), 8, 3) == [6, 0, 2]
    assert planned_counts(recorded_pattern([1, 1, 1]), 5, 3) == [2, 2, 1]
    for rows_E in ([1, 2], [0, 0, 0]):
        with pytest.raises(ValueError, match="not of 3 experts, or has no rows"):
            planned_counts(recorded_pattern(rows_E), 8, 3)


def test_a_layer_has_the_load_of_the_most_uneven_block(run):
    settings = replayed(run)
    assert (settings.recorded, settings.recorded_layer) == (tuple(map(tuple, ROWS_ME.tolist())), 1)
    for block, layer in ((None, 1), (1, 0), (3, 1)):
        some = replayed(run, block=block)
        moe, x_BSD = first_layer(DIGITS, RECORDED, some)
        load_E = check_load(moe, x_BSD, some.pattern(RECORDED), some.num_conditional)
        assert load_E == planned_counts(recorded_pattern(ROWS_ME[layer].tolist()), 48, 4)
    result = measure_layer(DIGITS, RECORDED, settings)
    assert result["load"] == load_E and result["contenders"]["ours"]["counts"]


@pytest.mark.full
def test_each_layer_of_a_model_has_its_own_load(run, monkeypatch):
    settings, loads = replayed(run, experiment="step"), []
    real = models._PlannedRouting.check
    monkeypatch.setattr(
        models._PlannedRouting, "check", lambda self: (loads.append([*self.loads.values()]), real(self))[1]
    )
    figures = models.measure_step(DIGITS, RECORDED, settings)
    planned = [planned_counts(recorded_pattern(rows_E), 48, 4) for rows_E in ROWS_ME.tolist()]
    assert loads == [planned, planned, []] and figures["contenders"]["loop"]


REFUSED = [
    ({"step": 20, "block": 1}, "step 20: block 1 has no rows, a batch of null images"),
    ({"step": 20, "experiment": "step"}, "step 20: block 1 has no rows"),
    ({"step": 15}, "no record from step 15 to 15"),
    ({"block": 2}, "has no block 2 with experts; give one of 1, 3"),
    ({"experts": 8}, "has 4 experts, and layer digits E8 B4 recorded has 8"),
    ({"experiment": "step", "size": "s"}, "has 2 blocks with experts, and step s E4 B4 recorded has 6"),
]


@pytest.mark.parametrize("changes, rule", REFUSED, ids=[rule for _, rule in REFUSED])
def test_what_does_not_fit_is_refused(run, changes, rule):
    with pytest.raises(TraceError, match=rule):
        replayed(run, **changes)
    assert replayed(run, step=None).recorded[1] == tuple(2 * ROWS_ME[1]), "the last step, whose other block is used"


def test_results_of_another_trace_are_not_mixed():
    plain = suite._plain(SETTINGS)
    assert not {"recorded", "recorded_layer", "images"} & plain.keys(), "results from before remain valid"
    replaying = json.loads(json.dumps(suite._plain(replace(SETTINGS, recorded=((1, 2),)))))
    assert replaying["recorded"] == [[1, 2]] == suite._plain(replace(SETTINGS, recorded=((1, 2),)))["recorded"]


WRONG = [
    (("--routing", "recorded"), "--routing recorded, --trace: the trace is what it replays"),
    (("--routing", "real", "--trace", "RUN"), "--routing recorded, --trace: the trace is what it replays"),
    (("--trace-block", "1"), "--trace-step, --trace-block: choose what to replay; give --trace as well"),
]


@pytest.mark.parametrize("words, rule", WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_options_are_refused(capsys, words, rule):
    assert main(["benchmark", "layer", "--quick", "--dry-run", *words]) == 2
    assert rule in capsys.readouterr().err


def test_the_command_lists_what_it_replays(run, tmp_path, capsys):
    words = ["benchmark", "layer", "--quick", "--dry-run", "--trace", str(run), "--trace-step", "10"]
    assert main(words) == 0
    keys = capsys.readouterr().out.split("\n")
    assert [key for key in keys if key] == [f"layer digits E4 B8 {r}" for r in ("real", "balanced", "skewed", RECORDED)]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / TRACE_FILE).write_bytes(b"{}\n")
    assert main([*words[:5], str(tmp_path / "damaged")]) == 1
    assert "line 1: is damaged: it is no record with a checksum" in capsys.readouterr().err

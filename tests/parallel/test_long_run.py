"""A long training run of the published classes on real digits, step by step beside ours through DeepSpeed's engine."""

import math

import pytest
from support import long_run
from support.fidelity import LIMIT, long_run_deviations
from support.processes import run

STEPS, ALL = 100, 1000


@pytest.mark.full
def test_the_first_hundred_steps(fidelity, request):
    """Later rounding grows: by then runs agree in the mean. `make fidelity` trains all steps and writes how far."""
    steps = ALL if request.config.getoption("--fidelity-table") else STEPS
    ours, published = run(1, long_run.train, steps, limit=240 if steps == STEPS else 3600)[0], long_run.published()
    fidelity["long run"] = ours, published
    assert len(ours["loss"]) == steps and len(published["loss"]) == ALL
    assert len(ours["rcl"]) == steps and min(published["rcl"]) > 0
    for off in long_run_deviations(ours, published):
        assert max(off[:STEPS]) <= LIMIT, off.index(max(off[:STEPS]))
    if steps == ALL:
        tail = slice(-300, None)
        means = [math.fsum(losses["loss"][tail]) / 300 for losses in (ours, published)]
        assert means[0] == pytest.approx(means[1], rel=1e-3)
        assert ours["fixed"] == pytest.approx(published["fixed"], rel=1e-3)

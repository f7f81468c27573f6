"""How much memory a conversion takes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.golden_states import NAMES, config_that_runs, state_of

from megapromoe.conversion.exports import export
from megapromoe.conversion.state import model_shapes

# A model of 35 MB with all its state, converted in a process of its own that reports the growth of its memory.
MEASURE = """
import sys
import megapromoe.conversion.exports, megapromoe.conversion.formats, torch, tqdm
from megapromoe.cli import main
torch.set_num_threads(1)
tiny = sys.argv[1:4] + sys.argv[6:]
assert main(["convert", *tiny]) == 0
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # getrusage's has the parent's
before = peak()
assert main(["convert", *sys.argv[4:6], sys.argv[3], *sys.argv[6:]]) == 0
print("GROWTH", (peak() - before) * 1024)
"""


def growth(tiny: Path, source: Path, target: Path, form: str, *more: str) -> int:
    """Bytes of memory that a conversion needs beyond those that a tiny one needed."""
    small = target.with_name(f"tiny-{target.name}")
    words = [str(tiny), str(small), f"--to={form}", str(source), str(target), *more]
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("GROWTH")[1])


@pytest.mark.full
def test_memory_stays_far_below_one_copy_of_the_model(tmp_path):
    config = config_that_runs("promoe_tc")
    model = replace(config.model, hidden_size=192, depth=12, num_experts=4)
    state = state_of("promoe_tc")
    export(state, tmp_path / "tiny.safetensors", "safetensors")
    shapes, _ = model_shapes(model)
    big = replace(state, config=replace(config, model=model), shapes=shapes, read=lambda k, n: torch.ones(shapes[n]))
    export(big, tmp_path / "big.safetensors", "safetensors")
    kind_bytes = big.nbytes // 4
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    assert (tmp_path / "big.safetensors").stat().st_size > 100e6 and kind_bytes > 10 * largest
    tiny, source = tmp_path / "tiny.safetensors", tmp_path / "big.safetensors"
    for form in ("ours", "published"):
        used = growth(tiny, source, tmp_path / NAMES[form], form)
        assert used < 4 * largest + kind_bytes / 4, f"{form}: {used:,} bytes for a model of {kind_bytes:,}"
        tiny, source = tmp_path / f"tiny-{NAMES[form]}", tmp_path / NAMES[form]

"""What parts of the program do without: those that a user waits for import nothing slow."""

import subprocess
import sys

import pytest
from support.levels import full

HELP_AND_SHOW = """
from megapromoe import cli
for line in (['show', '--preset', 'digits'], ['show', 'model.dept=3'], ['train', '--help']):
    try: cli.main(line)
    except SystemExit: pass
"""

START = """
import sys, tempfile
from megapromoe import cli
import megapromoe.engine.deepspeed_backend.adapter, megapromoe.training.loop
assert "matplotlib" not in sys.modules, "only the rank that draws needs it"
settings = ["train.steps=1", "model.depth=2", "model.hidden_size=32", "train.deepspeed=fp32_zero1"]
assert cli.main(["train", "--preset", "digits", "--run-dir", tempfile.mkdtemp() + "/run", *settings]) == 0
"""


@pytest.mark.parametrize(
    "code, absent",
    [
        ("import megapromoe.config.resolve, megapromoe.planning.cost", ["torch"]),
        ("import megapromoe.commands.plan", ["torch", "matplotlib"]),
        (HELP_AND_SHOW, ["torch"]),
        # Imported after a job was joined, deepspeed keeps the job's threads alive beyond the job's end.
        ("import megapromoe.sampling.generation", ["deepspeed", "matplotlib"]),
        # Each takes a second of every rank: torch's optimizers import its compiler, and so does Muon, which DeepSpeed
        # imports; the digits are a file.
        full(START, ["torch._dynamo", "torch._inductor.compile_fx", "sklearn"]),
    ],
    ids=["config and planning", "plan", "help and show", "sampling", "a start"],
)
def test_what_is_not_imported(code, absent):
    code += f"\nimport sys; sys.exit(str([name for name in {absent} if name in sys.modules] or '') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

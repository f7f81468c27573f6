"""Makes the package of this checkout importable for the programs in this folder, without an installation."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])

sys.path.insert(0, ROOT)
# Child processes must import the same package.
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])


def run(command: str) -> int:
    """Runs `megapromoe COMMAND` with this program's arguments; returns its exit code."""
    from megapromoe.cli import main

    return main([command, *sys.argv[1:]])

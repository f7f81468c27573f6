"""Damages every kind of file that the trainer reads and reports the outcomes, from a checkout; see `--help`."""

import sys
from pathlib import Path

import checkout

if __name__ == "__main__":
    sys.path.insert(0, str(Path(checkout.ROOT) / "tests"))
    from support.fuzz_program import main  # type: ignore[import-not-found]  # of the tests

    sys.exit(main(sys.argv[1:]))

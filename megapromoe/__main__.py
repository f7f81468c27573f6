"""`python -m megapromoe`: the command line of `cli`."""

import sys

from megapromoe.cli import main

sys.exit(main())

"""`megapromoe superclasses`, from a checkout; `--help` explains it."""

import sys

import checkout

if __name__ == "__main__":
    sys.exit(checkout.run("superclasses"))

"""A command's options from its words, as the command line would read them."""

import argparse
from types import ModuleType


def parsed(command: ModuleType, *words: str) -> argparse.Namespace:
    """`command`: of `megapromoe.commands`; without section.key=value."""
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    options = parser.parse_args(words)
    options.overrides = []
    return options

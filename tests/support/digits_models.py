"""The smallest model of the digits preset, for tests of what its experts do."""

from megapromoe.config.resolve import resolve
from megapromoe.nn.parallelize import build

TINY = ("model.hidden_size=16", "model.heads=2", "model.depth=2", "sample.batch=16")


def tiny(*overrides: str):
    """The model in evaluation mode, and its config."""
    config = resolve("digits", overrides=(*TINY, *overrides))
    return build(config).eval(), config

"""Options of `megapromoe evaluate` from its words."""

from support import command_words

from megapromoe.commands import evaluate as command


def parsed(*words):
    return command_words.parsed(command, *words)

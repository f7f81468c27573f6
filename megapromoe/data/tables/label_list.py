"""`dataset.json`, the list of labels of StyleGAN's and EDM2's scripts: {"labels": [[name, label], ...]}."""

import json
from pathlib import Path

from megapromoe.data.tables.table import TableError

LABEL_FILE = "dataset.json"


def read_labels(content: bytes, where: Path | str) -> dict[str, int]:
    """The label of each file by its name.

    Args:
        content: of `dataset.json`.
        where: its path, for messages.

    Raises TableError if it is of another form, lists a file twice, or has a label that is not a whole number.
    """
    try:
        pairs = json.loads(content.decode())["labels"]
        labels = {name.replace("\\", "/"): label for name, label in pairs}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TableError(
            f'{where}: is not {{"labels": [[name, label], ...]}} ({type(error).__name__}: {error}); write it again'
        ) from error
    if wrong := next((name for name, label in labels.items() if type(label) is not int), None):
        raise TableError(f"{where}: label {labels[wrong]!r} of {wrong} is not a whole number; correct it")
    if len(labels) < len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise TableError(f"{where}: lists {twice} twice; remove one of the two lines")
    return labels

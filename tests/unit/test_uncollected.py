"""Imports without garbage collection: what they create is not examined later either, and nothing else is exempt."""

import gc
import importlib

import pytest

from megapromoe.imports import uncollected


@pytest.mark.parametrize(
    "exempt, imported, is_exempt", [(True, True, True), (True, False, False), (False, True, False)]
)
def test_what_is_exempt(exempt, imported, is_exempt, tmp_path, monkeypatch):
    name = f"imported_{exempt}_{imported}"
    (tmp_path / f"{name}.py").write_text("objects = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = gc.get_freeze_count()
    with uncollected(exempt):
        assert not gc.isenabled()
        if imported:
            importlib.import_module(name)
    assert gc.isenabled()
    assert (gc.get_freeze_count() >= before + 1000) == is_exempt


def test_an_error_in_the_block_is_passed_on():
    with pytest.raises(ModuleNotFoundError), uncollected():
        importlib.import_module("no_such_module")
    assert gc.isenabled()

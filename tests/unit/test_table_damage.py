"""Tables under damage: flipped bits, cut, swapped and missing files end in a sentence, and never in a traceback.

Most of these formats have no checksums, so that some damage changes numbers unnoticed: what `encode` writes has them.
"""

import shutil

import numpy as np
import pytest
from support.fuzz import HARMLESS, NAMED, SILENT, Target, damage
from support.table_files import FIXTURE, FORMATS, labels, latents, write_images, write_latents

from megapromoe.data.table_latents import TableLatents
from megapromoe.data.tables.classes import table_scan
from megapromoe.data.tables.opening import open_table
from megapromoe.data.tables.table import IMAGES, LATENTS
from megapromoe.errors import UserError

FORMS = [(form, LATENTS) for form in (*FORMATS, "datasets")]
FORMS += [(form, IMAGES) for form in ("parquet", "tar", "edm2_hdf5")]
LIBRARY = {"hdf5": "h5py", "edm2_hdf5": "h5py", "tar": "webdataset"}
LIBRARY |= dict.fromkeys(("tensors", "edm2", "fast_dit"), "numpy")


@pytest.mark.full
@pytest.mark.parametrize("form, kind", FORMS)
def test_damage_ends_in_a_sentence(form, kind, tmp_path):
    pytest.importorskip(LIBRARY.get(form, "pyarrow"))
    place = tmp_path / "data"
    if form == "datasets":
        path = shutil.copytree(FIXTURE / "latents", place)
    else:
        path = write_latents(place, form, latents(12), labels(12)) if kind == LATENTS else write_images(place, form)

    def contents() -> list:
        table = open_table(path, kind)
        listed = table_scan(table)
        if kind == IMAGES:
            return [[item.label for item in listed.items], list(table.values(0, len(table)))]
        source = TableLatents(table, listed, dtype="float32")
        return [(item.path, item.label, record.tobytes()) for item, record, _ in source.records(listed.items)]

    expected = contents()

    def classify(_) -> str:
        try:
            with np.errstate(all="ignore"):
                return HARMLESS if contents() == expected else SILENT
        except UserError as error:
            assert "\n" not in str(error), "one sentence"
            return NAMED

    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    outcomes = damage(Target(form, files, classify), 40, 1).outcomes
    assert outcomes[NAMED] >= 4 and sum(outcomes.values()) >= 40

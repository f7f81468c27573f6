"""Files of strangers, made to mislead or to take any time or memory: one sentence each."""

import copy
import io
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from support.golden_states import PUBLISHED, config_that_runs, state_of
from support.levels import full

from megapromoe.config.options import ConfigError
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.stream import ConversionError, read_safetensors
from megapromoe.conversion.torch_files import read_pickle
from megapromoe.data.images import ImageError, read_image
from megapromoe.data.importing import PublishedLatents


def tensor(begin, end, shape=(2,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def safetensors(path, header, size=16):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


HEADERS = {
    "overlap": ({"a": tensor(0, 8), "b": tensor(4, 16, (3,))}, "b overlaps the tensor before it"),
    "the same bytes": ({"a": tensor(0, 16, (4,)), "b": tensor(0, 16, (4,))}, "overlaps the tensor before it"),
    "gap": ({"a": tensor(0, 4, (1,)), "b": tensor(8, 16)}, "b comes after unused bytes"),
    "gap at the end": ({"a": tensor(0, 8)}, "8 unused bytes at its end"),
    "beyond": ({"a": tensor(0, 16, (4,)), "b": tensor(16, 24)}, "b is not within"),
    "twice": ('{"a": X, "a": X}'.replace("X", json.dumps(tensor(0, 16, (4,)))), "occurs twice"),
    "negative shape": ({"a": tensor(0, 16, (-2, -2))}, "must be whole numbers"),
    "float shape": ({"a": tensor(0, 16, (4.0,))}, "must be whole numbers"),
    "bool shape": ({"a": tensor(0, 16, (True, 4))}, "must be whole numbers"),
    "negative offset": ({"a": tensor(-16, 0, (4,))}, "must be whole numbers"),
    "float offset": ({"a": tensor(0, 16.0, (4,))}, "must be whole numbers"),
    "huge": ({"a": tensor(0, 16, (10**15,))}, "do not hold a tensor of shape"),
    "unknown key": ({"a": tensor(0, 16, (4,), more=1)}, "header cannot be read"),
    "unknown type": ({"a": tensor(0, 16, (4,), "F3")}, "header cannot be read"),
    "no object": ({"a": 3}, "header cannot be read"),
    "a list": ("[1, 2]", "header cannot be read"),
    "metadata": ({"__metadata__": {"a": {"b": 1}}, "a": tensor(0, 16, (4,))}, "__metadata__ must hold text"),
    "deep": ('{"a": ' + "[" * 200_000, "header cannot be read"),
}


@pytest.mark.parametrize("header, named", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_that_misleads_is_refused(tmp_path, header, named):
    path = safetensors(tmp_path / "a.safetensors", header)
    with pytest.raises(ConversionError) as error:
        read_safetensors(path)
    assert named in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 500


def test_a_sound_safetensors_file_is_read(tmp_path):
    tensors, _ = read_safetensors(
        safetensors(tmp_path / "a.safetensors", {"b": tensor(8, 16), "none": tensor(8, 8, (0, 3)), "a": tensor(0, 8)})
    )
    assert tensors["a"].read().tolist() == [0, 0] and tensors["none"].read().shape == (0, 3)


def test_pipes_are_refused(tmp_path):
    for name in ("a.safetensors", "b.jpg", "c.pth", "d.npz"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ConversionError, match="is not a regular file"):
        read_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(ImageError, match="is not a regular file"):
        read_image(tmp_path / "b.jpg", 8)
    with pytest.raises(ConversionError, match="c.pth"):
        open_state(tmp_path / "c.pth")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match="is not a regular file"):
        read_image(tmp_path / "device.jpg", 8)
    with pytest.raises(ImageError, match=r"none of 1 files can be read; .*d.npz: is not a regular file"):
        PublishedLatents(tmp_path, one_class=True)


def test_an_image_of_one_row_is_not_scaled_to_any_size(tmp_path):
    Image.new("L", (1_000_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="1000000x1: too elongated"):
        read_image(tmp_path / "a.png", 256)


def archive(path, data, compression=zipfile.ZIP_STORED, names=("a/data.pkl",)):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name in names:
            file.writestr(name, data)
        file.writestr("a/version", "3\n")
    return path


class Bytes:
    """Unpickling it takes as many bytes as its number."""

    def __reduce__(self):
        return bytearray, (1 << 40,)


def laughs():
    content = ["x"]
    for _ in range(40):
        content = [content] * 2
    return content


BOMBS = {
    "compressed": (lambda p: archive(p, b"\0" * (1 << 24), zipfile.ZIP_DEFLATED), "compressed records"),
    "one list in many places": (lambda p: torch.save({"model_state_dict": laughs()}, p), "expands to more than"),
    "nested": (lambda p: torch.save(nested(60), p), "nested more than"),
    "a number of bytes": (lambda p: torch.save({"x": Bytes()}, p), "bytearray"),
    "garbage": (lambda p: archive(p, b"\x80\x02garbage"), "is not a torch.save file, or is damaged"),
}


def nested(depth):
    content: list = []
    for _ in range(depth):
        content = [content]
    return content


@pytest.mark.parametrize(
    "make, named",
    [full(*case) if name == "one list in many places" else case for name, case in BOMBS.items()],  # takes 6 seconds
    ids=BOMBS,
)
def test_a_bomb_is_refused(tmp_path, make, named):
    path = tmp_path / "a.pth"
    make(path)
    with pytest.raises(ConversionError) as error:
        read_pickle(path)
    assert named in str(error.value) and str(path) in str(error.value)


def test_records_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(tmp_path / "a.pth", pickle.dumps({}, 2), names=("a/data.pkl", "a/data.pkl"))
    with pytest.raises(ConversionError, match="two of its records have the same name"):
        read_pickle(tmp_path / "a.pth")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    torch.save({"x": torch.zeros(1).expand(10**12)}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"a tensor of shape \(1000000000000,\) is not within"):
        read_pickle(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content, named",
    [
        ({"model_state_dict": [1]}, "model_state_dict is not a mapping"),
        ({"model_state_dict": {"a": 3}}, "model_state_dict.a is not a tensor"),
        ({"model_state_dict": {1: torch.zeros(1)}}, "model_state_dict is not a mapping"),
        ({"model_state_dict": OrderedDict(a=torch.zeros(1)), "step": "x"}, "step is not a whole number"),
    ],
    ids=range(4),
)
def test_a_state_dict_of_other_things_is_refused(tmp_path, content, named):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=named):
        open_state(tmp_path / "a.pth", config=config_that_runs())


def test_published_latents_that_promise_more_than_they_hold_are_refused(tmp_path):
    (tmp_path / "class").mkdir()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6, 8)})
    with zipfile.ZipFile(tmp_path / "class" / "a.npz", "w") as file:
        file.writestr("latent.npy", header.getvalue())
    with pytest.raises(ImageError, match="latent.npy does not hold an array of shape"):
        PublishedLatents(tmp_path, one_class=True)


def places_of(tree, path=()):
    """Where the values of a tree of mappings and lists are."""
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places_of(value, (*path, key))


JUNK = (
    None,
    7,
    -1,
    2.5,
    float("nan"),
    "text",
    [],
    {},
    [[]],
    {"a": {}},
    [1, "a", None],
    torch.zeros(0),
    torch.ones(2, 2),
)


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["published", "deepspeed"])
def test_a_tree_of_another_form_is_a_sentence_and_never_a_traceback(tmp_path, kind, count):
    """Each mapping, list and value of a sound file in turn is something else, or gone."""
    chosen = random.Random(0)
    if kind == "published":
        sound, path = torch.load(PUBLISHED, weights_only=True), tmp_path / "a.pth"
        opened, config = path, config_that_runs()
    else:
        opened, config = tmp_path / "deep", None
        export(state_of("promoe_tc"), opened, "deepspeed")
        path = next(opened.glob("*/mp_rank_00_model_states.pt"))
        sound = torch.load(path, weights_only=True)
    plain = {key: value for key, value in sound.items() if key not in ("model_state_dict", "ema_model_state_dict")}
    places = [place for place in places_of(plain) if place]
    short = [place for place in places if len(place) <= 3]
    read = refused = 0
    for place in [*chosen.sample(short, min(count, len(short))), *chosen.sample(places, count)]:
        tree = copy.deepcopy(sound)
        owner = tree
        for key in place[:-1]:
            owner = owner[key]
        if chosen.random() < 0.15:
            del owner[place[-1]]
        else:
            owner[place[-1]] = chosen.choice(JUNK)
        torch.save(tree, path)
        try:
            open_state(opened, config=config)
            read += 1
        except (ConversionError, ConfigError) as error:
            refused += 1
            assert str(tmp_path) in str(error) or "config" in str(error), error
    assert refused > 0.2 * count, (read, refused)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda o: o.update(param_groups=3), "its param_groups are not a list"),
        (lambda o: o.update(param_groups=[]), "its param_groups are not a list"),
        (lambda o: o["param_groups"][0].update(params=None), "params of a group is not a list of int"),
        (lambda o: o["param_groups"][0].update(params=[[0]]), "params of a group is not a list of int"),
        (lambda o: o["param_groups"][0].update(param_names=[1]), "param_names of a group is not a list of str"),
        (lambda o: o.update(state=[]), "its state is not a mapping of mappings"),
        (lambda o: o["state"].update({1: 3}), "its state is not a mapping of mappings"),
        (lambda o: o["state"][1].pop("step"), "optimizer's step of .* is not a whole number"),
        (lambda o: o["state"][1].update(step=float("nan")), "optimizer's step of .* is not a whole number"),
        (lambda o: o["state"][1].update(step=torch.ones(2)), "optimizer's step of .* is not a whole number"),
        (lambda o: o["state"][1].update(exp_avg=3), "the exp_avg of .* is missing or has another shape"),
    ],
    ids=range(11),
)
def test_a_malformed_optimizer_is_named(tmp_path, change, named):
    tree = torch.load(PUBLISHED, weights_only=True)
    change(tree["optimizer_state_dict"])
    torch.save(tree, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=named):
        open_state(tmp_path / "a.pth", config=config_that_runs())

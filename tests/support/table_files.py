"""Latents and images in the formats that users have, for tests; libraries are imported when they are needed."""

import json
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from support.text_folders import png

COUNT, CLASSES = 10, 3
FORMATS = ("parquet", "tensors", "hdf5", "edm2_hdf5", "edm2", "fast_dit", "tar", "npy_column", "tensor_column")
FIXTURE = Path(__file__).parents[1] / "golden" / "datasets"  # written by `datasets` 5.2.0


def latents(count: int = COUNT, shape=(4, 2, 2), seed: int = 0) -> np.ndarray:
    """Latents (N, C, H, W) float32, whose channels have different means and deviations."""
    channels = np.arange(shape[0], dtype=np.float32)[:, None, None]
    values = np.random.default_rng(seed).standard_normal((count, *shape))
    return (values * (1 + channels) + 2 * channels - 3).astype(np.float32)


def labels(count: int = COUNT) -> list[int]:
    return [i % CLASSES for i in range(count)]


def npy(array: np.ndarray) -> bytes:
    content = BytesIO()
    np.save(content, array)
    return content.getvalue()


def write_parquet(path: Path, columns: Mapping[str, object], rows_of_group: int = 3) -> Path:
    """A Parquet file in small row groups; columns as lists or Arrow arrays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=rows_of_group, write_page_checksum=True)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, BytesIO(content))
    return path


def write_hdf5(path: Path, sets: Mapping[str, object]) -> Path:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in sets.items():
            file[name] = values
    return path


def write_latents(folder: Path, form: str, values: np.ndarray, of: list[int]) -> Path:
    """Latents and labels in a format; returns the path to give. Formats of several files hold them in two files."""
    folder.mkdir(parents=True)
    half = len(values) // 2
    halves = ((0, values[:half], of[:half]), (1, values[half:], of[half:]))
    if form in ("parquet", "npy_column", "tensor_column"):
        import pyarrow as pa

        for number, part, some in halves:
            column: object = part.tolist()
            if form == "npy_column":
                column = [npy(value) for value in part]
            elif form == "tensor_column":
                column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(part))
            else:
                column = pa.array(column, pa.list_(pa.list_(pa.list_(pa.float32()))))
            write_parquet(folder / f"train-{number}.parquet", {"latent": column, "label": some})
    elif form == "tensors":
        for number, part, some in halves:
            content = {"latents": torch.from_numpy(part.copy()), "labels": torch.tensor(some)}
            save_file(content, folder / f"latents_rank00_shard{number:03d}.safetensors")
    elif form == "hdf5":
        for number, part, some in halves:
            write_hdf5(folder / f"{number}.h5", {"latents": part, "labels": np.array(some)[:, None]})
    elif form in ("edm2_hdf5", "edm2"):
        names = [f"00000/img-{i:08d}.npy" for i in range(len(values))]
        listed = json.dumps({"labels": [list(pair) for pair in zip(names, of, strict=True)]}).encode()
        if form == "edm2_hdf5":
            members = dict(zip(names, values, strict=True))
            return write_hdf5(folder / "vae.h5", members | {"dataset.json": np.frombuffer(listed, np.uint8)})
        (folder / "00000").mkdir()
        for name, value in zip(names, values, strict=True):
            np.save(folder / name, value)
        (folder / "dataset.json").write_bytes(listed)
    elif form == "fast_dit":
        for name in ("imagenet256_features", "imagenet256_labels"):
            (folder / name).mkdir()
        for i, (value, label) in enumerate(zip(values, of, strict=True)):
            np.save(folder / "imagenet256_features" / f"{i}.npy", value[None])
            np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([label]))
    else:
        for number, part, some in halves:
            members = {}
            for i, (value, label) in enumerate(zip(part, some, strict=True)):
                members |= {f"{i:03d}.npy": npy(value), f"{i:03d}.cls": f"{label}\n".encode()}
            write_tar(folder / f"part-{number}.tar", members)
    return folder


def write_images(folder: Path, form: str, names: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """Ten images of three classes, the third of which is no image, as "parquet", "tar" or "edm2_hdf5"."""
    contents = [png(i, 8) if i != 2 else b"no image" for i in range(COUNT)]
    if form == "parquet":
        import pyarrow as pa

        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": content, "path": "x.png"} for content in contents], kind)
        write_parquet(folder / "train-0.parquet", {"image": column, "label": [names[label] for label in labels()]})
    elif form == "tar":
        members = {}
        for i, content in enumerate(contents):
            members |= {f"{i:03d}.png": content, f"{i:03d}.cls": names[labels()[i]].encode()}
        write_tar(folder / "part-0.tar", members)
    else:
        listed = {f"00000/img{i:08d}.png": content for i, content in enumerate(contents)}
        text = json.dumps({"labels": [list(pair) for pair in zip(listed, labels(), strict=True)]}).encode()
        sets = {name: np.frombuffer(content, np.uint8) for name, content in (listed | {"dataset.json": text}).items()}
        return write_hdf5(folder / "images.h5", sets)
    return folder

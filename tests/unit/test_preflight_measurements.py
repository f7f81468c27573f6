"""The preflight's measurements must detect a fault; the nodes according to the launcher."""

import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.latent_folders import Arrays, write
from support.made_up_clusters import change, cluster_of, verdict_of
from support.text_folders import WordEncoder

from megapromoe.checkpoint.disk_space import checkpoint_bytes
from megapromoe.config.resolve import resolve
from megapromoe.data.captions import CaptionedItem
from megapromoe.data.encode_text import TextJob, encode_text
from megapromoe.distributed import launch_environment, rendezvous
from megapromoe.distributed.slurm_lists import all_hosts
from megapromoe.preflight import machine, storage, topology
from megapromoe.preflight.verdict import SKIP


def test_room_for_checkpoints():
    """Master, two moments and EMA in fp32 of 1,567,438,880 parameters, two kept and one being written."""
    assert checkpoint_bytes(resolve("promoe_xl")) == 1_567_438_880 * 16 * 3


def test_data_that_is_not_chosen_is_not_checked():
    assert storage.check_data(resolve("promoe_xl")) is None
    chosen = resolve("promoe_xl", overrides=["data.source=synthetic", "data.size=64"])
    assert storage.check_data(chosen).records == 64
    cluster = cluster_of(2)
    cluster.findings["data"] = {}
    (row,) = (row for row in verdict_of(cluster).rows if row.check == "data")
    assert row.verdict == SKIP and "data.source" in row.remedy


def test_one_wrong_entry_of_a_product_is_detected(monkeypatch):
    wrong, teraflops = machine.check_matmul(torch.device("cpu"))
    assert wrong == 0 and teraflops > 0
    calls = []

    def faulty(a, b):
        product = a @ b
        calls.append(1)
        if len(calls) == 4:  # only in the last product: errors may be intermittent
            product[17, 5] += 2
        return product

    monkeypatch.setattr(machine, "multiply", faulty)
    assert machine.check_matmul(torch.device("cpu"))[0] == 1
    monkeypatch.setattr(machine, "multiply", lambda a, b: torch.full((len(a), b.shape[1]), torch.nan))
    assert machine.check_matmul(torch.device("cpu"))[0] == 1024


SMI = """#!{python}
import sys
names = sys.argv[1].removeprefix("--query-gpu=").split(",")
unknown = [n for n in names if n == "retired_pages.pending"]
if unknown:
    print(f'Field "{{unknown[0]}}" is not a valid field to query.')
    sys.exit(2)
values = {{"index": "0", "driver_version": "570.1", "remapped_rows.failure": "Yes", "name": "NVIDIA X"}}
print(", ".join(values.get(n, "[N/A]") for n in names))
"""


def test_fields_unknown_to_nvidia_smi_are_omitted(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (gpu,) = machine.query_gpus()
    assert gpu["driver_version"] == "570.1" and gpu["remapped_rows.failure"] == "Yes"
    assert "retired_pages.pending" not in gpu
    cluster = cluster_of()
    change(cluster, "machine", 24, gpus=[gpu])
    assert verdict_of(cluster).bad_nodes == ("node3",)
    program.write_text("#!/bin/sh\necho driver not loaded; exit 9\n")
    assert machine.query_gpus() == []


def test_one_changed_byte_changes_the_content_hash(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    for name in ("__init__.py", "a.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.setattr(machine.megapromoe, "__file__", str(package / "__init__.py"))
    before = machine.content_hash()
    assert machine.content_hash() == before
    (package / "a.py").write_text("x = 2\n")
    assert machine.content_hash() != before


def test_topology_is_read_from_sys(tmp_path):
    device = tmp_path / "bus" / "pci" / "devices" / "0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    for node, cores in ((0, "0-3,8-11"), (1, "4-7,12-15")):
        folder = tmp_path / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    assert topology.pci_address(properties) == "0000:1b:00.0" and topology.pci_address(object()) == ""
    assert topology.numa_of_gpu("0000:1b:00.0", tmp_path) == 1
    assert topology.numa_of_gpu("0000:2b:00.0", tmp_path) == topology.numa_of_gpu("", tmp_path) == -1
    assert topology.numa_of_cores({5, 13}, tmp_path) == [1]
    assert topology.numa_of_cores({0, 5}, tmp_path) == [0, 1] and topology.numa_of_cores({0}, tmp_path / "x") == []
    assert not topology.has_rdma(tmp_path)
    (tmp_path / "class" / "infiniband" / "mlx5_0").mkdir(parents=True)
    assert topology.has_rdma(tmp_path)


def test_the_reason_why_torch_uses_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.reason_for_no_gpu() == f"torch {torch.__version__} is built without CUDA"

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert machine.reason_for_no_gpu().endswith("is too old (found version 11040).")
    assert any(fault in machine.reason_for_no_gpu() for fault in machine.SETUP_FAULTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.reason_for_no_gpu() == ""


def test_data_that_cannot_be_read_is_a_finding(monkeypatch):
    config = resolve("digits")
    good = storage.check_data(config)
    assert (good.error, good.records) == ("", 1797) and good == replace(storage.check_data(config), speed=good.speed)

    def missing(config):
        raise FileNotFoundError(2, "No such file", "shard-003")

    monkeypatch.setattr(storage, "open_dataset", missing)
    assert "shard-003" in storage.check_data(config).error


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_captions_are_read_on_each_node_too(tmp_path, dtype):
    def findings(folder: Path) -> storage.Data:
        text = ["model.condition=text", "model.text_width=6", "model.text_tokens=4", "train.global_batch=64"]
        shape = ["model.in_channels=4", "model.input_size=8", "data.source=latents", f"data.path={folder}"]
        return storage.check_data(resolve("promoe_s", overrides=[*text, *shape, "data.flip=false"]))

    def written(folder: Path, value: float) -> Path:
        source = Arrays(count=64, shape=(4, 8, 8), mirror="none")
        write(folder, source)
        captions = [CaptionedItem(item.path, 0, f"some {i % 9}") for i, item in enumerate(source.scan.items)]
        encoder = WordEncoder()
        encoder.feature = lambda word: np.full(6, value, dtype=np.float32)
        encode_text(TextJob(captions, encoder, folder / "text", dtype, beside=folder))
        return folder

    folder, other = written(tmp_path / "one", 1.0), written(tmp_path / "other", 1.5)
    assert findings(folder).error == findings(other).error == "" and findings(folder).records == 64
    assert findings(folder).digest != findings(other).digest, "the images are equal, the features of captions are not"
    (folder / "text" / "text-00000.npy").unlink()
    (other / "text" / "text.json").unlink()
    assert "text-00000.npy" in findings(folder).error and "text.json" in findings(other).error


# ---- nodes according to the launcher


def test_hosts_of_a_node_list():
    assert all_hosts("gpu[03-05,9],x") == ["gpu03", "gpu04", "gpu05", "gpu9", "x"]
    assert all_hosts("rack[1-2]-gpu[8-9]") == ["rack1-gpu8", "rack1-gpu9", "rack2-gpu8", "rack2-gpu9"]
    assert all_hosts("localhost") == ["localhost"]


def test_ranks_per_node_from_the_variables_of_srun(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-3],m")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x3),1")
    assert launch_environment.expected_nodes(launch_environment.LaunchEnvironment("srun")) == {
        "n1": 2,
        "n2": 2,
        "n3": 2,
        "m": 1,
    }
    assert launch_environment.expected_nodes(launch_environment.LaunchEnvironment("torchrun")) == {}
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    assert launch_environment.node_name() == "n2"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert launch_environment.node_name() == socket.gethostname()


def test_a_store_without_a_holder(capfd):
    launch = launch_environment.LaunchEnvironment("torchrun", 1, 2, port=1)
    with pytest.raises(launch_environment.LaunchError, match=r"rank 1 on .* cannot reach 127.0.0.1:1"):
        rendezvous.create_store(launch, 1.0, "preflight")

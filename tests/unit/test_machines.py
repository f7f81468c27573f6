"""The table of GPUs: peaks by device name, and that it is the only one."""

import argparse
import ast
from dataclasses import replace
from pathlib import Path

import pytest

import megapromoe
from megapromoe.commands import plan
from megapromoe.planning import machines
from megapromoe.planning.machines import MACHINES, peak_flops
from megapromoe.planning.roofline import nodes_of


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GB300", None),
        (None, None),
    ],
)
def test_peak_flops(name, peak):
    assert peak_flops(name) == peak


def test_every_peak_is_reachable():
    names = {
        "a100": ["A100"],
        "a800": ["A800"],
        "h100": ["H100", "H100 PCIe", "H100 NVL"],
        "h200": ["H200"],
        "b200": ["B200"],
        "gb200": ["GB200"],
    }
    assert names.keys() == MACHINES.keys()
    for key, machine in MACHINES.items():
        peaks = [machine.peak, *(peak for _, peak in machine.variants)]
        assert [peak_flops(name) for name in names[key]] == peaks


def test_a_job_over_several_nvlink_domains_leaves_no_group_across_their_border():
    """Up to 72 GPUs of GB200 are in one domain; a larger job takes 64 of each, so powers of two stay inside."""
    gb200 = MACHINES["gb200"]
    for world, gpus in ((4, 72), (72, 72), (128, 64), (1024, 64)):
        machine = gb200.for_job(world)
        assert machine.nvlink_gpus == gpus
        for size in (2, 4, 8, 16, 32, 64):
            borders = {start // gpus != (start + size - 1) // gpus for start in range(0, world - size + 1, size)}
            assert nodes_of(size, 1, machine) == 1 and (True not in borders or gpus == 72)
        assert nodes_of(world, 1, machine) == -(-world // gpus)
    assert MACHINES["h100"].for_job(4096) is MACHINES["h100"] and MACHINES["h100"].nvlink_gpus == 8


def test_a800_is_an_a100_with_slower_nvlink():
    a100, a800 = MACHINES["a100"], MACHINES["a800"]
    assert replace(a800, name=a100.name, cuda_name=a100.cuda_name, nvlink=a100.nvlink) == a100
    assert a800.nvlink / a100.nvlink == 400 / 600


def test_a_gpu_is_added_in_one_place(monkeypatch):
    """One entry of the table makes it known to `plan` and to the utilisation that training logs."""
    added = replace(MACHINES["h100"], name="X9 SXM", cuda_name=r"\bX9\b", peak=5e15, variants=())
    monkeypatch.setitem(MACHINES, "x9", added)
    assert peak_flops("NVIDIA X9 HBM9") == 5e15
    parser = argparse.ArgumentParser()
    plan.arguments(parser)
    assert parser.parse_args(["--gpu", "x9"]).gpu == "x9"


def test_no_other_file_holds_a_rate_of_a_gpu():
    rates = {rate for m in MACHINES.values() for rate in (m.peak, m.peak_fp32, m.hbm, *(p for _, p in m.variants))}
    root = Path(megapromoe.__file__).parent
    for file in root.rglob("*.py"):
        numbers = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        assert bool(numbers & rates) == (file == Path(machines.__file__)), f"{file}: {numbers & rates}"

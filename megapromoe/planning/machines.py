"""The table of GPUs and their links, and the assumptions of plans about them.

`MACHINES` is the package's only table of GPUs; plans and the logged utilisation of training use it. Its values are from
data sheets. All efficiencies are assumptions, defined in `Assumptions`.
"""

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A GPU, its node and its network. Rates are per GPU and second; links count in one direction.

    Args:
        peak: dense bf16 FLOP/s; `peak_fp32`: FLOP/s of fp32 products without TF32, torch's default.
        memory: bytes that torch may use; `hbm`: bytes read or written.
        nvlink: bytes sent to GPUs of the same node; `network`: to other nodes.
        pcie: bytes sent to host memory, for offloaded optimizers.
        cuda_name: regular expression for the device names that CUDA reports.
        variants: models with a similar name and another rate: (regular expression, dense bf16 FLOP/s).
        grouped: whether torch computes a grouped bf16 product in one kernel on it; see `nn.moe.expert_linear`.
    """

    name: str
    cuda_name: str
    peak: float
    peak_fp32: float
    hbm: float
    memory: int
    nvlink: float
    network: float
    pcie: float
    gpus_per_node: int = 8
    grouped: bool = True
    variants: tuple[tuple[str, float], ...] = ()


# Memory is the size that torch reports for 80, 80, 141 and 180 GB in the data sheets. Each GPU has a network link, as
# in NVIDIA's DGX: HDR InfiniBand at 200 Gbit/s for A100, NDR at 400 Gbit/s for the others. A800, H800 and GH200 compute
# at the same rates. Source: NVIDIA's data sheets "A100 80GB", "H100", "H100 NVL", "H200" (SXM), "DGX A100", "DGX H100",
# "DGX H200", "DGX B200".
MACHINES = {
    "a100": Machine(
        *("A100 80GB SXM", r"\bA[18]00\b", 312e12, 19.5e12, 2.039e12, 79 * GIB, 300e9, 25e9, 32e9), grouped=False
    ),
    "h100": Machine(
        *("H100 80GB SXM", r"\bH[18]00\b", 989e12, 67e12, 3.35e12, 79 * GIB, 450e9, 50e9, 64e9),
        variants=((r"\bH100 PCIe\b", 756e12), (r"\bH100 NVL\b", 835e12)),
    ),
    "h200": Machine("H200 141GB SXM", r"\bG?H200\b", 989e12, 67e12, 4.8e12, 139 * GIB, 450e9, 50e9, 64e9),
    "b200": Machine("B200 180GB SXM", r"\bB200\b", 2250e12, 75e12, 8.0e12, 178 * GIB, 900e9, 50e9, 64e9),
}


def peak_flops(device_name: str | None) -> float | None:
    """Dense bf16 FLOP/s of the device with this name; None for a CPU, a MIG slice, or a GPU that is not in the table.

    Args:
        device_name: what `torch.cuda.get_device_name` returns, or None for a CPU.
    """
    if device_name is None or "MIG" in device_name:
        return None
    variants = [variant for machine in MACHINES.values() for variant in machine.variants]
    models = [(machine.cuda_name, machine.peak) for machine in MACHINES.values()]
    return next((peak for pattern, peak in variants + models if re.search(pattern, device_name)), None)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions that no data sheet gives: the shares of peak rates that a step reaches, and fixed costs.

    Args:
        products: share of `peak` in large matrix products. `attention`: in the fused attention kernel.
        memory: share of `hbm` in elementwise kernels and the optimizer.
        links: share of `nvlink` and `network` in large collectives.
        tile: multiple to which the rows of each expert are padded in a product.
        near, far, peer: latency of a collective in seconds: inside a node; added for each doubling of the nodes; added
            in an all-to-all for each other rank.
        launch: seconds of host time for each kernel.
        imbalance: rows on the fullest rank relative to the mean, if all ranks hold equally many experts; affects memory
            and time.
        usable: share of `memory` to plan with; the rest is for the CUDA context, NCCL and fragmentation.
    """

    products: float = 0.6
    attention: float = 0.4
    memory: float = 0.75
    links: float = 0.7
    tile: int = 128
    near: float = 15e-6
    far: float = 15e-6
    peer: float = 2e-6
    launch: float = 5e-6
    imbalance: float = 1.25
    usable: float = 0.9

    def in_words(self, machine: Machine) -> str:
        """The assumptions as one paragraph of a plan."""
        return (
            f"times are estimates, not measurements. {machine.name}: {machine.peak / 1e12:,.0f} TFLOP/s dense bf16"
            f" (fp32 {machine.peak_fp32 / 1e12:,.1f}), {machine.hbm / 1e12:.3g} TB/s and"
            f" {machine.memory / GIB:,.0f} GiB of memory; {machine.nvlink / 1e9:,.0f} GB/s inside a node of"
            f" {machine.gpus_per_node}, {machine.network / 1e9:,.0f} GB/s between nodes, per GPU and direction."
            f" Assumed: large products reach {self.products:.0%} of the peak, attention {self.attention:.0%},"
            f" elementwise kernels {self.memory:.0%} of the memory's rate, collectives {self.links:.0%} of the"
            f" links' rate; a kernel costs the host {self.launch * 1e6:.0f} us, a collective at least"
            f" {self.near * 1e6:.0f} us; the fullest rank has {self.imbalance:.2f} times the mean expert rows."
        )

"""The table of GPUs and their links, and the assumptions of plans about them.

`MACHINES` is the package's only table of GPUs; plans and the logged utilisation of training use it. Its values are from
data sheets. All efficiencies are assumptions, defined in `Assumptions`; `calibration.py` puts measured ones in place.
"""

import re
from dataclasses import dataclass, replace

from megapromoe.number_text import significant

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
        asynchronous: whether the host continues while a kernel runs. On a CPU the times of both add up.
        nvlink_domain: number of GPUs that NVLink joins beyond a node; 0: those of a node.
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
    asynchronous: bool = True
    nvlink_domain: int = 0

    @property
    def nvlink_gpus(self) -> int:
        """Number of GPUs that NVLink joins; ranks further apart use the network."""
        return self.nvlink_domain or self.gpus_per_node

    def for_job(self, world: int) -> "Machine":
        """This machine as a job of `world` ranks uses it.

        A job that needs several NVLink domains takes a power of two GPUs of each (64 of the 72 of an NVL72 rack), so
        that no group of ranks lies across the border of two domains.
        """
        if world <= self.nvlink_domain or not self.nvlink_domain:
            return self
        return replace(self, nvlink_domain=1 << (self.nvlink_domain.bit_length() - 1))


# Each GPU has a network link, as in NVIDIA's DGX: HDR InfiniBand at 200 Gbit/s for A100, NDR at 400 Gbit/s for the
# others. Memory is the size that torch reports for 80, 80, 141 and 180 GB in the data sheets.
#   A100: data sheet "A100 80GB" (SXM), "DGX A100".
#   A800: as A100, but NVLink at 400 GB/s in both directions together instead of 600. Source: NVIDIA's A800 80GB SXM
#     specifications, as in the reports of Reuters and heise of November 2022. Its network is assumed to be an A100's.
#   H100, H200: data sheets "H100", "H100 NVL", "H200" (SXM), "DGX H100", "DGX H200". H800 and GH200 compute at the same
#     rates; a plan for H800 needs --nvlink-gbs 200.
#   B200: data sheet "DGX B200": 8 GPUs have 72 PFLOP/s dense FP8, half of that in bf16, and 14.4 TB/s of NVLink in both
#     directions together.
#   GB200: data sheet "GB200 NVL72": 72 GPUs have 360 PFLOP/s bf16 with sparsity, so 180 dense; 5,760 TFLOP/s fp32;
#     576 TB/s of HBM3e; 130 TB/s of NVLink in both directions together. "DGX GB200 User Guide", hardware: trays of 4
#     GPUs with 4 ConnectX-7 of 400 Gbit/s, all 72 GPUs in one NVLink domain. Assumed: torch reports 184 of 186 GB,
#     about as of the others; each of the two GPUs of a Grace CPU gets half of its NVLink-C2C (900 GB/s in both
#     directions together).
MACHINES = {
    "a100": Machine(
        *("A100 80GB SXM", r"\bA100\b", 312e12, 19.5e12, 2.039e12, 79 * GIB, 300e9, 25e9, 32e9), grouped=False
    ),
    "a800": Machine(
        *("A800 80GB SXM", r"\bA800\b", 312e12, 19.5e12, 2.039e12, 79 * GIB, 200e9, 25e9, 32e9), grouped=False
    ),
    "h100": Machine(
        *("H100 80GB SXM", r"\bH[18]00\b", 989e12, 67e12, 3.35e12, 79 * GIB, 450e9, 50e9, 64e9),
        variants=((r"\bH100 PCIe\b", 756e12), (r"\bH100 NVL\b", 835e12)),
    ),
    "h200": Machine("H200 141GB SXM", r"\bG?H200\b", 989e12, 67e12, 4.8e12, 139 * GIB, 450e9, 50e9, 64e9),
    "b200": Machine("B200 180GB SXM", r"\bB200\b", 2250e12, 75e12, 8.0e12, 178 * GIB, 900e9, 50e9, 64e9),
    "gb200": Machine(
        *("GB200 NVL72", r"\bGB200\b", 2500e12, 80e12, 8.0e12, 184 * GIB, 900e9, 50e9, 225e9),
        gpus_per_node=4,
        nvlink_domain=72,
    ),
}
# One process on one core of a CPU, for `plan --gpu cpu`. No data sheet gives these rates: they are rough values of a
# server's core, which `--measured` is to replace. Its "NVLink" is the exchange between processes of one machine.
CPU = Machine(
    *("CPU core", r"(?!)", 50e9, 50e9, 10e9, 8 * GIB, 2e9, 1e9, 10e9),
    gpus_per_node=1,
    grouped=False,
    asynchronous=False,
)


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
        links: share of `nvlink` in large collectives. `network_links`: of `network`; None: the same share.
        tile: multiple to which the rows of each expert are padded in a product.
        near, far, peer: latency of a collective in seconds: inside a node; added for each doubling of the nodes; added
            in an all-to-all for each other rank.
        launch: seconds of host time for each kernel.
        hook: seconds of host time that DeepSpeed needs for the gradient of a parameter. `gather_hook`: at stage 3, with
            the gather of the parameter.
        imbalance: rows on the fullest rank relative to the mean, if all ranks hold equally many experts; affects memory
            and time.
        usable: share of `memory` to plan with; the rest is for the CUDA context, NCCL and fragmentation.
    """

    products: float = 0.6
    attention: float = 0.4
    memory: float = 0.75
    links: float = 0.7
    network_links: float | None = None
    tile: int = 128
    near: float = 15e-6
    far: float = 15e-6
    peer: float = 2e-6
    launch: float = 5e-6
    hook: float = 30e-6
    gather_hook: float = 200e-6
    imbalance: float = 1.25
    usable: float = 0.9

    @property
    def between_nodes(self) -> float:
        """Share of `network` that large collectives reach."""
        return self.links if self.network_links is None else self.network_links

    def in_words(self, machine: Machine, measured: bool = False) -> str:
        """The rates and assumptions as one paragraph of a plan; `measured`: some of them were measured or fitted."""
        network = "" if self.between_nodes == self.links else f", {self.between_nodes:.0%} between nodes"
        source = "Assumed, measured or fitted, see the calibration" if measured else "Assumed"
        return (
            f"times are estimates, not measurements. {machine.name}: {_tera(machine.peak)} TFLOP/s dense bf16"
            f" (fp32 {_tera(machine.peak_fp32)}), {machine.hbm / 1e12:.3g} TB/s and"
            f" {machine.memory / GIB:,.0f} GiB of memory; {machine.nvlink / 1e9:,.0f} GB/s inside"
            f" {_domain(machine)}, {machine.network / 1e9:,.0f} GB/s between nodes, per GPU and direction."
            f" {source}: large products reach {self.products:.0%} of the peak, attention {self.attention:.0%},"
            f" elementwise kernels {self.memory:.0%} of the memory's rate, collectives {self.links:.0%} of the"
            f" links' rate{network}; a kernel costs the host {self.launch * 1e6:.3g} us, a collective at least"
            f" {self.near * 1e6:.3g} us; the fullest rank has {self.imbalance:.2f} times the mean expert rows."
        )


def _tera(rate: float) -> str:
    """FLOP/s in units of 10^12."""
    return f"{rate / 1e12:,.0f}" if rate >= 100e12 else significant(rate / 1e12)


def _domain(machine: Machine) -> str:
    if machine.nvlink_domain:
        return f"an NVLink domain of {machine.nvlink_domain}"
    return f"a node of {machine.gpus_per_node}"


# Those of `CPU`: no tiles, an interpreter that runs each operator, and processes that exchange over sockets.
CPU_ASSUMPTIONS = Assumptions(
    memory=0.5, links=0.5, tile=0, near=200e-6, far=200e-6, peer=20e-6, launch=15e-6, hook=60e-6, gather_hook=400e-6
)

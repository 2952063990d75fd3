"""What a plan is made for: GPUs, nodes, and what connects them, from the makers' data sheets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_tools.errors import UserError
from pmc_llama.flops import PEAK_FLOPS

GIB = 2**30

Architecture = Literal["ampere", "hopper", "blackwell", "ada", "cdna3"]


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: that torch gives it, and by which `flops.PEAK_FLOPS` has its peak.
        architecture: decides what part of the peak is reached (`throughput.Calibration`).
        memory_bytes: what torch sees of it, a little less than the name says.
        memory_bandwidth: of its HBM, bytes/s.
        link_bandwidth: to the other GPUs of its node, bytes/s in each direction: NVLink through NVSwitch, or
            PCIe where there is none.
        host_link_bandwidth: to its host over PCIe, bytes/s in each direction.
    """

    name: str
    architecture: Architecture
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    host_link_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return PEAK_FLOPS[self.name]


# Data sheets: NVIDIA A100 (HBM2e 2,039 GB/s, 40 GB: HBM2 1,555 GB/s; NVLink 600 GB/s, half of it each way;
# PCIe 4 32 GB/s each way), H100 (SXM 3.35 TB/s, 900 GB/s; NVL 94 GB, 3.9 TB/s, 600 GB/s; PCIe card 80 GB, 2
# TB/s; PCIe 5 64 GB/s each way), H200 (141 GB, 4.8 TB/s, 900 GB/s), HGX B200 (180 GB, 8 TB/s, 1.8 TB/s), L40S
# (48 GB, 864 GB/s, PCIe 4 only); AMD Instinct MI300X (192 GB, 5.3 TB/s, seven links of 64 GB/s each way, PCIe
# 5). Memory as torch.cuda.get_device_properties tells it; of b200 and mi300x as nvidia-smi and rocm-smi do.
GPUS: Mapping[str, Gpu] = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", "ampere", int(39.4 * GIB), 1.555e12, 300e9, 32e9),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "ampere", int(79.1 * GIB), 2.039e12, 300e9, 32e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "hopper", int(79.1 * GIB), 3.35e12, 450e9, 64e9),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", "hopper", int(79.1 * GIB), 2.0e12, 64e9, 64e9),
    "h100-nvl": Gpu("NVIDIA H100 NVL", "hopper", int(93.1 * GIB), 3.9e12, 300e9, 64e9),
    "h200": Gpu("NVIDIA H200", "hopper", int(139.8 * GIB), 4.8e12, 450e9, 64e9),
    "b200": Gpu("NVIDIA B200", "blackwell", int(178.3 * GIB), 8.0e12, 900e9, 64e9),
    "l40s": Gpu("NVIDIA L40S", "ada", int(44.4 * GIB), 0.864e12, 32e9, 32e9),
    "mi300x": Gpu("AMD Instinct MI300X", "cdna3", int(191.9 * GIB), 5.3e12, 448e9, 64e9),
}

# Gbit/s of an adapter, and whether each GPU of a node has one or they share one. InfiniBand HDR, NDR and XDR
# as in DGX A100, H100 and B200 systems; Elastic Fabric Adapters of Amazon's p4d (400 Gbit/s a node) and p5
# (3,200).
INTERCONNECTS: Mapping[str, tuple[float, Literal["gpu", "node"]]] = {
    "ib100": (100, "gpu"),
    "ib200": (200, "gpu"),
    "ib400": (400, "gpu"),
    "ib800": (800, "gpu"),
    "efa400": (400, "node"),
    "efa3200": (3200, "node"),
    "eth25": (25, "node"),
    "eth100": (100, "node"),
    "eth200": (200, "node"),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind.

    Attributes:
        gpu: of which all are.
        nodes: how many.
        gpus_per_node: ranks, one a GPU.
        node_bandwidth: between a node and the others, bytes/s in each direction.
        host_bandwidth: that the ranks of a node reach together in host memory, bytes/s; fitted to a published
            run of ZeRO-3 with offload (`benchmarks/plan.md`).
        filesystem_bandwidth: of all nodes together to where checkpoints go, bytes/s.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    node_bandwidth: float
    host_bandwidth: float = 106e9
    filesystem_bandwidth: float = 5e9

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node


def find_gpu(name: str) -> Gpu:
    """A GPU by its short name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in GPUS:
        raise UserError(f"--gpu is {name}, expected one of {', '.join(GPUS)}")
    return GPUS[name]


def node_bandwidth(interconnect: str, gpus_per_node: int) -> float:
    """Bytes/s of a node to the others, in each direction, by the name of what connects them.

    Raises:
        UserError: there is none of that name.
    """
    if interconnect not in INTERCONNECTS:
        raise UserError(f"--interconnect is {interconnect}, expected one of {', '.join(INTERCONNECTS)}")
    gigabits, owner = INTERCONNECTS[interconnect]
    return gigabits * 1e9 / 8 * (gpus_per_node if owner == "gpu" else 1)

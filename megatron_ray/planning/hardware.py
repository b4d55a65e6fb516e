"""Lists devices and networks: published figures, and the share that training reaches.

Efficiencies are fitted to published runs by `tests/bench/plan.py`, one set per chip and
precision. A chip with too few published runs has the efficiencies of the nearest chip
with enough. Pure data. Must not know: models, layouts.
"""

from dataclasses import dataclass, field, replace
from types import MappingProxyType

from megatron_ray.distributed.device_kind import DeviceKind

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's published figures that training reaches."""

    products: float
    """Share of peak FLOP/s, in matrix products."""
    attention: float
    """Share of peak FLOP/s, in fused attention that skips masked scores."""
    memory: float
    """Share of memory bandwidth, in all other operations on activations and weights."""
    network: float
    """Share of link and network bandwidth in exposed communication. Above 1 where part of
    it overlaps with products."""


@dataclass(frozen=True)
class Hardware:
    """One kind of device and its connections to others."""

    name: str
    device: DeviceKind
    """Decides which kernels run, and so what they keep."""
    peaks: dict[str, float]
    """Peak FLOP/s by precision, without sparsity."""
    memory_bandwidth: float
    """Memory bandwidth in bytes/s."""
    memory_bytes: int | None
    """Memory of one device; None where ranks share the memory of their node."""
    link_bandwidth: float
    """Bytes/s that a device sends to others in its node."""
    network_bandwidth: float
    """Bytes/s that a device sends to other nodes."""
    host_bandwidth: float
    """Bytes/s of its link to the host's memory, in each direction."""
    node_size: int
    """Devices in a node."""
    latency_s: float
    """Seconds that a collective takes before its first byte."""
    efficiencies: dict[str, Efficiency] = field(default_factory=dict)
    """Efficiencies by precision; a precision without them cannot be estimated."""

    def link(self, within: int) -> float:
        """Returns the bytes/s per rank in a group with `within` ranks in each node.

        Each of those ranks uses its own network adapter.
        """
        return min(self.link_bandwidth, within * self.network_bandwidth)


GPU = DeviceKind("cuda", bf16_products=True)
"""The kind that a plan assumes when none is named."""
_AMPERE = replace(GPU, capability=(8, 0))
_HOPPER = replace(GPU, capability=(9, 0))
_BLACKWELL = replace(GPU, capability=(10, 0))

_A100_BF16 = Efficiency(products=0.70, attention=0.10, memory=0.60, network=0.72)
_A100 = {"bf16": _A100_BF16, "fp16": _A100_BF16}
"""Fitted to 10 runs of 2021, before fused attention. GPUs multiply fp16 as fast as bf16."""
_H100_BF16 = Efficiency(products=0.65, attention=0.19, memory=0.30, network=0.70)
_H100 = {
    "bf16": _H100_BF16,
    "fp16": _H100_BF16,
    "fp8": Efficiency(products=0.73, attention=0.27, memory=0.36, network=2.0),
}
"""Fitted to 43 runs under ZeRO-3 with the attention kernels of 2023 (bf16), and to 28 runs
of all layouts with overlapped tensor parallelism (fp8)."""
_CPU = Efficiency(products=0.70, attention=0.50, memory=0.80, network=0.60)

_DEVICES = (
    # NVIDIA A100 80GB SXM data sheet; DGX A100: NVLink 3 with 600 GB/s and PCIe 4 x16 with
    # 64 GB/s in both directions together, 8 x 200 Gb/s HDR InfiniBand.
    Hardware(
        "A100",
        _AMPERE,
        {"bf16": 312e12, "fp16": 312e12},
        2039 * GB,
        80 * GIB,
        300 * GB,
        25 * GB,
        32 * GB,
        8,
        20e-6,
        _A100,
    ),
    # NVIDIA H100 SXM data sheet, dense (without sparsity). DGX H100: NVLink 4 with 900
    # GB/s, PCIe 5 x16 with 128 GB/s, 8 x 400 Gb/s.
    Hardware(
        "H100",
        _HOPPER,
        {"bf16": 989e12, "fp16": 989e12, "fp8": 1979e12},
        3350 * GB,
        80 * GIB,
        450 * GB,
        50 * GB,
        64 * GB,
        8,
        20e-6,
        _H100,
    ),
    # NVIDIA H200 SXM data sheet: H100's cores, 141 GB of HBM3e. DGX H200 as DGX H100.
    Hardware(
        "H200",
        _HOPPER,
        {"bf16": 989e12, "fp16": 989e12, "fp8": 1979e12},
        4800 * GB,
        140 * GIB,
        450 * GB,
        50 * GB,
        64 * GB,
        8,
        20e-6,
        _H100,
    ),
    # NVIDIA DGX B200 data sheet divided by eight: 36 PFLOP/s of dense fp8, 64 TB/s of
    # HBM3e, NVLink 5 with 14.4 TB/s, PCIe 5 x16, 8 x 400 Gb/s.
    Hardware(
        "B200",
        _BLACKWELL,
        {"bf16": 2250e12, "fp16": 2250e12, "fp8": 4500e12},
        8000 * GB,
        179 * GIB,
        900 * GB,
        50 * GB,
        64 * GB,
        8,
        20e-6,
        _H100,
    ),
    # One core of a server CPU with AMX and gloo on one host, as measured for this
    # project: products of 180 and 1,400 GFLOP/s, copies of 13 GB/s, messages of 4 GB/s
    # and 65 us.
    Hardware(
        name="CPU",
        device=DeviceKind("cpu", bf16_products=True),
        # Products of fp16 are in fp32.
        peaks={"fp32": 180e9, "bf16": 1400e9, "fp16": 180e9},
        memory_bandwidth=13 * GB,
        memory_bytes=None,
        link_bandwidth=4 * GB,
        network_bandwidth=1 * GB,
        host_bandwidth=13 * GB,
        node_size=8,
        latency_s=65e-6,
        efficiencies={"fp32": _CPU, "bf16": _CPU, "fp16": _CPU},
    ),
)
HARDWARE = MappingProxyType({device.name: device for device in _DEVICES})
"""Known devices by name."""


def hardware_named(name: str | None) -> Hardware | None:
    """Returns the device of a name such as `H100` or `nvidia-h100-80gb-hbm3`.

    None for an unknown device.
    """
    words = (name or "").upper().replace("_", "-").split("-")
    for device in _DEVICES:
        if device.name in words:
            return device
    return None

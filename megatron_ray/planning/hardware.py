"""Devices and networks that plans are made for.

Owns: their published figures, and how much of them training has been seen to reach.

Pure data. Must not know: models, layouts.

Efficiencies are fitted to published runs by `tests/bench/plan.py`, one set per chip and
precision; a chip without enough published runs of complete layout has those of the
nearest chip that has. They are shares of the figures above them.
"""

from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_ray.distributed.device_kind import DeviceKind

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's figures that training reaches."""

    products: float
    """Of the peak, by matrix products."""
    attention: float
    """Of the peak, by fused attention that skips what is masked."""
    memory: float
    """Of the memory's bandwidth, by everything else that touches activations and
    weights."""
    network: float
    """Of links and network, where ranks wait for what is sent; above what a link
    carries where a part is hidden behind products."""


@dataclass(frozen=True)
class Hardware:
    """One kind of device and what connects it to others."""

    name: str
    device: DeviceKind
    """Decides which kernels run, and so what they keep."""
    peaks: dict[str, float]
    """Dense FLOP/s by precision."""
    memory_bandwidth: float
    """Bytes/s."""
    memory_bytes: int | None
    """Of one device; None where a rank has no memory of its own."""
    link_bandwidth: float
    """Bytes/s that a device sends to others in its node."""
    network_bandwidth: float
    """Bytes/s that a device sends to other nodes."""
    node_size: int
    """Devices in a node."""
    latency_s: float
    """Of one collective, before its first byte."""
    efficiencies: dict[str, Efficiency] = field(default_factory=dict)
    """By precision."""

    def link(self, within: int) -> float:
        """Bytes/s per rank in a group that has `within` of its ranks in each node and
        others elsewhere: each uses its own adapter.
        """
        return min(self.link_bandwidth, within * self.network_bandwidth)


GPU = DeviceKind("cuda", bf16_products=True)
"""Of all kinds there are here, and what a plan assumes where nobody says what it is
for."""

_A100 = {"bf16": Efficiency(products=0.70, attention=0.10, memory=0.60, network=0.72)}
"""From 10 runs of 2021, whose attention was not fused yet."""
_H100 = {
    "bf16": Efficiency(products=0.65, attention=0.19, memory=0.30, network=0.70),
    "fp8": Efficiency(products=0.73, attention=0.27, memory=0.36, network=2.0),
}
"""From 43 runs under ZeRO-3 with the attention kernels of 2023 (bf16), and 28 of all
layouts that hide tensor parallelism (fp8)."""
_CPU = Efficiency(products=0.70, attention=0.50, memory=0.80, network=0.60)

_DEVICES = (
    # NVIDIA A100 80GB SXM data sheet; DGX A100: NVLink 3 with 600 GB/s in both
    # directions together, 8 x 200 Gb/s HDR InfiniBand.
    Hardware(
        "A100",
        GPU,
        {"bf16": 312e12},
        2039 * GB,
        80 * GIB,
        300 * GB,
        25 * GB,
        8,
        20e-6,
        _A100,
    ),
    # NVIDIA H100 SXM data sheet, dense (without sparsity). DGX H100: NVLink 4 with 900
    # GB/s, 8 x 400 Gb/s.
    Hardware(
        "H100",
        GPU,
        {"bf16": 989e12, "fp8": 1979e12},
        3350 * GB,
        80 * GIB,
        450 * GB,
        50 * GB,
        8,
        20e-6,
        _H100,
    ),
    # NVIDIA H200 SXM data sheet: H100's cores, 141 GB of HBM3e. DGX H200 as DGX H100.
    Hardware(
        "H200",
        GPU,
        {"bf16": 989e12, "fp8": 1979e12},
        4800 * GB,
        140 * GIB,
        450 * GB,
        50 * GB,
        8,
        20e-6,
        _H100,
    ),
    # NVIDIA DGX B200 data sheet divided by eight: 36 PFLOP/s of dense fp8, 64 TB/s of
    # HBM3e, NVLink 5 with 14.4 TB/s, 8 x 400 Gb/s.
    Hardware(
        "B200",
        GPU,
        {"bf16": 2250e12, "fp8": 4500e12},
        8000 * GB,
        179 * GIB,
        900 * GB,
        50 * GB,
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
        peaks={"fp32": 180e9, "bf16": 1400e9},
        memory_bandwidth=13 * GB,
        memory_bytes=None,
        link_bandwidth=4 * GB,
        network_bandwidth=1 * GB,
        node_size=8,
        latency_s=65e-6,
        efficiencies={"fp32": _CPU, "bf16": _CPU},
    ),
)
HARDWARE = MappingProxyType({device.name: device for device in _DEVICES})
"""By name."""


def hardware_named(text: str | None) -> Hardware | None:
    """The device that a name means, such as Ray's `H100` or `nvidia-h100-80gb-hbm3`;
    None for one that is not known.
    """
    words = (text or "").upper().replace("_", "-").split("-")
    return next((device for name, device in HARDWARE.items() if name in words), None)

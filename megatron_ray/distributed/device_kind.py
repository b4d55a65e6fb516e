"""What of a device decides which kernels run on it.

Torch-free: a plan is made elsewhere than where it runs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceKind:
    """What of a device decides which kernels run on it."""

    type: str
    """As torch names it: `cpu`, `cuda` or `meta`."""
    bf16_products: bool
    """Whether its library multiplies bf16; elsewhere products of bf16 are done in fp32.
    Of CPUs those with AVX-512 or AMX do, as oneDNN sees them (device.kind_of)."""

    def widens(self, bf16: bool) -> bool:
        """Returns whether products of such inputs are done in fp32; `bf16`: whether
        they are bf16.
        """
        return self.type == "cpu" and bf16 and not self.bf16_products

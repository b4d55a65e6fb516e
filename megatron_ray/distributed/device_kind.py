"""Describes the properties of a device that decide which kernels run on it.

Torch-free: a plan is made on another machine than the one where it runs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceKind:
    """The properties of a device that decide which kernels run on it."""

    type: str
    """torch's name of the device type: `cpu`, `cuda` or `meta`."""
    bf16_products: bool
    """Whether the device's library multiplies bf16; otherwise products of bf16 are done
    in fp32. CPUs with AVX-512 or AMX do, as oneDNN reports them (device.kind_of)."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (0, 0) where it is not known."""

    def multiplies_fp8(self, recipe: str) -> bool:
        """Returns whether the device multiplies in FP8 by a `training.fp8.recipe`."""
        if self.type != "cuda":
            return False
        if recipe == "blockwise":
            return self.capability[0] == 9
        if recipe == "mxfp8":
            return self.capability[0] >= 10
        return self.capability >= (8, 9)

    def needs_fp32(self, precision: str) -> bool:
        """Returns whether products of inputs in this precision are done in fp32.

        `precision` is one of `training.precision`.
        """
        if self.type != "cpu":
            return False
        # Hardly any CPU multiplies fp16, and torch's own products of it are slow.
        return precision == "fp16" or (precision == "bf16" and not self.bf16_products)

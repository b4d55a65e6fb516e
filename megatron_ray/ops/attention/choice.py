"""Which kernel attends on a device.

Owns: that choice, which the model runs and planning counts with. Torch-free.

What of the device decides it is a value, passed in: a plan is made elsewhere than where
it runs.
"""

from typing import Literal

from megatron_ray.distributed.device_kind import DeviceKind

AttentionKernel = Literal["fused", "fused_in_fp32", "blocks", "stripes", "masked"]
"""`fused`: torch's own function. `fused_in_fp32`: its kernel for CPUs on inputs made
fp32 (ops.attention.fp32). `blocks`: batched products in bf16
(ops.attention.blockwise). `stripes`: of a window, by the fused kernel with a bias
(ops.attention.sliding_window). `masked`: the same stripes by torch's own function with a
mask."""

_SHORTEST_BY_BLOCKS = 16
"""Tokens; measured on sequences of 16 to 4096."""


def attention_kernel(
    device: DeviceKind, *, bf16: bool, sequence: int, window: int | None
) -> AttentionKernel:
    """Returns what attends causally to whole sequences, or to the last `window` tokens
    of them.
    """
    if window is not None and window < sequence:
        return "masked" if device.type == "cuda" else "stripes"
    if device.widens(bf16):
        return "fused_in_fp32"
    if device.type == "cpu" and bf16 and sequence >= _SHORTEST_BY_BLOCKS:
        return "blocks"
    return "fused"

"""Chooses the kernel that computes attention on a device.

Owns: that choice, for running models and for cost estimates. The device is passed as a
value, since estimates may be made on another machine. Torch-free.
"""

from typing import Literal

from megatron_ray.distributed.device_kind import DeviceKind

AttentionKernel = Literal["fused", "fused_in_fp32", "blocks", "stripes", "masked"]
"""`fused`: torch's own function. `fused_in_fp32`: its kernel for CPUs on inputs made
fp32 (ops.attention.fp32). `blocks`: batched products in bf16
(ops.attention.blockwise). `stripes`: stripes of a window, by the fused kernel with a bias
(ops.attention.sliding_window). `masked`: the same stripes by torch's own function with a
mask."""

DocumentKernel = Literal["varlen", "one_by_one"]
"""`varlen`: one call for all documents (ops.attention.varlen). `one_by_one`: an
AttentionKernel for each document."""

_MIN_TOKENS_FOR_BLOCKS = 16
"""Measured on sequences of 16 to 4096 tokens."""


def attention_kernel(
    device: DeviceKind, *, precision: str, sequence: int, window: int | None
) -> AttentionKernel:
    """Returns the kernel of causal attention over `sequence` tokens.

    Each token attends to all previous tokens, or to the last `window` tokens;
    `precision` is one of `training.precision`.
    """
    # A window as long as the sequence masks nothing, and causal kernels are cheaper.
    if window is not None and window < sequence:
        if device.type == "cuda":
            return "masked"
        return "stripes"
    # Before `blocks`: without bf16 instructions its products would be computed element by
    # element.
    if device.needs_fp32(precision):
        return "fused_in_fp32"
    # The backward of torch's CPU kernel gains nothing from bf16; batched products do.
    is_long = sequence >= _MIN_TOKENS_FOR_BLOCKS
    if device.type == "cpu" and precision == "bf16" and is_long:
        return "blocks"
    return "fused"


def document_kernel(
    device: DeviceKind, *, precision: str, head_width: int
) -> DocumentKernel:
    """Returns how causal attention within the documents of a packed row is computed.

    torch's kernel for them is flash attention: for two bytes per number, on GPUs from
    Ampere on.
    """
    is_flash_device = device.type == "cuda" and device.capability >= (8, 0)
    if not is_flash_device or precision not in ("bf16", "fp16"):
        return "one_by_one"
    # It pads no heads, and on some GPUs has no backward for widths of 193 to 255.
    is_flash_width = head_width <= 192 or head_width == 256
    if head_width % 8 or not is_flash_width:
        return "one_by_one"
    return "varlen"

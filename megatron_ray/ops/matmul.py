"""Computes the three matrix products of a linear layer.

Owns: the choice of the library that multiplies. Must not know: layers, groups.

CUDA uses torch's own products. On x86 CPUs torch uses MKL for fp32, which uses AVX-512
only on Intel's CPUs (measured: 110 against 250 GFLOP/s on one core). oneDNN uses it on
all; torch includes oneDNN and already uses it for bf16. With AVX2 only, MKL is faster
(80 against 60). Both are deterministic. On CPUs fp16, and without bf16 instructions bf16
too, is multiplied in fp32 and rounded once.

The grouped products multiply rows sorted by expert with each expert's matrix: one
kernel on CUDA in bf16, from Hopper on, which reads the counts on the device; otherwise one
product per expert, which needs the counts on the host (no synchronization on CPU).

Shapes: T tokens, I inputs, O outputs, E experts.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_ray.distributed.device import kind_of
from megatron_ray.ops.dtypes import precision_of

Library = Literal["torch", "onednn", "fp32"]
"""`fp32`: operands are converted to fp32, then the faster library for fp32 multiplies.
Every product has a library argument; by default it depends on device and type."""


def library_for(device: str, dtype: torch.dtype) -> Library:
    """Returns the library that multiplies operands of a type on a device."""
    if device != "cpu":
        return "torch"
    # If oneDNN does not support bf16, torch multiplies element by element (measured: 1 to
    # 20 GFLOP/s, against 80 in fp32).
    if kind_of(device).needs_fp32(precision_of(dtype)):
        return "fp32"
    # torch calls oneDNN for bf16 itself and MKL only for fp32.
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if has_avx512 and torch._C._has_mkldnn and dtype == torch.float32:
        return "onednn"
    return "torch"


def _library_or_default(tensor: Tensor, library: Library | None) -> Library:
    return library or library_for(tensor.device.type, tensor.dtype)


def forward_product(
    inputs_TI: Tensor,
    weight_OI: Tensor,
    library: Library | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns inputs @ weight^T: [T, O], in `out` if it is passed."""
    library = _library_or_default(inputs_TI, library)
    if library == "torch":
        return torch.mm(inputs_TI, weight_OI.t(), out=out)
    if library == "fp32":
        product = forward_product(inputs_TI.float(), weight_OI.float()).to(inputs_TI.dtype)
    else:
        product = torch.ops.mkldnn._linear_pointwise(
            inputs_TI, weight_OI, None, "none", [], ""
        )
    return _put_into(out, product)


def _put_into(out: Tensor | None, product: Tensor) -> Tensor:
    # oneDNN cannot write into an existing tensor.
    if out is None:
        return product
    return out.copy_(product)


def forward_product_plus(
    inputs_TI: Tensor, weight_OI: Tensor, addend_TO: Tensor, library: Library | None = None
) -> Tensor:
    """Returns addend + inputs @ weight^T, rounded once: [T, O]."""
    library = _library_or_default(inputs_TI, library)
    if library == "fp32":
        product = forward_product_plus(
            inputs_TI.float(), weight_OI.float(), addend_TO.float()
        )
        return product.to(inputs_TI.dtype)
    if library == "onednn":
        return torch.ops.mkldnn._linear_pointwise.binary(  # type: ignore[no-any-return]
            inputs_TI, addend_TO, weight_OI, None, "add"
        )
    return torch.addmm(addend_TO, inputs_TI, weight_OI.t())


def input_grad_product(
    grad_TO: Tensor,
    weight_OI: Tensor,
    library: Library | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns grad @ weight: [T, I], in `out` if it is passed."""
    library = _library_or_default(grad_TO, library)
    if library == "torch":
        return torch.mm(grad_TO, weight_OI, out=out)
    if library == "fp32":
        product = input_grad_product(grad_TO.float(), weight_OI.float()).to(grad_TO.dtype)
    else:
        product = torch.ops.mkldnn._linear_pointwise(
            grad_TO, weight_OI.t(), None, "none", [], ""
        )
    return _put_into(out, product)


def weight_grad_product(
    grad_TO: Tensor, inputs_TI: Tensor, library: Library | None = None
) -> Tensor:
    """Returns grad^T @ inputs: [O, I]."""
    library = _library_or_default(grad_TO, library)
    if library == "fp32":
        return weight_grad_product(grad_TO.float(), inputs_TI.float()).to(grad_TO.dtype)
    if library == "onednn":
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            grad_TO.t(), inputs_TI.t(), None, "none", [], ""
        )
    return torch.mm(grad_TO.t(), inputs_TI)


def accumulate_weight_grad(
    main_OI: Tensor,
    grad_TO: Tensor,
    inputs_TI: Tensor,
    *,
    fresh: bool,
    library: Library | None = None,
) -> None:
    """Adds grad^T @ inputs to main [O, I].

    `fresh`: main has no contribution yet and is overwritten, whatever it contains.
    """
    library = _library_or_default(inputs_TI, library)
    if library == "fp32":
        inputs_TI = inputs_TI.float()
        grad_TO = grad_TO.float()
        library = library_for(inputs_TI.device.type, inputs_TI.dtype)
    # oneDNN cannot write into an existing tensor, and torch's products only into one with
    # the type of their operands, so both cases need a temporary.
    if inputs_TI.dtype != main_OI.dtype or library == "onednn":
        product = weight_grad_product(grad_TO, inputs_TI, library)
        if fresh:
            main_OI.copy_(product)
        else:
            main_OI.add_(product)
    elif fresh:
        torch.mm(grad_TO.t(), inputs_TI, out=main_OI)
    else:
        main_OI.addmm_(grad_TO.t(), inputs_TI)


Counts = Tensor | int
"""Rows of each expert [E], or one number if all are equal, which needs no copy from the
device."""


def _has_grouped_kernel(rows: Tensor, weight_EOI: Tensor) -> bool:
    # The kernel needs rows of 16 bytes, which are 8 elements of bf16.
    aligned = weight_EOI.shape[1] % 8 == 0 and weight_EOI.shape[2] % 8 == 0
    return (
        rows.device.type == "cuda"
        and rows.dtype == torch.bfloat16
        and aligned
        and len(rows) > 0
        # Before Hopper torch multiplies one expert after the other, too, and reads even
        # equal counts on the host (pytorch issue 169970), which no CUDA graph can record.
        and kind_of("cuda").capability >= (9, 0)
    )


def split_by_expert(rows: Tensor, counts: Counts) -> tuple[Tensor, ...]:
    """Returns the rows of each expert, whose counts are read on the host."""
    if isinstance(counts, int):
        return torch.split(rows, counts)
    return torch.split(rows, counts.tolist())


def grouped_forward_product(
    inputs_TI: Tensor, weight_EOI: Tensor, counts: Counts, library: Library | None = None
) -> Tensor:
    """Returns each expert's inputs @ its weight^T: [T, O]."""
    if _has_grouped_kernel(inputs_TI, weight_EOI):
        return torch.nn.functional.grouped_mm(
            inputs_TI, weight_EOI.transpose(1, 2), offs=_row_ends(counts, inputs_TI)
        )
    parts = zip(split_by_expert(inputs_TI, counts), weight_EOI, strict=True)
    products = [
        forward_product(rows, weight, library) for rows, weight in parts if len(rows)
    ]
    return concatenate(products, inputs_TI, weight_EOI.shape[1])


def grouped_input_grad_product(
    grad_TO: Tensor, weight_EOI: Tensor, counts: Counts, library: Library | None = None
) -> Tensor:
    """Returns each expert's grad @ its weight: [T, I]."""
    if _has_grouped_kernel(grad_TO, weight_EOI):
        return torch.nn.functional.grouped_mm(
            grad_TO, weight_EOI, offs=_row_ends(counts, grad_TO)
        )
    parts = zip(split_by_expert(grad_TO, counts), weight_EOI, strict=True)
    products = [
        input_grad_product(rows, weight, library) for rows, weight in parts if len(rows)
    ]
    return concatenate(products, grad_TO, weight_EOI.shape[2])


def grouped_weight_grad_product(
    grad_TO: Tensor, inputs_TI: Tensor, counts: Counts, num_experts: int
) -> Tensor:
    """Returns each expert's grad^T @ inputs: [E, O, I]; zero for one without rows."""
    product = grad_TO.new_zeros(num_experts, grad_TO.shape[1], inputs_TI.shape[1])
    accumulate_grouped_weight_grad(product, grad_TO, inputs_TI, counts, fresh=True)
    return product


def accumulate_grouped_weight_grad(
    main_EOI: Tensor,
    grad_TO: Tensor,
    inputs_TI: Tensor,
    counts: Counts,
    *,
    fresh: bool,
    library: Library | None = None,
) -> None:
    """Adds each expert's grad^T @ inputs to main [E, O, I].

    `fresh`: main has no contribution yet and is overwritten, whatever it contains.
    """
    if _has_grouped_kernel(inputs_TI, main_EOI):
        product = torch.nn.functional.grouped_mm(
            grad_TO.t(), inputs_TI, offs=_row_ends(counts, inputs_TI)
        )
        # On some GPUs the kernel does not initialize the product of an expert without rows
        # (pytorch issue 172439).
        if not isinstance(counts, int):
            product.masked_fill_((counts == 0)[:, None, None], 0)
        if fresh:
            main_EOI.copy_(product)
        else:
            main_EOI.add_(product)
        return
    for main, grad, inputs in zip(
        main_EOI,
        split_by_expert(grad_TO, counts),
        split_by_expert(inputs_TI, counts),
        strict=True,
    ):
        if len(grad):
            accumulate_weight_grad(main, grad, inputs, fresh=fresh, library=library)
        elif fresh:
            # It still contains the sum of the step before.
            main.zero_()


def _row_ends(counts: Counts, rows: Tensor) -> Tensor:
    """Returns one past the last row of each expert [E], as the kernel expects them."""
    if isinstance(counts, int):
        return torch.arange(
            counts, len(rows) + 1, counts, dtype=torch.int32, device=rows.device
        )
    return counts.cumsum(0).to(torch.int32)


def concatenate(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    """Returns all rows of products of experts, `width` wide, with the type of `like`."""
    # No local expert has rows: torch.cat rejects an empty list.
    if not parts:
        return like.new_empty(0, width)
    return torch.cat(parts)

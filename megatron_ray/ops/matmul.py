"""The three matrix products of a linear layer.

Owns: which library multiplies. Must not know: layers, groups.

On CUDA torch's own products are the right ones. On x86 CPUs torch hands fp32 products
to MKL, which has no use for the AVX-512 of another maker (measured: 110 against 250
GFLOP/s on one core); oneDNN, which torch ships too and already uses for bf16, has.
Where there is only AVX2, MKL is the faster one (80 against 60). Both are deterministic.
bf16 on a CPU without instructions for it is multiplied in fp32 and rounded once.

The grouped products multiply rows that lie expert by expert, each expert's with its own
matrix: one kernel on CUDA in bf16, which reads the counts on the device; elsewhere one
product per expert, for which the host must know the counts (no wait on CPU).

Shapes: T tokens, I inputs, O outputs, E experts.
"""

import torch
from torch import Tensor


def _onednn(tensor: Tensor) -> bool:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch._C._has_mkldnn


def needs_fp32_matmul(device: str, dtype: torch.dtype) -> bool:
    """Whether products are to be done in fp32: torch multiplies bf16 one by one where
    the processor cannot (measured: 1 to 20 GFLOP/s for 80 in fp32).
    """
    return (
        device == "cpu"
        and dtype == torch.bfloat16
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _wide(tensor: Tensor) -> bool:
    return needs_fp32_matmul(tensor.device.type, tensor.dtype)


def forward_product(inputs_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Inputs @ weight^T: [T, O]."""
    if _wide(inputs_TI):
        return forward_product(inputs_TI.float(), weight_OI.float()).to(inputs_TI.dtype)
    if _onednn(inputs_TI):
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            inputs_TI, weight_OI, None, "none", [], ""
        )
    return torch.mm(inputs_TI, weight_OI.t())


def forward_product_plus(inputs_TI: Tensor, weight_OI: Tensor, addend_TO: Tensor) -> Tensor:
    """Addend + inputs @ weight^T, rounded once: [T, O]."""
    if _wide(inputs_TI):
        return forward_product_plus(
            inputs_TI.float(), weight_OI.float(), addend_TO.float()
        ).to(inputs_TI.dtype)
    if _onednn(inputs_TI):
        return torch.ops.mkldnn._linear_pointwise.binary(  # type: ignore[no-any-return]
            inputs_TI, addend_TO, weight_OI, None, "add"
        )
    return torch.addmm(addend_TO, inputs_TI, weight_OI.t())


def input_grad_product(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """Grad @ weight: [T, I]."""
    if _wide(grad_TO):
        return input_grad_product(grad_TO.float(), weight_OI.float()).to(grad_TO.dtype)
    if _onednn(grad_TO):
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            grad_TO, weight_OI.t(), None, "none", [], ""
        )
    return torch.mm(grad_TO, weight_OI)


def weight_grad_product(grad_TO: Tensor, inputs_TI: Tensor) -> Tensor:
    """grad^T @ inputs: [O, I]."""
    if _wide(grad_TO):
        return weight_grad_product(grad_TO.float(), inputs_TI.float()).to(grad_TO.dtype)
    if _onednn(grad_TO):
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            grad_TO.t(), inputs_TI.t(), None, "none", [], ""
        )
    return torch.mm(grad_TO.t(), inputs_TI)


def accumulate_weight_grad(
    main_OI: Tensor, grad_TO: Tensor, inputs_TI: Tensor, *, fresh: bool
) -> None:
    """Main (fp32) = or += grad^T @ inputs, without a temporary where the library can."""
    if _wide(inputs_TI):
        inputs_TI = inputs_TI.float()
        grad_TO = grad_TO.float()
    if inputs_TI.dtype != main_OI.dtype or _onednn(inputs_TI):
        product = weight_grad_product(grad_TO, inputs_TI)
        main_OI.copy_(product) if fresh else main_OI.add_(product)
    elif fresh:
        torch.mm(grad_TO.t(), inputs_TI, out=main_OI)
    else:
        main_OI.addmm_(grad_TO.t(), inputs_TI)


Counts = Tensor | int
"""Rows of each expert [E], or the number that every one of them has: then nobody needs
to ask the device."""


def _one_kernel(rows: Tensor, weight_EOI: Tensor) -> bool:
    aligned = weight_EOI.shape[1] % 8 == 0 and weight_EOI.shape[2] % 8 == 0
    return (
        rows.device.type == "cuda"
        and rows.dtype == torch.bfloat16
        and aligned
        and len(rows) > 0
    )


def _by_expert(rows: Tensor, counts: Counts) -> tuple[Tensor, ...]:
    return torch.split(rows, counts if isinstance(counts, int) else counts.tolist())


def grouped_forward_product(
    inputs_TI: Tensor, weight_EOI: Tensor, counts: Counts
) -> Tensor:
    """Each expert's inputs @ its weight^T: [T, O]."""
    if _one_kernel(inputs_TI, weight_EOI):
        return torch.nn.functional.grouped_mm(
            inputs_TI, weight_EOI.transpose(1, 2), offs=_ends(counts, inputs_TI)
        )
    parts = zip(_by_expert(inputs_TI, counts), weight_EOI, strict=True)
    return _joined(
        [forward_product(rows, weight) for rows, weight in parts if len(rows)],
        inputs_TI,
        weight_EOI.shape[1],
    )


def grouped_input_grad_product(
    grad_TO: Tensor, weight_EOI: Tensor, counts: Counts
) -> Tensor:
    """Each expert's grad @ its weight: [T, I]."""
    if _one_kernel(grad_TO, weight_EOI):
        return torch.nn.functional.grouped_mm(
            grad_TO, weight_EOI, offs=_ends(counts, grad_TO)
        )
    parts = zip(_by_expert(grad_TO, counts), weight_EOI, strict=True)
    return _joined(
        [input_grad_product(rows, weight) for rows, weight in parts if len(rows)],
        grad_TO,
        weight_EOI.shape[2],
    )


def grouped_weight_grad_product(
    grad_TO: Tensor, inputs_TI: Tensor, counts: Counts, num_experts: int
) -> Tensor:
    """Each expert's grad^T @ inputs: [E, O, I], zero for one without rows."""
    product = grad_TO.new_zeros(num_experts, grad_TO.shape[1], inputs_TI.shape[1])
    accumulate_grouped_weight_grad(product, grad_TO, inputs_TI, counts, fresh=True)
    return product


def accumulate_grouped_weight_grad(
    main_EOI: Tensor, grad_TO: Tensor, inputs_TI: Tensor, counts: Counts, *, fresh: bool
) -> None:
    """Main (fp32) = or += each expert's grad^T @ inputs."""
    if _one_kernel(inputs_TI, main_EOI):
        product = torch.nn.functional.grouped_mm(
            grad_TO.t(), inputs_TI, offs=_ends(counts, inputs_TI)
        )
        # On some GPUs the kernel leaves what it likes for an expert without rows
        # (pytorch issue 172439).
        if not isinstance(counts, int):
            product.masked_fill_((counts == 0)[:, None, None], 0)
        main_EOI.copy_(product) if fresh else main_EOI.add_(product)
        return
    for main, grad, inputs in zip(
        main_EOI, _by_expert(grad_TO, counts), _by_expert(inputs_TI, counts), strict=True
    ):
        if len(grad):
            accumulate_weight_grad(main, grad, inputs, fresh=fresh)
        elif fresh:
            main.zero_()


def _ends(counts: Counts, rows: Tensor) -> Tensor:
    if isinstance(counts, int):
        return torch.arange(
            counts, len(rows) + 1, counts, dtype=torch.int32, device=rows.device
        )
    return counts.cumsum(0).to(torch.int32)


def _joined(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0, width)

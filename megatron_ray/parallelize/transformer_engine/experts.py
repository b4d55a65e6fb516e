"""Computes the grouped layers of experts by the library.

Must not know: how tokens are routed.

Shapes: R rows sorted by expert, E experts of this rank, I inputs, O outputs.
"""

from typing import Any

from torch import Tensor

from megatron_ray.expert_parallel.layers import GroupedLinear
from megatron_ray.ops.matmul import Counts
from megatron_ray.parallelize.replaced_forward import replace_forward
from megatron_ray.parallelize.transformer_engine.bound import BoundModule, Precision
from megatron_ray.parallelize.transformer_engine.library import TransformerEngine


def compute_experts(
    engine: TransformerEngine,
    layer: GroupedLinear,
    precision: Precision,
    alignment: int | None,
) -> None:
    """Makes the library compute a layer: (rows [R, I], counts [E]) -> [R, O].

    `alignment`: number of rows that an expert's rows are padded to a multiple of, for FP8;
    None without it.
    """
    num_experts = layer.num_experts
    rows, inputs = layer.weight.shape
    inner = engine.pytorch.GroupedLinear(
        num_experts,
        inputs,
        rows // num_experts,
        fuse_wgrad_accumulation=True,
        bias=False,
        params_dtype=layer.weight.dtype,
        device="meta",
        use_grouped_tensor=False,
    )
    bound = BoundModule(inner, layer, (), precision, num_experts)
    if alignment is None:
        replace_forward(layer, _Unpadded(bound, num_experts).run)
        return
    pad = engine.pytorch.Fp8Padding(num_experts, alignment)
    unpad = engine.pytorch.Fp8Unpadding(num_experts, alignment)
    replace_forward(layer, _Padded(bound, num_experts, pad, unpad).run)


class _Unpadded:
    """The products of experts' rows as they are."""

    def __init__(self, bound: BoundModule, num_experts: int) -> None:
        self.bound = bound
        self.num_experts = num_experts

    def run(self, inputs_RI: Tensor, counts: Counts) -> Tensor:
        """Returns [R, O]."""
        return self.bound.run(inputs_RI, _on_host(counts, self.num_experts))


class _Padded:
    """The products of experts' rows, each expert's padded by rows of zeros."""

    def __init__(self, bound: BoundModule, num_experts: int, pad: Any, unpad: Any) -> None:
        self.bound = bound
        self.num_experts = num_experts
        self.pad = pad
        self.unpad = unpad

    def run(self, inputs_RI: Tensor, counts: Counts) -> Tensor:
        """Returns [R, O]."""
        splits = _on_host(counts, self.num_experts)
        padded_RI, padded_splits = self.pad(inputs_RI, splits)
        padded_RO = self.bound.run(padded_RI, padded_splits)
        outputs_RO: Tensor = self.unpad(padded_RO, splits)
        return outputs_RO


def _on_host(counts: Counts, num_experts: int) -> list[int]:
    """Returns the rows of each expert; waits for the device."""
    if isinstance(counts, int):
        return [counts] * num_experts
    splits: list[int] = counts.tolist()
    return splits

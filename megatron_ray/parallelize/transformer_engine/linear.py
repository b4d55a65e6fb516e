"""Computes column- and row-parallel layers by the library.

Owns: the arguments of its modules. Must not know: which layers of a model they are.

Shapes: T tokens (t of them on this rank under sequence parallelism), I inputs, O outputs.
"""

from typing import Any

from torch import Tensor

from megatron_ray.parallelize.replaced_forward import replace_forward
from megatron_ray.parallelize.transformer_engine.bound import (
    BoundModule,
    Precision,
    Vector,
)
from megatron_ray.parallelize.transformer_engine.library import TransformerEngine
from megatron_ray.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ray.tensor_parallel.norm import LayerNorm, RMSNorm


def compute_column(
    engine: TransformerEngine,
    layer: ColumnParallelLinear,
    norm: RMSNorm | LayerNorm | None,
    precision: Precision,
) -> None:
    """Makes the library compute a layer: [T or t, I] -> [T, O/tp].

    The norm of its inputs becomes a part of it, and returns them as they are itself.
    """
    vectors = _bias(layer)
    if norm is None:
        inner = engine.pytorch.Linear(**_arguments(layer, "column"))
    else:
        inner = engine.pytorch.LayerNormLinear(
            **_arguments(layer, "column"), **_norm_arguments(norm)
        )
        vectors += _norm_vectors(norm)
        replace_forward(norm, _as_it_is)
    replace_forward(layer, BoundModule(inner, layer, vectors, precision).run)


def compute_row(
    engine: TransformerEngine, layer: RowParallelLinear, precision: Precision
) -> None:
    """Makes the library compute a layer: ([T, I/tp], residual [t, O] or None) -> [t, O]."""
    inner = engine.pytorch.Linear(**_arguments(layer, "row"))
    bound = BoundModule(inner, layer, _bias(layer), precision)

    def forward(
        inputs_TI: Tensor, residual_TO: Tensor | None, *, is_output_needed: bool = True
    ) -> Tensor:
        # Computed even if not needed: the library saves for its backward pass only what
        # it multiplies.
        output = bound.run(inputs_TI)
        if residual_TO is None:
            return output
        return output + residual_TO

    replace_forward(layer, forward)


def _arguments(
    layer: ColumnParallelLinear | RowParallelLinear, mode: str
) -> dict[str, Any]:
    """Returns the arguments of a linear module, whose sizes are those of all ranks."""
    tp = layer.tp
    outputs, inputs = layer.weight.shape
    if mode == "column":
        outputs *= tp.size
    else:
        inputs *= tp.size
    return {
        "in_features": inputs,
        "out_features": outputs,
        "sequence_parallel": tp.sequence_parallel,
        "fuse_wgrad_accumulation": True,
        "tp_group": tp.group,
        "tp_size": tp.size,
        "bias": layer.bias is not None,
        "params_dtype": layer.weight.dtype,
        "parallel_mode": mode,
        # Without memory: the layer's own tensors take their places.
        "device": "meta",
    }


def _norm_arguments(norm: RMSNorm | LayerNorm) -> dict[str, Any]:
    is_rms = isinstance(norm, RMSNorm)
    return {
        "eps": norm.eps,
        "normalization": "RMSNorm" if is_rms else "LayerNorm",
        "zero_centered_gamma": isinstance(norm, RMSNorm) and norm.zero_centered,
    }


def _norm_vectors(norm: RMSNorm | LayerNorm) -> list[Vector]:
    vectors = [Vector("layer_norm_weight", norm, "weight")]
    if isinstance(norm, LayerNorm):
        vectors.append(Vector("layer_norm_bias", norm, "bias"))
    return vectors


def _bias(layer: ColumnParallelLinear | RowParallelLinear) -> list[Vector]:
    if layer.bias is None:
        return []
    return [Vector("bias", layer, "bias")]


def _as_it_is(x_TH: Tensor) -> Tensor:
    return x_TH

"""Makes Transformer Engine compute the layers of a model's blocks.

Owns: which layers it computes. They keep their names, parameters and slots, so parameter
table, buffers and checkpoints are those of the project's own layers. Must not know: the
order of assembly.
"""

from collections.abc import Iterator
from functools import partial

from torch import nn

from megatron_ray.config.training import Fp8Config
from megatron_ray.expert_parallel.layers import GroupedLinear
from megatron_ray.models.attention import Attention, LocalAttention
from megatron_ray.models.block import Block
from megatron_ray.models.gpt import GPT
from megatron_ray.models.mlp import GatedMLP
from megatron_ray.models.multi_token_prediction import MultiTokenPredictionLayer
from megatron_ray.parallelize.transformer_engine.attention import compute_attention
from megatron_ray.parallelize.transformer_engine.bound import Precision, without_fp8
from megatron_ray.parallelize.transformer_engine.experts import compute_experts
from megatron_ray.parallelize.transformer_engine.library import TransformerEngine
from megatron_ray.parallelize.transformer_engine.linear import compute_column, compute_row
from megatron_ray.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ray.tensor_parallel.norm import LayerNorm, RMSNorm


def apply_transformer_engine(
    module: GPT, fp8: Fp8Config | None, engine: TransformerEngine
) -> None:
    """Makes the library compute all parallel layers of the blocks, and their attention.

    Norms before a product become part of it. Routers, norms before experts, embedding and
    head stay as they are, and so does attention over split sequences or with dropout.
    """
    num_layers = module.config.num_layers
    for index, block in _numbered_blocks(module):
        precision = without_fp8
        alignment = None
        if fp8 is not None and fp8.covers(index, num_layers):
            recipe = engine.fp8_recipe(fp8)
            precision = partial(engine.pytorch.autocast, enabled=True, recipe=recipe)
            alignment = 32 if fp8.recipe == "mxfp8" else 16
        _compute_block(engine, block, precision, alignment)


def _numbered_blocks(module: GPT) -> Iterator[tuple[int, Block]]:
    """Yields the blocks on this rank; those of multi-token prediction follow the others."""
    for name, block in module.layers.items():
        assert isinstance(block, Block)
        yield int(name), block
    for name, layer in module.mtp.items():
        assert isinstance(layer, MultiTokenPredictionLayer)
        yield module.config.num_layers + int(name), layer.block


def _compute_block(
    engine: TransformerEngine, block: Block, precision: Precision, alignment: int | None
) -> None:
    norms = _norms_of_products(block)
    for part in block.modules():
        if isinstance(part, ColumnParallelLinear):
            compute_column(engine, part, norms.get(part), precision)
        elif isinstance(part, RowParallelLinear):
            compute_row(engine, part, precision)
        elif isinstance(part, GroupedLinear):
            compute_experts(engine, part, precision, alignment)
        elif isinstance(part, LocalAttention):
            compute_attention(engine, part)


def _norms_of_products(block: Block) -> dict[nn.Module, RMSNorm | LayerNorm]:
    """Returns the norms that a single product reads, by the product's layer."""
    norms = dict[nn.Module, RMSNorm | LayerNorm]()
    # Latent attention and experts read their norm several times.
    if isinstance(block.attention, Attention):
        assert isinstance(block.attention_norm, RMSNorm | LayerNorm)
        norms[block.attention.qkv] = block.attention_norm  # type: ignore[index]
    if block.mlp is not None:
        assert isinstance(block.mlp_norm, RMSNorm | LayerNorm)
        first = block.mlp.gate_up if isinstance(block.mlp, GatedMLP) else block.mlp.up
        norms[first] = block.mlp_norm
    return norms

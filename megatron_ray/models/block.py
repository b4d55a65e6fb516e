"""One transformer block.

Owns: pre-norm residual wiring. Must not know: ranks, groups.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import Attention, ForwardContext, KeyValueCache
from megatron_ray.models.latent_attention import LatentAttention
from megatron_ray.models.layers import Layers
from megatron_ray.models.mlp import make_mlp
from megatron_ray.models.moe.layer import MoE
from megatron_ray.sharding.model_specs import block_spec


class Block(nn.Module):
    """hidden + attention(norm(hidden)), then + mlp(norm(.)), or + experts(norm(.)); a
    residual is added inside its half's last product.
    """

    def __init__(self, config: ModelConfig, layers: Layers, index: int) -> None:
        super().__init__()
        spec = block_spec(config, index)
        self.attention_norm = layers.norm(spec.attention_norm)
        self.attention = make_attention(config, layers, index)
        self.mlp_norm = layers.norm(spec.mlp_norm)
        moe = config.experts_on(index)
        self.mlp = make_mlp(config, layers, config.ffn_width) if moe is None else None
        self.moe = MoE(config, moe, layers, index) if moe is not None else None
        self.attention_dropout = layers.hidden_dropout(f"layers.{index}.attention")
        self.mlp_dropout = layers.hidden_dropout(f"layers.{index}.mlp")

    def forward(
        self,
        hidden_TH: Tensor,
        positions: ForwardContext,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        if (
            self.attention_dropout is not None
            and self.mlp_dropout is not None
            and positions.first_sample is not None
        ):
            return self._dropping(hidden_TH, positions, positions.first_sample)
        hidden_TH = self.attention(
            self.attention_norm(hidden_TH), hidden_TH, positions, cache
        )
        return self._feed_forward(self.mlp_norm(hidden_TH), hidden_TH, positions)

    def _feed_forward(
        self, x_TH: Tensor, residual_TH: Tensor | None, positions: ForwardContext
    ) -> Tensor:
        if self.moe is not None:
            output: Tensor = self.moe(x_TH, residual_TH, positions)
        else:
            output = self.mlp(x_TH, residual_TH)  # type: ignore[misc]
        return output

    def _dropping(
        self, hidden_TH: Tensor, positions: ForwardContext, first_sample: int
    ) -> Tensor:
        """With dropout the residual is added after it, so not inside a product."""
        assert self.attention_dropout is not None
        assert self.mlp_dropout is not None
        attended = self.attention(self.attention_norm(hidden_TH), None, positions)
        hidden_TH = self.attention_dropout(attended, first_sample).add_(hidden_TH)
        fed = self._feed_forward(self.mlp_norm(hidden_TH), None, positions)
        output: Tensor = self.mlp_dropout(fed, first_sample).add_(hidden_TH)
        return output


def make_attention(
    config: ModelConfig, layers: Layers, index: int
) -> Attention | LatentAttention:
    """The kind of attention that a layer has."""
    place = f"layers.{index}.attention"
    if config.mla is not None:
        return LatentAttention(config, config.mla, layers, place)
    return Attention(config, layers, place, config.window_on(index))


def run_sequentially(
    blocks: Iterable[nn.Module], hidden_TH: Tensor, positions: ForwardContext
) -> Tensor:
    """Activations through a row of blocks."""
    for block in blocks:
        hidden_TH = block(hidden_TH, positions, None)
    return hidden_TH

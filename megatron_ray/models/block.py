"""One transformer block. Owns: pre-norm residual wiring. Must not know: ranks, groups."""

from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import Attention, KeyValueCache, Positions
from megatron_ray.models.layers import Layers
from megatron_ray.models.mlp import make_mlp
from megatron_ray.models.moe.layer import MoE


class Block(nn.Module):
    """hidden + attention(norm(hidden)), then + mlp(norm(.)), or + experts(norm(.)); a residual is added inside its half's last product."""

    def __init__(self, config: ModelConfig, layers: Layers, index: int) -> None:
        super().__init__()
        self.attention_norm = layers.norm(config.hidden_size)
        self.attention = Attention(config, layers)
        self.mlp_norm = layers.norm(config.hidden_size)
        moe = config.experts_on(index)
        self.mlp = make_mlp(config, layers, config.ffn_width) if moe is None else None
        self.moe = MoE(config, moe, layers, index) if moe is not None else None

    def forward(self, hidden_TH: Tensor, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        hidden_TH = self.attention(self.attention_norm(hidden_TH), hidden_TH, positions, cache)
        normed = self.mlp_norm(hidden_TH)
        output: Tensor = self.moe(normed, hidden_TH, positions) if self.moe is not None else self.mlp(normed, hidden_TH)  # type: ignore[misc]
        return output

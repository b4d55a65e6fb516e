"""One transformer block. Owns: pre-norm residual wiring. Must not know: ranks, groups."""

from collections.abc import Iterable

from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import Attention, KeyValueCache, Positions
from megatron_ray.models.layers import Layers
from megatron_ray.models.mlp import GatedMLP, PlainMLP


class Block(nn.Module):
    """hidden + attention(norm(hidden)), then + mlp(norm(.)); the residual is added inside each half's last product."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.attention_norm = layers.norm(config.hidden_size)
        self.attention = Attention(config, layers)
        self.mlp_norm = layers.norm(config.hidden_size)
        self.mlp = GatedMLP(config, layers) if config.activation == "swiglu" else PlainMLP(config, layers)

    def forward(self, hidden_TH: Tensor, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        hidden_TH = self.attention(self.attention_norm(hidden_TH), hidden_TH, positions, cache)
        output: Tensor = self.mlp(self.mlp_norm(hidden_TH), hidden_TH)
        return output


def one_after_another(blocks: Iterable[nn.Module], hidden_TH: Tensor, positions: Positions) -> Tensor:
    """Activations through a row of blocks."""
    for block in blocks:
        hidden_TH = block(hidden_TH, positions, None)
    return hidden_TH

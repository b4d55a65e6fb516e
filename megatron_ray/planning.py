"""Bytes of activations that a layer keeps from its forward to its backward pass. Owns: that formula. Pure; must not know: torch, nodes.

Counts tensors, after Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models), section 4, for the layers
as they are here: fused attention keeps no scores, and a norm, an activation and a product keep their inputs.

Letters, per microbatch and rank: T = seq_length x micro_batch_size / cp tokens; s = tp under sequence parallelism, else 1; w bytes of an
activation; H hidden_size, D head width, N and G query and key/value heads, F inner width of the MLP, f = 2 F where it is gated, else F.
"""

from dataclasses import dataclass

from megatron_ray.config.moe import MoEConfig
from megatron_ray.config.train_config import TrainConfig

_STATISTICS = {"rmsnorm": 4, "layernorm": 8}
"""fp32 numbers that a norm keeps of each token, in bytes."""


@dataclass(frozen=True)
class LayerActivations:
    """What one layer keeps of one microbatch when nothing is recomputed, in bytes, by what recomputation can do without."""

    layer_input: int
    """w T H / s"""
    norm: int
    """Outputs of both norms, and their statistics: 2 w T H / s + 2 x (4 or 8) T / s"""
    core_attention: int
    """4 T N / tp: a fused kernel's fp32 logarithms of sums (the blocks of bf16 on CPU keep none). With dropout on the attention
    probabilities: (4 + 1 + w) T S N / tp, fp32 probabilities, mask and dropped probabilities."""
    pre_activation: int
    """w T f / tp"""
    activation: int
    """w T F / tp"""
    rest: int
    """w T H / s before the MLP's norm, w T (2 N + 2 G) D / tp around the attention (G at least tp), 2 T H / s of masks with hidden
    dropout, and what experts keep."""

    @property
    def whole(self) -> int:
        """Everything: none recomputed."""
        return self.layer_input + self.norm + self.core_attention + self.pre_activation + self.activation + self.rest

    def without(self, modules: tuple[str, ...]) -> int:
        """With these modules recomputed; see RecomputeConfig.modules."""
        spared = {
            "core_attention": self.core_attention,
            "norm": self.norm,
            "activation": self.activation,
            "mlp": self.pre_activation + self.activation,
        }
        return self.whole - sum(spared[name] for name in set(modules))


def layer_activations(config: TrainConfig) -> LayerActivations:
    """Of one layer on one rank; of the kind that keeps most, where some have experts."""
    model = config.model
    kinds = {model.experts_on(index) is not None for index in range(model.num_layers)}
    return max((_of_kind(config, model.moe if experts else None) for experts in kinds), key=lambda layer: layer.whole)


def _of_kind(config: TrainConfig, moe: MoEConfig | None) -> LayerActivations:
    model, parallel, training = config.model, config.parallel, config.training
    tp, cut = parallel.tp, parallel.tp if parallel.sequence_parallel else 1
    tokens = training.seq_length * training.micro_batch_size // parallel.cp
    width = 2 if training.precision == "bf16" else 4
    residual = width * tokens * model.hidden_size // cut
    heads = tokens * model.num_attention_heads // tp
    scores = heads * training.seq_length * (4 + 1 + width) if model.attention_dropout else heads * 4
    inner = width * tokens * model.ffn_width // tp if moe is None else 0
    around = 2 * width * tokens * (model.num_attention_heads + max(model.kv_heads, tp)) * model.head_width // tp
    gated = model.activation == "swiglu"
    return LayerActivations(
        layer_input=residual,
        norm=2 * residual + 2 * _STATISTICS[model.norm] * tokens // cut,
        core_attention=scores,
        pre_activation=inner * (2 if gated else 1),
        activation=inner,
        rest=residual
        + around
        + _of_experts(config, moe, tokens // cut, 3 if gated else 2)
        + (2 * residual // width if model.hidden_dropout else 0),
    )


def _of_experts(config: TrainConfig, moe: MoEConfig | None, tokens: int, inner: int) -> int:
    """Rows come gathered over etp and balanced over ep: of each its input, its output and `inner` times the width inside an expert."""
    if moe is None:
        return 0
    model, tp = config.model, config.parallel.tp
    etp, width = config.parallel.etp or tp, 2 if config.training.precision == "bf16" else 4
    shared = inner * (moe.shared_expert_ffn_hidden_size or 0)
    return width * tokens * (moe.top_k * (2 * model.hidden_size * etp + inner * model.expert_width) + shared)


def kept_activations(config: TrainConfig, num_layers: int) -> int:
    """Bytes that a stage of `num_layers` keeps of a microbatch until its backward pass."""
    layer, recompute = layer_activations(config), config.training.recompute
    if recompute.granularity != "full":
        return num_layers * layer.without(recompute.chosen_modules)
    assert recompute.num_layers is not None
    if recompute.method == "uniform":
        return -(-num_layers // recompute.num_layers) * layer.layer_input
    recomputed = min(recompute.num_layers, num_layers)
    return recomputed * layer.layer_input + (num_layers - recomputed) * layer.whole


def recomputed_activations(config: TrainConfig, num_layers: int) -> int:
    """Bytes that come back for a while in a backward pass: those of a whole chunk, or what one layer had done without."""
    layer, recompute = layer_activations(config), config.training.recompute
    if recompute.granularity != "full":
        return layer.whole - layer.without(recompute.chosen_modules)
    assert recompute.num_layers is not None
    return layer.whole * (min(recompute.num_layers, num_layers) if recompute.method == "uniform" else 1)

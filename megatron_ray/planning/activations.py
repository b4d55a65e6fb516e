"""Bytes of activations that a layer keeps from its forward to its backward pass.

Owns: that formula. Pure; must not know: torch, nodes.

Counts tensors, after Korthikanti et al. 2022 (Reducing Activation Recomputation in
Large Transformer Models), section 4, for the layers as they are here: fused attention
keeps no scores, and a norm, an activation and a product keep their inputs. (On CUDA a
sliding window shorter than the sequence goes through torch's attention with a mask,
which keeps more: its output once more, keys and values of every query head, and masks.)

Letters, per microbatch and rank: T = seq_length x micro_batch_size / cp tokens; s = tp
under sequence parallelism, else 1; w bytes of an activation; H hidden_size, D head
width, N and G query and key/value heads, F inner width of the MLP, f = 2 F where it is
gated, else F. In a layer with experts F is the sum of the widths that a token meets, K
of experts and a shared one; they are taken to be balanced. Of latent attention Q and C
are the latents' widths (Q is 0 without one), R that of the rotated part of a key, V
that of a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ray.config.moe import MoEConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.planning.microbatch import (
    local_vocabulary,
    own_tokens_of,
    tokens_of,
    width_of,
)
from megatron_ray.sharding.loss_chunks import rows_at_once

_STATISTICS = {"rmsnorm": 4, "layernorm": 8}
"""fp32 numbers that a norm keeps of each token, in bytes."""


@dataclass(frozen=True)
class LayerActivations:
    """What one layer keeps of one microbatch when nothing is recomputed, in bytes, by
    what recomputation can do without.
    """

    layer_input: int
    """w T H / s"""
    norm: int
    """Outputs of both norms, and their statistics: 2 w T H / s + 2 x (4 or 8) T / s"""
    core_attention: int
    """4 T N / tp: a fused kernel's fp32 logarithms of sums (the blocks of bf16 on CPU
    keep none). With dropout on the attention probabilities: (4 + 1 + w) T S N / tp,
    fp32 probabilities, mask and dropped probabilities. Where heads are exchanged for
    tokens, and in latent attention whose values are narrower than its keys and are cut
    out, the kernel keeps its output and something else goes on: w T N D / tp more, but
    with dropout."""
    pre_activation: int
    """w T f / tp"""
    activation: int
    """w T F / tp"""
    experts: int
    """w T K H etp / s of tokens on their way to experts, w T K H / s of what comes back
    (times etp too where everything is gathered), and what the router keeps
    (`_routing`); 0 in a layer without."""
    rest: int
    """w T H / s before the MLP's norm, w T (2 N + 2 G) D / tp around the attention (G
    at least tp), (w D + 4 or 8) T (N + G) / tp where queries and keys are normed, and 2
    T H / s of masks with hidden dropout. Around latent attention w T N (3 D + V) / tp,
    and of its latents w T (2 Q + 2 C + R) / s and their norms' statistics."""

    @property
    def whole(self) -> int:
        """Everything: none recomputed."""
        inside = self.pre_activation + self.activation + self.experts
        return self.layer_input + self.norm + self.core_attention + inside + self.rest

    def without(self, modules: tuple[str, ...]) -> int:
        """With these modules recomputed; see RecomputeConfig.modules."""
        inside = self.pre_activation + self.activation + self.experts
        spared = {
            "core_attention": self.core_attention,
            "norm": self.norm,
            "activation": self.activation,
            "mlp": 0 if self.experts else inside,
            "moe": inside if self.experts else 0,
        }
        return self.whole - sum(spared[name] for name in set(modules))


def layer_activations(config: TrainConfig, index: int) -> LayerActivations:
    """Of a layer on one rank."""
    model = config.model
    parallel = config.parallel
    tp = parallel.tp
    tokens = tokens_of(config)
    own = own_tokens_of(config)
    width = width_of(config)
    residual = width * own * model.hidden_size
    heads = tokens * model.num_attention_heads // tp
    attended = 4 + _own_output(config) * width
    scores = (
        heads * config.training.seq_length * (4 + 1 + width)
        if model.attention_dropout
        else heads * attended
    )
    moe = model.experts_on(index)
    copies = 0
    if moe is None:
        inner = width * tokens * model.ffn_width // tp
    else:  # rows come gathered over etp and balanced over ep
        inner = (
            width
            * own
            * (moe.top_k * model.expert_width + (moe.shared_expert_ffn_hidden_size or 0))
        )
        back = parallel.expert_tp if parallel.dispatcher == "allgather" else 1
        copies = moe.top_k * residual * (parallel.expert_tp + back) + own * _routing(moe)
    return LayerActivations(
        layer_input=residual,
        norm=2 * residual + 2 * _STATISTICS[model.norm] * own,
        core_attention=scores,
        pre_activation=inner * (2 if model.gated else 1),
        activation=inner,
        experts=copies,
        rest=residual
        + _around_attention(config)
        + (2 * residual // width if model.hidden_dropout else 0),
    )


def _own_output(config: TrainConfig) -> int:
    """Elements of a head's output that its kernel keeps beside what goes on."""
    model = config.model
    parallel = config.parallel
    exchanged = parallel.cp > 1 and parallel.cp_method.startswith("a2a")
    return model.head_width if exchanged or model.value_width < model.head_width else 0


def _around_attention(config: TrainConfig) -> int:
    """Queries, keys, values and what goes on; latents before them."""
    model = config.model
    tp = config.parallel.tp
    tokens = tokens_of(config)
    width = width_of(config)
    heads = tokens * model.num_attention_heads // tp
    if model.mla is None:
        normed = (
            heads + tokens * max(model.kv_heads, tp) // tp
        )  # heads of tokens, queries and keys together
        return width * 2 * normed * model.head_width + model.qk_norm * normed * (
            width * model.head_width + _STATISTICS[model.norm]
        )
    mla = model.mla
    norms = 2 if model.mla.q_lora_rank is not None else 1
    latents = 2 * (mla.q_lora_rank or 0) + 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
    return width * heads * (3 * mla.qk_head_dim + mla.v_head_dim) + own_tokens_of(
        config
    ) * (width * latents + norms * _STATISTICS[model.norm])


def _routing(moe: MoEConfig) -> int:
    """Bytes per token: fp32 scores and logits of E experts, of which each loss keeps
    its own, and of K chosen ones their number, weight and place in the order of
    dispatch.
    """
    sigmoid = moe.score_function == "sigmoid"
    aux = moe.aux_loss_coeff > 0
    z = moe.z_loss_coeff > 0
    over_all = (sigmoid or moe.pre_softmax) + aux * (2 if sigmoid else 1) + z
    alone = (sigmoid and moe.top_k > 1) + aux * sigmoid + z
    return 4 * (over_all * moe.num_experts + alone) + moe.top_k * (
        8 + 4 + 8 + 4 + (moe.capacity_factor is not None)
    )


def _by_layer(config: TrainConfig, layers: Sequence[int]) -> list[LayerActivations]:
    """Layers are alike but for having experts or not."""
    kinds = {config.model.experts_on(index) is not None: index for index in layers}
    found = {experts: layer_activations(config, index) for experts, index in kinds.items()}
    return [found[config.model.experts_on(index) is not None] for index in layers]


def kept_activations(config: TrainConfig, layers: Sequence[int]) -> int:
    """Bytes that a stage with these layers keeps of a microbatch until its backward
    pass.
    """
    recompute = config.training.recompute
    found = _by_layer(config, layers)
    if recompute.granularity != "full":
        return sum(layer.without(recompute.chosen_modules) for layer in found)
    assert recompute.num_layers is not None
    if recompute.method == "uniform":
        return sum(layer.layer_input for layer in found[:: recompute.num_layers])
    recomputed = found[: recompute.num_layers]
    whole = found[recompute.num_layers :]
    return sum(layer.layer_input for layer in recomputed) + sum(
        layer.whole for layer in whole
    )


def recomputed_activations(config: TrainConfig, layers: Sequence[int]) -> int:
    """Bytes that come back for a while in a backward pass: those of a whole chunk, or
    what one layer had done without.
    """
    recompute = config.training.recompute
    found = _by_layer(config, layers)
    if recompute.granularity != "full":
        return max(
            (layer.whole - layer.without(recompute.chosen_modules) for layer in found),
            default=0,
        )
    assert recompute.num_layers is not None
    size = recompute.num_layers if recompute.method == "uniform" else 1
    chunks = [found[start : start + size] for start in range(0, len(found), size)]
    return max((sum(layer.whole for layer in chunk) for chunk in chunks), default=0)


def kept_by_stage(config: TrainConfig, stage: StageContents) -> int:
    """Bytes that a whole stage keeps of a microbatch: its layers, what its embedding
    and its head keep, and all that once more of each layer that predicts a further
    token.
    """
    embedding = _kept_by_embedding(config)
    head = _kept_by_head(config)
    found = (
        kept_activations(config, stage.layers)
        + stage.embedding * embedding
        + stage.loss * head
    )
    for layer in stage.mtp_layer_numbers(config.model.num_layers):
        found += (
            embedding + _kept_by_joining(config) + kept_activations(config, [layer]) + head
        )
    return found


def recomputed_by_stage(config: TrainConfig, stage: StageContents) -> int:
    """Bytes that come back for a while in the backward pass of a stage; each layer that
    predicts a further token is a row of its own.
    """
    rows = [stage.layers, *([layer] for layer in stage.mtp_layer_numbers(config.model.num_layers))]
    return max(recomputed_activations(config, row) for row in rows)


def _kept_by_embedding(config: TrainConfig) -> int:
    """8 T of ids, and T H / s of a mask with hidden dropout."""
    return 8 * tokens_of(config) + (
        own_tokens_of(config) * config.model.hidden_size
        if config.model.hidden_dropout
        else 0
    )


def _kept_by_joining(config: TrainConfig) -> int:
    """Of a further token's embedding and what came before: w T H / s of the one before
    its norm, 2 w T H / s of both behind theirs, both norms' statistics, and w T H / s
    of the other, which the head has kept already where it is not gathered.
    """
    model = config.model
    own = own_tokens_of(config)
    parts = 4 if own < tokens_of(config) else 3
    return (
        parts * width_of(config) * model.hidden_size + 2 * _STATISTICS[model.norm]
    ) * own


def _kept_by_head(config: TrainConfig) -> int:
    """W T H / s + 4 (or 8) T / s of the last norm's input and statistics, w T H of its
    output (gathered under sequence parallelism), and w T V / tp + 4 T, which are the
    logits and then their gradient.
    """
    model = config.model
    tokens = tokens_of(config)
    width = width_of(config)
    norm = (width * model.hidden_size + _STATISTICS[model.norm]) * own_tokens_of(config)
    return (
        norm
        + width * tokens * model.hidden_size
        + (width * local_vocabulary(config) + 4) * tokens
    )


def working_head(config: TrainConfig) -> int:
    """Bytes that the loss needs for a moment on a GPU: logits to_fp32 to fp32, of as
    many tokens as it looks at in one go.
    """
    vocabulary = local_vocabulary(config)
    return 4 * min(tokens_of(config), rows_at_once("cuda", vocabulary)) * vocabulary

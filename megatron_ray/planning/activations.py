"""Computes the bytes of activations that layers keep until their backward pass.

Tensors are counted after Korthikanti et al. 2022 (Reducing Activation Recomputation in
Large Transformer Models), section 4, for the layers of this library: fused attention
keeps no scores, and a norm, an activation function and a product keep their inputs. (On
CUDA a sliding window shorter than the sequence uses torch's attention with a mask, which
keeps more: its output once more, keys and values of every query head, and masks.)

Letters, per microbatch and rank: T = seq_length x micro_batch_size / cp tokens; s = tp
with sequence parallelism, else 1; w bytes of an activation, h those of hidden states
between layers; z bytes of a norm's statistics per token; H hidden_size, D head width, N
and G query and key/value heads, F inner width of the MLP, f = 2 F where it is gated, else
F. In a layer with experts F is
the sum of the widths of a token's experts, K chosen ones and a shared one; the load is
assumed to be balanced. With latent attention Q and C are the widths of the latents (Q is
0 without one), R that of the rotated part of a key, V that of a value.

Pure. Must not know: torch, nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.ops.attention.choice import attention_kernel
from megatron_ray.ops.loss_chunks import rows_at_once
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.planning.microbatch import (
    hidden_width_of,
    local_vocabulary,
    own_tokens_of,
    tokens_of,
    width_of,
)
from megatron_ray.planning.recompute.saved_outputs import SavedOutputs, saved_outputs

_FP32 = 4
_INT64 = 8
PerLayer = TypeVar("PerLayer")


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps of one microbatch without recomputation.

    They are listed by what recomputation can save.
    """

    layer_input: int
    """h T H / s"""
    norm: int
    """Outputs of both norms, and their statistics: 2 w T H / s + 2 z T / s"""
    core_attention: int
    """4 T N / tp: the fp32 log-sum-exp of a fused kernel (the blocks of bf16 on CPU keep
    none). With dropout on the attention probabilities (4 + 1 + w) T S N / tp instead:
    fp32 probabilities, mask and dropped probabilities. Another w T N D / tp, but not with
    dropout, where the kernel's output is not what the next layer keeps: where heads are
    exchanged for tokens, and with latent attention whose values are narrower than its
    keys and are cut out of the output."""
    pre_activation: int
    """w T f / tp"""
    activation: int
    """w T F / tp"""
    experts: int
    """w T K H etp / s of tokens dispatched to experts, w T K H / s of their outputs
    (times etp too where everything is gathered), and what the router keeps
    (`_router_bytes`); 0 in a layer without experts."""
    rest: int
    """h T H / s before the MLP's norm; 2 (w H + z) T / s before and in the norms of outputs;
    w T (2 N + 2 G) D / tp around the attention (G at
    least tp); (w D + z) T (N + G) / tp where queries and keys are normed; 2 T H / s of
    masks with hidden dropout. Around latent attention w T N (3 D + V) / tp, and of its
    latents w T (2 Q + 2 C + R) / s and the statistics of their norms."""

    @property
    def whole(self) -> int:
        """Bytes without recomputation."""
        outside = self.layer_input + self.norm + self.core_attention + self.rest
        return outside + self._mlp

    @property
    def _mlp(self) -> int:
        return self.pre_activation + self.activation + self.experts

    def without(self, modules: tuple[str, ...]) -> int:
        """Returns the bytes with these modules recomputed, of RecomputeConfig.modules."""
        saved = {
            "core_attention": self.core_attention,
            "norm": self.norm,
            "activation": self.activation,
            "mlp": 0,
            "moe": 0,
        }
        # Only layers with experts have anything to dispatch.
        saved["moe" if self.experts else "mlp"] = self._mlp
        return self.whole - sum(saved[name] for name in set(modules))


def layer_activations(
    config: TrainConfig, index: int, device: DeviceKind
) -> LayerActivations:
    """Returns what a layer (counted from 0) keeps on one rank."""
    model = config.model
    own = own_tokens_of(config)
    residual = hidden_width_of(config) * own * model.hidden_size
    normed = width_of(config) * own * model.hidden_size
    statistics = _norm_statistics(config, device, hidden_width_of(config)) * own
    inner = _inner_bytes(config, index)
    around = _around_attention(config, device)
    if model.peri_norm:
        around += 2 * (normed + _norm_statistics(config, device, width_of(config)) * own)
    dropout_masks = 0
    if model.hidden_dropout:
        dropout_masks = 2 * own * model.hidden_size  # one byte per element
    return LayerActivations(
        layer_input=residual,
        norm=2 * normed + 2 * statistics,
        core_attention=_core_bytes(config, index, device),
        pre_activation=inner * (2 if model.gated else 1),
        activation=inner,
        experts=_dispatch_bytes(config, index),
        rest=residual + around + dropout_masks,
    )


def _norm_statistics(config: TrainConfig, device: DeviceKind, width: int) -> int:
    """Returns the bytes of statistics that a norm keeps of each token.

    RMSNorm keeps the inverse root mean square in fp32, LayerNorm mean and inverse
    deviation, which torch's kernel for CPUs makes in the type of its input, of `width`
    bytes.
    """
    if config.model.norm == "rmsnorm":
        return _FP32
    if device.type == "cpu":
        return 2 * width
    return 2 * _FP32


def _core_bytes(config: TrainConfig, index: int, device: DeviceKind) -> int:
    """Returns the bytes that attention keeps besides queries, keys, values and output."""
    model = config.model
    heads = tokens_of(config) * model.num_attention_heads // config.parallel.tp
    if model.attention_dropout:
        # fp32 probabilities, a mask of one byte, and the dropped probabilities.
        per_score = _FP32 + 1 + width_of(config)
        return heads * config.training.seq_length * per_score
    return heads * _kept_by_kernel(config, index, device)


def _kept_by_kernel(config: TrainConfig, index: int, device: DeviceKind) -> int:
    """Returns the bytes of a token and head that the kernel of a layer keeps.

    Documents that are attended to separately count as whole sequences, since their
    lengths are not known.
    """
    parallel = config.parallel
    kernel = attention_kernel(
        device,
        precision=config.training.precision,
        sequence=config.training.seq_length,
        window=config.model.window_on(index),
    )
    # Tiles of a sequence that ranks share keep the log-sum-exp that merges them.
    is_tiled = parallel.cp > 1 and parallel.cp_method != "a2a"
    if kernel == "blocks" and not is_tiled:
        return 0
    return _FP32 + _own_output(config) * width_of(config)


def _own_output(config: TrainConfig) -> int:
    """Returns the elements of a head's output that the kernel keeps for itself.

    They are 0 where the projection after attention keeps the same tensor.
    """
    model = config.model
    parallel = config.parallel
    is_exchanged = parallel.cp > 1 and parallel.cp_method.startswith("a2a")
    if is_exchanged or model.value_width < model.head_width:
        return model.head_width
    return 0


def _around_attention(config: TrainConfig, device: DeviceKind) -> int:
    """Returns the bytes of queries, keys, values and output, and of any latents."""
    model = config.model
    mla = model.mla
    tp = config.parallel.tp
    tokens = tokens_of(config)
    width = width_of(config)
    heads = tokens * model.num_attention_heads // tp
    if mla is None:
        # Queries and keys of all tokens; values are as large as keys, outputs as queries.
        queries_and_keys = heads + tokens * max(model.kv_heads, tp) // tp
        kept = width * 2 * queries_and_keys * model.head_width
        if model.attention_scale is not None and model.position_embedding != "rope":
            # Scaled queries lie beside the product whose parts the keys and values are.
            kept += width * heads * model.head_width
        if model.qk_norm:
            normed = width * model.head_width + _norm_statistics(config, device, width)
            kept += queries_and_keys * normed
        return kept
    kept = width * heads * (3 * mla.qk_head_dim + mla.v_head_dim)
    # Latents before and after their norms, and the rotated part of the key.
    latents = 2 * (mla.q_lora_rank or 0) + 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
    norms = 1 if mla.q_lora_rank is None else 2
    per_token = width * latents + norms * _norm_statistics(config, device, width)
    return kept + own_tokens_of(config) * per_token


def _inner_bytes(config: TrainConfig, index: int) -> int:
    """Returns the bytes between the two products of the MLP or the experts."""
    model = config.model
    moe = model.experts_on(index)
    if moe is None:
        return width_of(config) * tokens_of(config) * model.ffn_width // config.parallel.tp
    # Rows arrive gathered over etp and balanced over ep, so the degrees cancel out.
    ffn_width = moe.top_k * model.expert_width + (moe.shared_expert_ffn_hidden_size or 0)
    return width_of(config) * own_tokens_of(config) * ffn_width


def _dispatch_bytes(config: TrainConfig, index: int) -> int:
    """Returns the bytes that routing tokens to experts and back keeps."""
    moe = config.model.experts_on(index)
    if moe is None:
        return 0
    parallel = config.parallel
    own = own_tokens_of(config)
    rows = moe.top_k * width_of(config) * own * config.model.hidden_size
    copies = parallel.expert_tp + 1
    if parallel.dispatcher == "allgather":
        copies = 2 * parallel.expert_tp
    return rows * copies + own * _router_bytes(moe)


def _router_bytes(moe: MoEConfig) -> int:
    """Returns the bytes per token that the router keeps.

    Those are fp32 scores and logits of all experts, of which each loss keeps its own,
    and of the chosen experts their index, weight and row in the order of dispatch.
    """
    is_sigmoid = moe.score_function == "sigmoid"
    per_expert = 0  # fp32 numbers of each expert
    per_token = 0  # fp32 numbers besides
    if is_sigmoid or moe.pre_softmax:
        per_expert += 1
    if is_sigmoid and moe.top_k > 1:
        per_token += 1  # the sum of the chosen scores, which divides them
    if moe.aux_loss_coeff > 0:
        per_expert += 1
        if is_sigmoid:
            per_expert += 1  # scores are normalized over all experts for the loss
            per_token += 1
    if moe.z_loss_coeff > 0:
        per_expert += 1
        per_token += 1  # the logsumexp
    # Index, weight and position in the order of dispatch, of each chosen expert.
    per_choice = _INT64 + _FP32 + _INT64 + _FP32
    if moe.capacity_factor is not None:
        per_choice += 1  # a mask of dropped rows
    numbers = per_expert * moe.num_experts + per_token
    return _FP32 * numbers + moe.top_k * per_choice


def _by_layer(
    config: TrainConfig, layers: Sequence[int], compute: Callable[[int], PerLayer]
) -> list[PerLayer]:
    """Returns the result of each layer's number; layers of one kind share an object."""
    # Layers differ in having experts or not, and in their window, which decides the kernel.
    by_kind: dict[object, PerLayer] = {}
    results = []
    for index in layers:
        kind = (config.model.experts_on(index) is not None, config.model.window_on(index))
        if kind not in by_kind:
            by_kind[kind] = compute(index)
        results.append(by_kind[kind])
    return results


def _activations(
    config: TrainConfig, layers: Sequence[int], device: DeviceKind
) -> list[LayerActivations]:
    return _by_layer(config, layers, lambda index: layer_activations(config, index, device))


def _saved(
    config: TrainConfig, layers: Sequence[int], device: DeviceKind
) -> list[SavedOutputs]:
    return _by_layer(config, layers, lambda index: saved_outputs(config, index, device))


def kept_activations(config: TrainConfig, layers: Sequence[int], device: DeviceKind) -> int:
    """Returns the bytes that a stage with these layers keeps of a microbatch."""
    recompute = config.training.recompute
    activations = _activations(config, layers, device)
    if recompute.granularity == "operations":
        kept = 0
        saved = _saved(config, layers, device)
        for layer, outputs in zip(activations, saved, strict=True):
            kept += layer.layer_input + outputs.whole
        return kept
    if recompute.granularity != "full":
        return sum(layer.without(recompute.chosen_modules) for layer in activations)
    assert recompute.num_layers is not None
    if recompute.method == "uniform":
        first_of_chunks = activations[:: recompute.num_layers]
        return sum(layer.layer_input for layer in first_of_chunks)
    kept = 0
    for position, layer in enumerate(activations):
        if position < recompute.num_layers:
            kept += layer.layer_input
        else:
            kept += layer.whole
    return kept


def recomputed_activations(
    config: TrainConfig, layers: Sequence[int], device: DeviceKind
) -> int:
    """Returns the bytes that recomputation needs at once in a backward pass.

    Those are the activations of a whole chunk of layers, or what one layer did not keep.
    """
    recompute = config.training.recompute
    activations = _activations(config, layers, device)
    most = 0
    if recompute.granularity == "operations":
        saved = _saved(config, layers, device)
        for layer, outputs in zip(activations, saved, strict=True):
            kept = layer.layer_input + outputs.whole - outputs.before_attention
            most = max(most, layer.whole - kept)
        return most
    if recompute.granularity != "full":
        for layer in activations:
            most = max(most, layer.whole - layer.without(recompute.chosen_modules))
        return most
    assert recompute.num_layers is not None
    size = 1
    if recompute.method == "uniform":
        size = recompute.num_layers
    for start in range(0, len(activations), size):
        chunk = activations[start : start + size]
        most = max(most, sum(layer.whole for layer in chunk))
    return most


def kept_by_stage(config: TrainConfig, stage: StageContents, device: DeviceKind) -> int:
    """Returns the bytes that a whole stage keeps of a microbatch.

    Each MTP layer has an embedding look-up and a head of its own.
    """
    embedding = _kept_by_embedding(config)
    head = _kept_by_head(config, device)
    kept = kept_activations(config, stage.layers, device)
    if stage.embedding:
        kept += embedding + _kept_by_embedding_norm(config, device)
    if stage.loss:
        kept += head
    for layer in stage.mtp_layer_numbers(config.model.num_layers):
        kept += embedding + _kept_by_mtp_projection(config, device)
        kept += kept_activations(config, [layer], device) + head
    return kept


def recomputed_by_stage(
    config: TrainConfig, stage: StageContents, device: DeviceKind
) -> int:
    """Returns the bytes that recomputation needs at once in a stage's backward pass."""
    most = recomputed_activations(config, stage.layers, device)
    # Each MTP layer is recomputed by itself.
    for layer in stage.mtp_layer_numbers(config.model.num_layers):
        most = max(most, recomputed_activations(config, [layer], device))
    return most


def _kept_by_embedding(config: TrainConfig) -> int:
    """Returns 8 T of token ids, and T H / s of a mask with hidden dropout."""
    kept = _INT64 * tokens_of(config)
    if config.model.hidden_dropout:
        kept += own_tokens_of(config) * config.model.hidden_size
    return kept


def _kept_by_embedding_norm(config: TrainConfig, device: DeviceKind) -> int:
    """Returns (w H + z) T / s of a norm of word embeddings."""
    if not config.model.embedding_norm:
        return 0
    width = width_of(config)
    per_token = width * config.model.hidden_size + _norm_statistics(config, device, width)
    return per_token * own_tokens_of(config)


def _kept_by_mtp_projection(config: TrainConfig, device: DeviceKind) -> int:
    """Returns what joining an embedding to the hidden state keeps in an MTP layer.

    Those are w T H / s of one input before its norm, 2 w T H / s of both after theirs,
    the statistics of both norms, and w T H / s of the other input, unless the head keeps
    the same tensor, which it does where it does not gather its input.
    """
    own = own_tokens_of(config)
    hidden_states = 3
    if own < tokens_of(config):
        hidden_states = 4
    width = width_of(config)
    per_token = hidden_states * width * config.model.hidden_size
    return (per_token + 2 * _norm_statistics(config, device, width)) * own


def _kept_by_head(config: TrainConfig, device: DeviceKind) -> int:
    """Returns what the last norm, the output head and the loss keep.

    Those are (h H + z) T / s of the norm's input and statistics, w T H of its output
    (gathered with sequence parallelism), and (w V + 4) T with V the local vocabulary: the
    logits, which become their gradient, and one fp32 number per token.
    """
    tokens = tokens_of(config)
    hidden = width_of(config) * config.model.hidden_size
    wide = hidden_width_of(config)
    statistics = _norm_statistics(config, device, wide)
    norm = (wide * config.model.hidden_size + statistics) * own_tokens_of(config)
    logits = (width_of(config) * local_vocabulary(config) + _FP32) * tokens
    return norm + hidden * tokens + logits


def working_head(config: TrainConfig, device: DeviceKind) -> int:
    """Returns the bytes that the loss needs for a moment.

    Those are fp32 logits, of as many tokens as are processed at once.
    """
    vocabulary = local_vocabulary(config)
    tokens = min(tokens_of(config), rows_at_once(device.type, vocabulary))
    return _FP32 * tokens * vocabulary

"""Defines the shape of a GPT-class model.

Owns: architecture only. Must not know: parallelism, data, devices.
"""

from math import sqrt
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from megatron_ray.config.architecture.latent import (
    LatentAttentionConfig,
    MultiTokenPredictionConfig,
)
from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.architecture.mup import MuPConfig
from megatron_ray.config.architecture.positions import RopeScaling
from megatron_ray.config.base import Config
from megatron_ray.config.errors.messages import short_value, suggestion
from megatron_ray.config.presets.presets import PRESETS

_NESTED_FIELDS = ("moe", "mla", "mtp", "mup")
"""Groups of fields that a preset fills field by field, instead of as a whole."""


def _required_without_preset(schema: dict[str, Any]) -> None:
    """Corrects the JSON schema: a preset stands for the required fields."""
    required = schema.pop("required")
    schema["anyOf"] = [{"required": ["preset"]}, {"required": required}]


class ModelConfig(Config):
    """A decoder-only transformer.

    `{preset: NAME}` fills every field. Fields given beside it take precedence, as do
    single fields inside `moe`, `mla`, `mtp` and `mup`.
    """

    model_config = ConfigDict(json_schema_extra=_required_without_preset)

    preset: str | None = None
    """Name of a published model shape, or of a small one for tests, that fills the
    fields not given here. Default: none, so all required fields must be given."""
    num_layers: int = Field(ge=1, le=1024)
    """Number of transformer blocks, without multi-token prediction layers."""
    hidden_size: int = Field(ge=8, le=65536)
    """Width of the residual stream."""
    num_attention_heads: int = Field(ge=1, le=1024)
    """Number of query heads."""
    num_query_groups: int | None = Field(default=None, ge=1, le=1024)
    """Number of key/value heads (grouped-query attention). Must divide
    num_attention_heads. Default: num_attention_heads."""
    head_dim: int | None = Field(default=None, ge=2, le=1024)
    """Width of one head. Default: hidden_size / num_attention_heads; with latent
    attention the width of its queries and keys."""
    ffn_hidden_size: int | None = Field(default=None, ge=8, le=1 << 20)
    """Width inside the MLP. Default: 4 x hidden_size."""
    vocab_size: int | None = Field(default=None, ge=2, le=1 << 22)
    """Number of tokens in the vocabulary, without padding. Default: the tokenizer's
    size."""
    max_sequence_length: int = Field(default=2048, ge=1, le=1 << 24)
    """Longest sequence that the model is meant for, in tokens. It is the size of the
    table of learned positions; with rotary positions training may use longer
    sequences."""
    activation: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh"] = "swiglu"
    """Activation function of the MLP. `swiglu` (Llama) and `geglu_tanh` (Gemma) are
    gated, `gelu_tanh` is the tanh approximation of GPT-2."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization before attention, before the MLP and before the output head."""
    norm_eps: float = Field(default=1e-5, gt=0, le=0.1)
    """Added to the variance inside the normalization. The norms of latents have
    mla.norm_eps instead."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight, and weights start at zero (Gemma)."""
    qk_norm: bool = False
    """Normalizes each head's query and key before they are rotated (Qwen3)."""
    peri_norm: bool = False
    """Normalizes the outputs of attention and MLP too, before they are added to the residual
    stream (Peri-LN)."""
    embedding_norm: bool = False
    """Normalizes word embeddings, before `embedding_scale` and before positions are
    added."""
    attention_scale: float | None = Field(default=None, gt=0)
    """Factor on the products of queries and keys (Granite's attention_multiplier; 1 / head
    width in muP). Default: 1 / sqrt(head width)."""
    position_embedding: Literal["rope", "learned", "none"] = "rope"
    """`rope` for rotary positions, `learned` for a trained table of positions (GPT-2),
    `none` for no positions."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary frequencies. Larger values suit longer sequences."""
    rope_scaling: RopeScaling | None = None
    """Scales the rotary frequencies of a model trained on shorter sequences. Default:
    no scaling."""
    sliding_window: int | None = Field(default=None, ge=1, le=1 << 24)
    """Number of tokens that a token attends to, itself included (Mistral). Default: all
    tokens before it."""
    full_attention_every: int | None = Field(default=None, ge=1, le=1024)
    """With a sliding window: every n-th layer (n, 2n ... counted from 1) attends to all
    tokens. Default: the window applies to every layer."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability in training, after the embedding and on the outputs of
    attention and MLP."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of attention weights in training. Above 0 the full matrix of
    scores is computed instead of fused attention, which needs more memory."""
    linear_bias: bool = False
    """Adds a bias to every linear layer of the blocks (GPT-2 has them, Llama not). The
    three fields below add biases to a part of these layers."""
    qkv_bias: bool = False
    """Adds a bias to the query, key and value projections (Qwen2); with latent attention
    to the projections from the hidden states to the latents and to the rotated part of
    the key (DeepSeek's attention_bias)."""
    attention_output_bias: bool = False
    """Adds a bias to attention's output projection. Together with qkv_bias it is the
    attention_bias of Hugging Face's config.json."""
    mlp_bias: bool = False
    """Adds a bias to every projection of the MLP and of a shared expert. The experts
    that tokens are routed to have none."""
    tie_embeddings: bool = False
    """Uses the word embedding as the output head too."""
    embedding_scale: float = Field(default=1.0, gt=0)
    """Factor on word embeddings (Gemma: the square root of hidden_size)."""
    residual_scale: float = Field(default=1.0, gt=0)
    """Factor on the outputs of attention and MLP before they are added to the residual
    stream (Granite's residual_multiplier)."""
    logit_scale: float = Field(default=1.0, gt=0)
    """Factor on the logits (the inverse of Granite's logits_scaling)."""
    init_std: float = Field(default=0.02, gt=0, le=1)
    """Standard deviation of the initial weights; output projections of attention and
    MLP use init_std / sqrt(2 x num_layers). `mup` scales it for wider models."""
    vocab_multiple: int = Field(default=128, ge=1, le=65536)
    """The embedding is padded to a multiple of vocab_multiple x tp rows. The added rows
    are zero and are not part of checkpoints."""
    moe: MoEConfig | None = None
    """Mixture of experts instead of the MLP of some or all layers. Default: none."""
    mla: LatentAttentionConfig | None = None
    """Multi-head latent attention instead of grouped-query attention. Default: none."""
    mtp: MultiTokenPredictionConfig | None = None
    """Multi-token prediction layers behind the last block. Default: none."""
    mup: MuPConfig | None = None
    """Maximal update parametrization: numbers of a small base model fit this one. Default:
    none."""
    spec: Literal["local", "transformer_engine"] = "local"
    """Whose kernels compute the layers: the project's own, for CPUs and GPUs, or those of
    NVIDIA's Transformer Engine, for GPUs on which it is installed (extra `te`). Weights and
    checkpoints are the same."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        name = values["preset"]
        if name not in PRESETS:
            raise _unknown_preset(name)
        preset = PRESETS[name]
        merged = {**preset, **values}
        # A group such as `moe` is merged too, so that changing one of its fields does not
        # require the others. Null removes the whole group.
        for group in _NESTED_FIELDS:
            defaults = preset.get(group)
            overrides = values.get(group)
            if isinstance(defaults, dict) and isinstance(overrides, dict):
                merged[group] = {**defaults, **overrides}
        return merged

    @model_validator(mode="after")
    def _fill_derived(self) -> "ModelConfig":
        derived: dict[str, Any] = {
            "num_query_groups": self.kv_heads,
            "head_dim": self.head_width,
            "ffn_hidden_size": self.ffn_width,
        }
        if self.moe is not None and self.moe.ffn_hidden_size is None:
            derived["moe"] = self.moe.model_copy(
                update={"ffn_hidden_size": derived["ffn_hidden_size"]}
            )
        # The class is frozen, but this validator is part of its construction.
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        return self

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of one head's query and key, resolved."""
        if self.head_dim is not None:
            return self.head_dim
        if self.mla is not None:
            return self.mla.qk_head_dim
        return self.hidden_size // self.num_attention_heads

    @property
    def score_scale(self) -> float:
        """Factor on the products of queries and keys, resolved."""
        return self.attention_scale or 1 / sqrt(self.head_width)

    @property
    def score_factor(self) -> float:
        """Factor on the products of queries and keys besides 1 / sqrt(head width)."""
        if self.attention_scale is None:
            return 1.0
        return self.attention_scale * sqrt(self.head_width)

    @property
    def value_width(self) -> int:
        """Width of one head's value."""
        if self.mla is not None:
            return self.mla.v_head_dim
        return self.head_width

    @property
    def rotated_width(self) -> int:
        """Width of the part of a head's query and key that is rotated."""
        if self.mla is not None:
            return self.mla.qk_rope_head_dim
        return self.head_width

    @property
    def width_ratio(self) -> float:
        """Width as a multiple of muP's base model; 1 without muP."""
        if self.mup is None:
            return 1.0
        return self.hidden_size / self.mup.base_hidden_size

    @property
    def depth_ratio(self) -> float:
        """Layers as a multiple of CompleteP's base model; 1 without CompleteP."""
        if self.mup is None or self.mup.base_num_layers is None:
            return 1.0
        return self.num_layers / self.mup.base_num_layers

    @property
    def residual_factor(self) -> float:
        """Factor on what attention and MLP add to the residual stream."""
        if self.mup is None:
            return self.residual_scale
        factor: float = self.depth_ratio**-self.mup.depth_alpha
        return self.residual_scale * factor

    @property
    def logit_factor(self) -> float:
        """Factor on the logits."""
        return self.logit_scale / self.width_ratio

    @property
    def num_mtp_layers(self) -> int:
        """Number of multi-token prediction layers."""
        if self.mtp is None:
            return 0
        return self.mtp.num_layers

    @property
    def ffn_width(self) -> int:
        """Width inside the MLP, resolved."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its activation by a second projection."""
        return self.activation in ("swiglu", "geglu_tanh")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""
        return self.linear_bias or self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.linear_bias or self.attention_output_bias

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the projections of the MLP have a bias."""
        return self.linear_bias or self.mlp_bias

    @property
    def has_plain_mlp(self) -> bool:
        """Whether a layer has an MLP, or a shared expert, besides routed experts."""
        if self.moe is None or self.moe.shared_expert_ffn_hidden_size is not None:
            return True
        return not all(self.moe.on_layer(layer) for layer in range(self.num_layers))

    def window_on(self, layer: int) -> int | None:
        """Returns the sliding window of a layer (counted from 0), or None for none."""
        every = self.full_attention_every
        if every is not None and (layer + 1) % every == 0:
            return None
        return self.sliding_window

    def experts_on(self, layer: int) -> MoEConfig | None:
        """Returns the mixture of experts of a layer, or None where it has a plain MLP.

        Multi-token prediction layers have the numbers from num_layers on. They have
        experts in every model that has any.
        """
        if self.moe is None:
            return None
        if layer >= self.num_layers or self.moe.on_layer(layer):
            return self.moe
        return None

    @property
    def aux_losses(self) -> dict[str, float]:
        """Auxiliary losses by Megatron's name, each with its total coefficient.

        Dividing the summed, weighted loss by the total coefficient gives the mean over
        layers before weighting, which is what is reported.
        """
        coefficients = dict[str, float]()
        moe = self.moe
        if moe is not None:
            moe_layers = 0
            for layer in range(self.num_layers + self.num_mtp_layers):
                if self.experts_on(layer) is not None:
                    moe_layers += 1
            # Each layer adds its loss with the coefficient, hence the number of layers.
            if moe_layers and moe.aux_loss_coeff:
                coefficients[moe.balancing_loss] = moe.aux_loss_coeff * moe_layers
            if moe_layers and moe.z_loss_coeff:
                coefficients["z_loss"] = moe.z_loss_coeff * moe_layers
        if self.mtp is not None and self.mtp.weight:
            for depth in range(self.mtp.num_layers):
                coefficients[f"mtp_{depth + 1}_loss"] = self.mtp.weight
        return coefficients

    @property
    def expert_width(self) -> int:
        """Width inside an expert, resolved."""
        if self.moe is not None and self.moe.ffn_hidden_size is not None:
            return self.moe.ffn_hidden_size
        return self.ffn_width

    @property
    def vocabulary(self) -> int:
        """Vocabulary size; raises ValueError while it depends on the tokenizer."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known before the tokenizer is")
        return self.vocab_size


def _unknown_preset(name: str) -> ValidationError:
    """Returns the error of the field `preset`, which the whole model depends on."""
    hint = suggestion(name, PRESETS) or f"known: {', '.join(sorted(PRESETS))}"
    message = f"unknown preset {short_value(name)}; {hint}"
    # A message template: braces in the name are no placeholders.
    error = PydanticCustomError("unknown_preset", "{message}", {"message": message})
    details = InitErrorDetails(type=error, loc=("preset",), input=name)
    return ValidationError.from_exception_data("ModelConfig", [details])

"""Shape of a GPT-class model.

Owns: architecture only. Must not know: parallelism, data, devices.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_ray.config.base import Config
from megatron_ray.config.latent import LatentAttentionConfig, MultiTokenPredictionConfig
from megatron_ray.config.moe import MoEConfig
from megatron_ray.config.positions import RopeScaling
from megatron_ray.config.presets.presets import PRESETS

_PARTS = ("moe", "mla", "mtp")
"""Parts of a shape whose fields a preset fills one by one."""


def _both(filled: object, given: object) -> bool:
    return isinstance(filled, dict) and isinstance(given, dict)


class ModelConfig(Config):
    """A decoder-only transformer.

    `{preset: NAME}` fills every field; fields given beside it win, those of `moe`,
    `mla` and `mtp` too.
    """

    preset: str | None = None
    """Name of a published or test shape that filled the fields not given here."""
    num_layers: int = Field(ge=1, le=1024)
    """Transformer blocks."""
    hidden_size: int = Field(ge=8, le=65536)
    """Width of the residual stream."""
    num_attention_heads: int = Field(ge=1, le=1024)
    """Query heads."""
    num_query_groups: int | None = Field(default=None, ge=1, le=1024)
    """Key/value heads (grouped-query attention); as many as query heads when not
    given."""
    head_dim: int | None = Field(default=None, ge=2, le=1024)
    """Width of one head; when not given, hidden_size / num_attention_heads, under
    latent attention that of its queries and keys."""
    ffn_hidden_size: int | None = Field(default=None, ge=8, le=1 << 20)
    """Width inside the MLP; 4 x hidden_size when not given."""
    vocab_size: int | None = Field(default=None, ge=2, le=1 << 22)
    """Rows of the embedding that mean something; the tokenizer's size when not
    given."""
    max_sequence_length: int = Field(default=2048, ge=1, le=1 << 24)
    """Longest sequence the model is meant for; the size of the table of learned
    positions."""
    activation: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh"] = "swiglu"
    """MLP non-linearity; `swiglu` and `geglu_tanh` (Gemma) gate, `gelu_tanh` is GPT-2's
    approximation."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and at the end."""
    norm_eps: float = Field(default=1e-5, gt=0, le=0.1)
    """Added to the variance inside the normalisation."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight (Gemma): weights start at zero."""
    qk_norm: bool = False
    """Normalises each head's query and key before they are rotated (Qwen3)."""
    position_embedding: Literal["rope", "learned", "none"] = "rope"
    """Rotary positions, a table of learned ones, or none."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretches the rotary frequencies; as they are when not given."""
    sliding_window: int | None = Field(default=None, ge=1, le=1 << 24)
    """A token sees itself and the tokens before it, this many in all (Mistral); all of
    them when not given."""
    full_attention_every: int | None = Field(default=None, ge=1, le=1024)
    """With a sliding window: layers n, 2n ... counted from 1 see everything; no layer
    does when not given."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations set to zero in training: after the embedding, and of what
    attention and MLP add to the residual stream."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention probabilities set to zero in training. Above 0 the scores are
    made in full: fused attention cannot drop from a stream of its own."""
    linear_bias: bool = False
    """Adds a bias to every linear layer of the blocks (GPT-2 does, Llama does not)."""
    qkv_bias: bool = False
    """Adds a bias to the projections to queries, keys and values only (Qwen2)."""
    tie_embeddings: bool = False
    """Uses the word embedding as the output head too."""
    embedding_scale: float = Field(default=1.0, gt=0)
    """Word embeddings are multiplied by it (Gemma: the square root of hidden_size)."""
    init_std: float = Field(default=0.02, gt=0, le=1)
    """Standard deviation of the initial weights; layers that write to the residual
    stream use init_std / sqrt(2 x layers)."""
    vocab_multiple: int = Field(default=128, ge=1, le=65536)
    """The embedding is padded to a multiple of this times tp; padding rows are zero and
    never saved."""
    moe: MoEConfig | None = None
    """Mixture of experts in the place of the MLP of some or all layers; none when not
    given."""
    mla: LatentAttentionConfig | None = None
    """Latent attention in the place of grouped-query attention; none when not given."""
    mtp: MultiTokenPredictionConfig | None = None
    """Layers that predict further tokens; none when not given."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("preset"), str):
            return given
        name = given["preset"]
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}"
            )
        preset = PRESETS[name]
        parts = {
            part: {**preset[part], **value}
            for part, value in given.items()
            if part in _PARTS and _both(preset.get(part), value)
        }
        return {**preset, **given, **parts}

    @model_validator(mode="after")
    def _fill_derived(self) -> "ModelConfig":
        derived: dict[str, Any] = {
            "num_query_groups": self.num_query_groups or self.num_attention_heads,
            "head_dim": self.head_width,
            "ffn_hidden_size": self.ffn_hidden_size or 4 * self.hidden_size,
        }
        if self.moe is not None and self.moe.ffn_hidden_size is None:
            derived["moe"] = self.moe.model_copy(
                update={"ffn_hidden_size": derived["ffn_hidden_size"]}
            )
        for name, value in derived.items():
            object.__setattr__(
                self, name, value
            )  # the instance is frozen for everybody else
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of one head, resolved."""
        if self.head_dim is None and self.mla is not None:
            return self.mla.qk_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def value_width(self) -> int:
        """Width of one head's value."""
        return self.mla.v_head_dim if self.mla is not None else self.head_width

    @property
    def rotated_width(self) -> int:
        """Part of a head's query and key that rotary positions rotate."""
        return self.mla.qk_rope_head_dim if self.mla is not None else self.head_width

    @property
    def num_mtp_layers(self) -> int:
        """Layers behind the last one, each of which predicts one token more."""
        return self.mtp.num_layers if self.mtp is not None else 0

    @property
    def ffn_width(self) -> int:
        """Width inside the MLP, resolved."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the MLP's activation multiplies by a second projection."""
        return self.activation in ("swiglu", "geglu_tanh")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return self.linear_bias or self.qkv_bias

    def window_on(self, layer: int) -> int | None:
        """Tokens that a token of a layer (counted from 0) sees, itself included; None
        for all.
        """
        every = self.full_attention_every
        return (
            None if every is not None and (layer + 1) % every == 0 else self.sliding_window
        )

    def experts_on(self, layer: int) -> MoEConfig | None:
        """The mixture of a layer; None where it has a plain MLP. Layers that predict
        further tokens (numbers from num_layers on) have experts in every model that
        has.
        """
        return (
            self.moe
            if self.moe is not None
            and (layer >= self.num_layers or self.moe.on_layer(layer))
            else None
        )

    @property
    def aux_losses(self) -> dict[str, float]:
        """What is trained on beside the loss, in Megatron-LM's words, and the weight of
        all its places together: such a sum over it is the mean over layers of what it
        was before its coefficient, as it is reported.
        """
        found = dict[str, float]()
        moe = self.moe
        if moe is not None:
            layers = sum(
                self.experts_on(layer) is not None
                for layer in range(self.num_layers + self.num_mtp_layers)
            )
            coefficients = {
                moe.balancing_loss: moe.aux_loss_coeff,
                "z_loss": moe.z_loss_coeff,
            }
            found |= {
                name: coefficient * layers
                for name, coefficient in coefficients.items()
                if coefficient and layers
            }
        if self.mtp is not None and self.mtp.weight:
            found |= {
                f"mtp_{depth + 1}_loss": self.mtp.weight
                for depth in range(self.mtp.num_layers)
            }
        return found

    @property
    def expert_width(self) -> int:
        """Width inside an expert, resolved."""
        return (
            self.moe.ffn_hidden_size if self.moe is not None else None
        ) or self.ffn_width

    @property
    def vocabulary(self) -> int:
        """Vocabulary size; raises ValueError while the tokenizer has not told it yet."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known before the tokenizer is")
        return self.vocab_size

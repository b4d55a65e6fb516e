"""Defines what is watched while a model trains.

Owns: which callbacks a run has, and their options. Must not know: how a number is computed.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from megatron_ray.config.base import Config
from megatron_ray.config.callbacks.installed import callback_kind
from megatron_ray.config.optimizer import Pattern

Every = Annotated[int, Field(ge=1, le=1 << 40)]
Metric = Literal["grad_norm", "weight_norm", "update_norm", "update_ratio", "moment_norms"]
ALL_METRICS: tuple[Metric, ...] = (
    "grad_norm",
    "weight_norm",
    "update_norm",
    "update_ratio",
    "moment_norms",
)
CallbackName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]


class OptimizerMonitorConfig(Config):
    """Norms of gradients, weights, updates and moments of the parameters that are trained.

    Reported as `monitors/METRIC/SCOPE`, such as `monitors/grad_norm/layers.3`. Norms are
    L2 norms over all elements of a scope, whatever the layout.
    """

    every_steps: Every = 10
    """Steps between two measurements: those whose numbers are multiples of it."""
    by: Literal["model", "group", "layer", "parameter"] = "layer"
    """Scopes: all parameters together (`model`), by the last of `optimizer.groups` that
    has them (`groups.0`, ..., and `others`), by layer (`embedding`, `layers.0`, ...,
    `final_norm`, `head`), or each parameter by itself, by its name."""
    metrics: tuple[Metric, ...] = Field(default=ALL_METRICS, min_length=1)
    """What is measured: `grad_norm`, of the mean gradient before clipping; `weight_norm`,
    before the update; `update_norm`, of what the step adds to the weights;
    `update_ratio`, that over the weight norm; `moment_norms`, of each state of the
    optimizer, after the update, as `exp_avg_norm`, `exp_avg_sq_norm` and so on. Updates
    need a copy of the fp32 weights that a rank updates, for the length of an update.
    Default: all."""
    parameters: tuple[Pattern, ...] = Field(default=("*",), min_length=1, max_length=16)
    """Names of the parameters that are measured, as in `optimizer.freeze`. Default: all
    that are trained."""

    @property
    def compares_weights(self) -> bool:
        """Whether weights are copied before an update."""
        return not {"update_norm", "update_ratio"}.isdisjoint(self.metrics)


class ActivationMonitorConfig(Config):
    """The size of hidden states after each layer, and the largest attention logit.

    Reported as `monitors/activation_rms/SCOPE` (root mean square over all tokens of the
    step), `monitors/activation_max/SCOPE` (largest absolute value) and
    `monitors/attention_logit_max/SCOPE`. Scopes are `embedding` (what goes into the first
    layer), `layers.0`, ..., `mtp.0`, ... and `final_norm`.
    """

    every_steps: Every = 50
    """Steps between two measurements: those whose numbers are multiples of it."""
    attention_logits: bool = True
    """Whether the largest attention logit of each layer is computed: query times key over
    the root of the head's width, among tokens that see each other. It repeats the product
    of queries and keys, in fp32."""


class UnigramMonitorConfig(Config):
    """The loss beside that of a model that knows only how frequent each token is.

    All labels that count in the loss are counted from the first step on, or from where
    this is first set; the counts are part of checkpoints. Reported as
    `monitors/unigram_entropy`, the entropy of their distribution so far in nats,
    `monitors/unigram_normalized_loss`, the step's loss minus it, which can be compared
    between vocabularies, and `monitors/unigram_tokens`, the number of labels so far: as
    long as these are few beside the vocabulary, the entropy is too low.
    """

    every_steps: Every = 10
    """Steps between two reports: those whose numbers are multiples of it. Every step is
    counted."""


class InstalledCallbackConfig(Config):
    """A callback of an installed package."""

    every_steps: Every = 10
    """Steps between two reports: those whose numbers are multiples of it."""
    options: dict[str, Any] = Field(default_factory=dict, max_length=64)
    """Its own options. Default: none."""


class CallbacksConfig(Config):
    """What is watched while the model trains. Default: nothing, which costs nothing."""

    optimizer: OptimizerMonitorConfig | None = None
    """Norms of gradients, weights, updates and moments; `{}` has all defaults. Default:
    not measured."""
    activations: ActivationMonitorConfig | None = None
    """Sizes of hidden states and attention logits; `{}` has all defaults. Default: not
    measured."""
    unigram: UnigramMonitorConfig | None = None
    """The loss beside that of token frequencies; `{}` has all defaults. Default: not
    measured."""
    installed: dict[CallbackName, InstalledCallbackConfig] = Field(
        default_factory=dict, max_length=16
    )
    """Callbacks of installed packages by the names of their entry points of group
    `megatron_ray.callbacks`; their numbers are `monitors/NAME/...`. Default: none."""

    @field_validator("installed")
    @classmethod
    def _check_installed(
        cls, installed: dict[str, InstalledCallbackConfig]
    ) -> dict[str, InstalledCallbackConfig]:
        for name, callback in installed.items():
            kind = callback_kind(name)
            try:
                kind.parse(callback.options)
            except ValueError as error:
                raise ValueError(f"callback {name!r} {error}") from error
        return installed

    @property
    def intervals(self) -> dict[str, int]:
        """Steps between the reports of each callback, by its field."""
        intervals = {}
        for name in ("optimizer", "activations", "unigram"):
            monitor = getattr(self, name)
            if monitor is not None:
                intervals[name] = monitor.every_steps
        for name, callback in self.installed.items():
            intervals[f"installed/{name}"] = callback.every_steps
        return intervals

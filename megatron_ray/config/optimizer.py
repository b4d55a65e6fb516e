"""Defines the optimizer.

Must not know: how optimizer state is sharded.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megatron_ray.config.base import Config
from megatron_ray.config.optimizer_kinds import optimizer_kind
from megatron_ray.config.schedules.rates import ScheduleConfig

OPTIONAL_NUMBERS = (
    "beta1",
    "beta2",
    "eps",
    "momentum",
    "nesterov",
    "nu",
    "aggregated",
    "decay",
    "adamw_lr_scale",
    "muon",
)
"""Fields of which each optimizer uses some."""

Pattern = Annotated[str, Field(min_length=1, max_length=256)]
"""Name of a parameter in which `*` matches any characters."""


class ParameterGroupConfig(Config):
    """Numbers of the optimizer for some parameters.

    What a group leaves out stays as in `optimizer`. Where several groups match a
    parameter, the last one that sets a number determines it.
    """

    parameters: tuple[Pattern, ...] = Field(min_length=1, max_length=16)
    """Names of parameters, as in `optimizer.freeze`."""
    weight_decay: float | None = Field(default=None, ge=0, le=10)
    """Weight decay of these parameters, norms and biases among them included. 0 spares
    them. Default: optimizer.weight_decay, and none for norms and biases."""
    lr_scale: float | None = Field(default=None, gt=0, le=10000)
    """Factor on the learning rate of every step, warm-up and min_lr included, and thus on
    what weight decay subtracts; reports show the rate without it. To train some
    parameters not at all use `optimizer.freeze`. Default: 1."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the first moment. Default: optimizer.beta1."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the second moment. Default: optimizer.beta2."""
    eps: float | None = Field(default=None, gt=0, le=1)
    """Added to the square root of the second moment. Default: optimizer.eps."""


class FirstMomentConfig(Config):
    """One of several first moments of an aggregated optimizer."""

    beta: float = Field(ge=0, lt=1)
    """Its decay rate."""
    weight: float = Field(ge=0, le=1)
    """Its share of the update; what the weights lack to 1 is the gradient's."""


class WeightDecayScheduleConfig(Config):
    """Weight decay over the steps of a run, from `optimizer.weight_decay` to `end`."""

    kind: Literal["linear", "cosine"] = "cosine"
    """A line, or half a cosine, from the first step to the last."""
    end: float = Field(ge=0, le=10)
    """Weight decay of the last step."""


class SwitchConfig(Config):
    """Other numbers of the optimizer, or another schedule, from a step on.

    What a switch leaves out stays as it is. What one of the `groups` sets holds for its
    parameters before and after it.
    """

    step: int = Field(ge=2, le=1 << 40)
    """First step with the new numbers, counted from 1."""
    lr: float | None = Field(default=None, gt=0, le=100)
    """Peak learning rate. The schedule goes on, with this peak in the place of
    `optimizer.lr`."""
    schedule: ScheduleConfig | None = None
    """Another schedule. Its steps count from the switch, so that its warm-up begins there;
    its decay ends with the run unless it is given an end, and shares are of the steps
    that are left."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the second moment."""
    eps: float | None = Field(default=None, gt=0, le=1)
    """Added to the square root of the second moment."""
    momentum: float | None = Field(default=None, gt=0, lt=1)
    """Momentum of `sgd`, if it had one before."""
    nu: float | None = Field(default=None, ge=0, le=1)
    """Share of the first moment in an update."""
    weight_decay: float | None = Field(default=None, ge=0, le=10)
    """Weight decay."""
    clip_grad_norm: float | None = Field(default=None, ge=0)
    """Largest norm of gradients; 0 disables clipping."""

    @model_validator(mode="after")
    def _check_change(self) -> Self:
        if not self.numbers and self.schedule is None:
            raise ValueError(
                f"the switch of step {self.step} changes nothing; give it a number or a "
                "schedule, or leave it out"
            )
        return self

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers that it sets."""
        numbers: dict[str, float] = self.model_dump(
            exclude={"step", "schedule"}, exclude_none=True
        )
        return numbers


class MuonConfig(Config):
    """How Muon (Jordan et al. 2024) orthogonalizes the momentum of a matrix.

    Matrices are the weights of linear layers: those of attention, of MLPs, of each expert,
    of routers, and of the projections of multi-token prediction. Embeddings, the output
    head, norms and biases are updated by AdamW. A matrix is always a whole one, whatever
    the layout: tensor-parallel shards and ZeRO's ranges are put together for its update.
    """

    steps: int = Field(default=5, ge=1, le=100)
    """Newton-Schulz iterations."""
    coefficients: Literal["quintic", "simple"] = "quintic"
    """Polynomials of the iterations: `simple` has the same one in all of them, 3.4445 x -
    4.7750 x^3 + 2.0315 x^5; `quintic` has five, which bring singular values closer to 1
    and begin anew after the fifth iteration."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the iterations' products; `bf16` is faster where the device multiplies it
    faster. Momentum and weights are fp32 either way."""
    scale: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Factor on the orthogonal matrix by its outputs and inputs: root of the larger one
    (`spectral`), root of outputs / inputs (`unit_rms_norm`), or the same but at least 1
    (`shape_scaling`)."""
    scale_factor: float | None = Field(default=None, gt=0, le=1000)
    """Another factor beside it. Default: 0.2 with `spectral`, with which updates are as
    large as AdamW's, so that its learning rates fit (Liu et al. 2025); else 1."""
    split_qkv: bool = True
    """Whether queries, keys and values are a matrix each, or one together."""
    split_gate_up: bool = True
    """Whether gate and up of a gated MLP are a matrix each, or one together; the same for
    each expert."""

    def factor(self, outputs: int, inputs: int) -> float:
        """Returns the factor on an orthogonalized matrix of this shape."""
        if self.scale == "spectral":
            return sqrt(max(outputs, inputs)) * (self.scale_factor or 0.2)
        ratio = outputs / inputs
        if self.scale == "shape_scaling":
            ratio = max(1.0, ratio)
        return sqrt(ratio) * (self.scale_factor or 1.0)


class OptimizerConfig(Config):
    """The optimizer, by name.

    One-dimensional parameters (norms and biases) are not decayed, unless one of the
    `groups` sets their weight decay. Fields without a default here have one that depends
    on the name, and are refused for optimizers that do not use them.
    """

    name: str = Field(default="adamw", max_length=64)
    """`adamw`, `decoupled_adamw` (its decay follows the shape of the schedule), `sgd`,
    `adopt` (Taniguchi et al. 2024), `qhadamw` (Ma and Yarats 2018), `qhadopt`,
    `aggmo_adamw` and `aggmo_adopt` (several first moments, after Lucas et al. 2018),
    `muon` (Jordan et al. 2024; AdamW for what is no matrix), or one of an installed
    package."""
    lr: float = Field(gt=0, le=100)
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the first moment. Default: 0.9, of `qhadopt` 0.999."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the second moment. Default: 0.95, of ADOPT's kind 0.9999."""
    eps: float | None = Field(default=None, gt=0, le=1)
    """Added to the square root of the second moment; of ADOPT's kind its least value.
    Default: 1e-8, of ADOPT's kind 1e-6."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Factor on the previous update of `sgd`, and on that of matrices of `muon`; without
    it they have no state. Default: 0.9, of `muon` 0.95."""
    nesterov: bool | None = None
    """Whether `momentum` looks ahead (Nesterov). Default: false, of `muon` true."""
    nu: float | None = Field(default=None, ge=0, le=1)
    """Share of the first moment in an update of `qhadamw` and `qhadopt`; the rest is the
    gradient's. Default: 0.7, of `qhadopt` 0.9."""
    aggregated: tuple[FirstMomentConfig, ...] | None = Field(
        default=None, min_length=1, max_length=8
    )
    """First moments of `aggmo_adamw` and `aggmo_adopt`, each with a decay rate and its
    share of the update. Default: `[{beta: 0.9, weight: 0.7}]`, of `aggmo_adopt`
    `[{beta: 0.999, weight: 0.9}]`."""
    decay: Literal["lr", "schedule", "l2"] | None = None
    """How weight_decay acts: each step subtracts lr x weight_decay x weight (`lr`), or
    lr / peak lr x weight_decay x weight (`schedule`), or the gradient gains weight_decay x
    weight (`l2`). Default: `lr` for `adamw` and `muon`, `l2` for `sgd` and ADOPT's kind,
    else `schedule`."""
    adamw_lr_scale: float | None = Field(default=None, gt=0, le=10000)
    """Factor on the learning rate of what `muon` updates by AdamW; one of the `groups`
    takes its place. Default: 1."""
    muon: MuonConfig | None = None
    """How `muon` updates matrices. Default: as its fields."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Weight decay, see `decay`. Default: no decay."""
    weight_decay_schedule: WeightDecayScheduleConfig | None = None
    """Weight decay over the steps, from `weight_decay` in the beginning to another one.
    Parameters whose weight decay one of the `groups` sets keep that. Default: it is
    constant."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm when theirs is larger; 0 disables
    clipping, and the norm is still reported."""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which first moments and momentum are kept. `bf16` halves their memory and
    their part of checkpoints; they are rounded after each update, which is computed in
    fp32. Without torch's fused kernel of AdamW."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """The same for second moments."""
    store_param_remainders: bool = False
    """Whether 16 bits are kept beside each bf16 weight instead of its fp32 value, which both
    together are, bit for bit: half the memory, and the same checkpoints. Weights exactly
    between two bf16 numbers, about 1 in 100,000, are rounded away from zero instead of to
    the even one. For precision=bf16, not with zero=3."""
    offload: bool = False
    """Whether the optimizer's state and the fp32 values of short weights are kept in host
    memory. Updates bring them to the device and back part by part, so that the weights are
    the same to the bit; the step takes as long longer as the copies take."""
    freeze: tuple[Pattern, ...] = Field(default=(), max_length=64)
    """Names of parameters that are not trained, where `*` matches any characters, such
    as `embedding.weight` or `layers.0.*`. They have no gradients and no optimizer
    state. Default: all parameters are trained."""
    groups: tuple[ParameterGroupConfig, ...] = Field(default=(), max_length=16)
    """Other numbers for parameters by name, such as no decay of embeddings:
    `[{parameters: ["embedding.*", "head.*"], weight_decay: 0}]`. Default: all
    parameters have the numbers above."""
    switches: tuple[SwitchConfig, ...] = Field(default=(), max_length=16)
    """Other numbers, or another schedule, from given steps on, in the order of their
    steps: `[{step: 1000, lr: 1e-4, schedule: {kind: linear}}]`. Default: none."""

    @field_validator("switches")
    @classmethod
    def _check_switches(
        cls, switches: tuple[SwitchConfig, ...], info: ValidationInfo
    ) -> tuple[SwitchConfig, ...]:
        previous = 0
        for switch in switches:
            if switch.step <= previous:
                raise ValueError(
                    f"the switches have steps {previous} and {switch.step}; list them in "
                    "the order of their steps, each step once"
                )
            previous = switch.step
            _check_switch(switch, info.data)
        return switches

    @property
    def varying_numbers(self) -> frozenset[str]:
        """Names of the numbers that are not the same in all steps."""
        names = set[str]()
        for switch in self.switches:
            names.update(switch.numbers)
        if self.weight_decay_schedule is not None:
            names.add("weight_decay")
        return frozenset(names)

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in_numbers(cls, fields: Any, parse: ModelWrapValidatorHandler[Self]) -> Self:
        """Gives the fields that the optimizer uses its own defaults."""
        if not isinstance(fields, dict) or not isinstance(fields.get("name", ""), str):
            return parse(fields)
        filled = dict(fields)
        for name, value in optimizer_kind(fields.get("name", "adamw")).numbers.items():
            if filled.get(name) is None:
                filled[name] = value
        config = parse(filled)
        # As with other defaults, they count as not set.
        config.model_fields_set.difference_update(filled.keys() - fields.keys())
        return config

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        numbers = optimizer_kind(self.name).numbers
        for name in OPTIONAL_NUMBERS:
            if name not in numbers and getattr(self, name) is not None:
                raise ValueError(f"{self.name} does not use {name}; leave it out")
        shares = 0.0
        for moment in self.aggregated or ():
            shares += moment.weight
        # 1e-8: shares such as 0.7, 0.2 and 0.1.
        if shares > 1 + 1e-8:
            raise ValueError(
                f"the weights of aggregated add up to {shares:g}; make it at most 1"
            )
        return self


def _check_switch(switch: SwitchConfig, optimizer: Mapping[str, Any]) -> None:
    """Raises ValueError when a switch sets what the optimizer's fields exclude."""
    where = f"the switch of step {switch.step}"
    for name in switch.numbers:
        # A field that is wrong itself is missing; one that is not used has no value.
        if optimizer.get(name, 0.0) is None:
            raise ValueError(
                f"{where} sets {name}, which {optimizer.get('name')} does not use; leave it "
                "out"
            )
    if switch.momentum is not None and optimizer.get("momentum") == 0:
        raise ValueError(
            f"{where} sets momentum, of which there is no state with momentum=0; begin with "
            "a momentum above 0"
        )
    if switch.weight_decay is not None and optimizer.get("weight_decay_schedule"):
        raise ValueError(
            f"{where} sets weight_decay, which follows weight_decay_schedule; leave one of "
            "them out"
        )

"""Defines the bodies of the public API about plans.

Owns: their fields, which mirror the library's results, as a test compares. Must not know:
how anything is estimated.
"""

from typing import Any, Literal

from megatron_ray.config.problem import Problem
from service.api.models import Body


class PlanRank(Body):
    """Position of one rank."""

    rank: int
    """Number of the rank."""
    coordinates: dict[str, int]
    """Index of the rank along each parallel axis."""
    island: int
    """Ranks with the same number run on the same node."""


class PlanMemory(Body):
    """Memory of the most loaded rank, in bytes.

    Weights, gradients and optimizer state are exact; the rest is an estimate.
    """

    rank: int
    """The most loaded rank. Others may need as much."""
    parameters_bytes: int
    """Weights."""
    gradients_bytes: int
    """Gradients."""
    optimizer_bytes: int
    """Optimizer state."""
    offloaded_bytes: int
    """Optimizer state in host memory, which the sum leaves out."""
    gathered_bytes_estimate: int
    """Weights and gradients that ZeRO-3 gathers for a short time."""
    activations_bytes_estimate: int
    """Activations of all microbatches that are in progress at once."""
    total_bytes_estimate: int
    """Sum of all parts on the device."""
    vocab_size: int
    """Vocabulary size that the numbers are computed for."""


class PlanTraffic(Body):
    """Communication of the most loaded rank in one step, by axis and collective."""

    axis: str
    """tp, cp, pp, dp (replicas of dense parameters), ep, etp, edp (replicas of an
    expert), embedding, tokens (tp x cp), world (ranks that take a step together) or sync
    (the same place in every replica group)."""
    kind: str
    """Collective operation."""
    operations: int
    """Number of calls."""
    bytes: int
    """Bytes that the rank sends. Bytes that it receives are not counted."""


class PlanTime(Body):
    """Estimated time of one step on a device."""

    # The parts from products_s to update_s add up to step_s.
    step_s: float
    """Sum of all parts."""
    products_s: float
    """Matrix multiplications, including recomputed ones."""
    attention_s: float
    """Attention."""
    memory_s: float
    """Operations limited by memory bandwidth: norms, activations, losses."""
    communication_s: float
    """Exposed communication: the part that does not overlap with computation."""
    bubble_s: float
    """Time in which a pipeline rank waits for other ranks."""
    update_s: float
    """Optimizer, including its exposed communication."""
    tokens_per_s: float
    """Tokens per second, all ranks together."""
    mfu: float
    """Model FLOPs utilisation: the share of the devices' peak that the model uses."""
    model_flops: float
    """Floating-point operations of one step, all ranks together, as MFU counts them."""


class PlanSuggestion(Body):
    """A layout that fits."""

    changes: dict[str, Any]
    """Values to set in the spec, by the path of the field."""
    total_bytes_estimate: int
    """Memory of the most loaded rank."""
    time: PlanTime
    """Estimated time of one step."""


class Suggestions(Body):
    """The fastest layouts that fit, fastest first."""

    object: Literal["plan.suggestions"] = "plan.suggestions"
    """Kind of this object."""
    world_size: int
    """Number of ranks of every layout."""
    hardware: str
    """Device that the layouts are for."""
    data: list[PlanSuggestion]
    """The layouts, fastest first."""
    notes: list[str]
    """Assumptions, and what is missing for an estimate."""


class Plan(Body):
    """How a job would run. Nothing is started."""

    object: Literal["plan"] = "plan"
    """Kind of this object."""
    resolved_spec: dict[str, Any]
    """The spec with every default and derived value filled in."""
    world_size: int
    """Number of ranks."""
    ranks: list[PlanRank]
    """Position of every rank."""
    memory: PlanMemory | None
    """null while the vocabulary size is unknown."""
    communication: list[PlanTraffic] | None
    """null when it is unknown; `notes` has the reason."""
    checkpoint_bytes: int | None
    """Size of one checkpoint; null while the vocabulary size is unknown."""
    num_checkpoints: int
    """Number of checkpoints that the storage contains at once, at most."""
    bubble_share: float | None
    """Share of a step in which a pipeline rank waits for other ranks."""
    hardware: str | None
    """Device that `time` is estimated for."""
    time: PlanTime | None
    """null when it is unknown; `notes` has the reason."""
    fits: bool | None
    """Whether the job fits in the empty cluster, grown to its bound if it may grow; null
    while the cluster is unknown."""
    room: int | None
    """How many ranks of this job the empty cluster has room for, on today's nodes."""
    new_nodes: dict[str, int]
    """How many nodes the cluster must be given before the job fits, by their group."""
    problems: list[Problem]
    """Why the job cannot run now."""
    notes: list[str]
    """Assumptions, and what is missing for an estimate."""

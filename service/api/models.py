"""Bodies of the public API. Owns: their fields.

Must not know: tables, internal messages.
"""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from workers.protocol.states import DesiredState, JobState, StatusReason

Item = TypeVar("Item")


class Body(BaseModel):
    """Base: the string under a field is its description in /openapi.json."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="forbid")


class Page(Body, Generic[Item]):
    """One page of a list; the next one starts `after` last_id."""

    model_config = ConfigDict(
        use_attribute_docstrings=False
    )  # pydantic looks for the source of Page[...] where there is none

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class Progress(Body):
    """How far a job is."""

    step: int | None
    """Last step seen."""
    steps: int
    """Steps in the whole job."""
    loss: float | None
    """Nats per token."""
    tokens_per_s: float | None
    eta_s: float | None
    """Seconds to the last step at the current pace."""
    mfu: float | None
    val_loss: float | None
    """Last validation loss."""
    unigram_nats: float | None
    """What the validation tokens' own frequencies would score: the number to beat."""


class LastCheckpoint(Body):
    """Newest committed checkpoint."""

    step: int
    path: str
    committed_at: datetime


class JobSummary(Body):
    """A job without its specs."""

    object: Literal["job"] = "job"
    id: str
    name: str
    status: JobState
    """Observed state."""
    status_reason: StatusReason | None
    """Why it is in that state, from a closed set."""
    message: str
    """The same for people."""
    desired_state: DesiredState
    """What is wanted of its driver."""
    cluster: str
    priority: int
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    """When training first ran."""
    ended_at: datetime | None
    attempt: int
    failures: int
    """Attempts that failed, preemptions not counted."""
    preemptions: int
    progress: Progress
    problem: dict[str, Any] | None
    """Why it failed, as a problem document."""
    storage_path: str
    """Folder or URI of everything the job writes."""
    last_checkpoint: LastCheckpoint | None


class Job(JobSummary):
    """A request and its whole life."""

    spec: dict[str, Any]
    """As submitted."""
    resolved_spec: dict[str, Any]
    """With every default and derived value spelt out."""


class Event(Body):
    """One line of a job's history."""

    object: Literal["job.event"] = "job.event"
    id: str
    seq: int
    """Gap-free from 1, across attempts and restarts."""
    job_id: str
    attempt: int
    created_at: datetime
    level: str
    type: str
    """Types unknown to a client are to be ignored."""
    message: str
    data: dict[str, Any]
    ranks: list[int]
    actor: str
    """`user` or `system`."""


class Attempt(Body):
    """One rendezvous of one world."""

    object: Literal["attempt"] = "attempt"
    attempt: int
    state: str
    reason: str | None
    message: str
    world_size: int | None
    started_at: datetime | None
    ended_at: datetime | None


class Checkpoint(Body):
    """A committed checkpoint."""

    object: Literal["checkpoint"] = "checkpoint"
    step: int
    attempt: int
    path: str
    committed_at: datetime
    bytes: int | None
    loss: float | None


class Log(Body):
    """A piece of one rank's log."""

    object: Literal["log"] = "log"
    rank: int
    attempt: int
    offset: int
    next_offset: int
    """Where the next piece starts."""
    size: int
    """Bytes in the file now."""
    data: str


class PlanRank(Body):
    """One rank's place in the grid."""

    rank: int
    coordinates: dict[str, int]
    island: int
    """Ranks of one island share a node."""


class PlanMemory(Body):
    """Bytes on the fullest rank.

    Weights, gradients and optimizer state are counted to the byte; the rest is
    estimated.
    """

    rank: int
    """Which rank that is; others may be as full."""
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    gathered_bytes_estimate: int
    """Weights that ZeRO-3 gathers for a while."""
    activations_bytes_estimate: int
    """Peak of the microbatches under way, from tensor shapes."""
    total_bytes_estimate: int
    vocab_size: int
    """Vocabulary the numbers are for."""


class PlanTraffic(Body):
    """What the fullest rank sends in a step along one axis by one kind of collective."""

    axis: str
    """tp, cp, pp, dp (replicas of dense parameters), ep, etp, edp (replicas of an
    expert), embedding, tokens (tp x cp) or world."""
    kind: str
    operations: int
    bytes: int
    """Of the tensors that it hands over; what it receives is what others send."""


class PlanTime(Body):
    """Estimate of a step's time on a kind of device."""

    step_s: float
    products_s: float
    """Matrix products, recomputed ones included."""
    attention_s: float
    memory_s: float
    """What is bound by memory: norms, activations, losses."""
    communication_s: float
    """What is waited for."""
    bubble_s: float
    update_s: float
    """Optimizer, and what it waits for."""
    tokens_per_s: float
    mfu: float
    model_flops: float
    """Of a step over all ranks, as MFU counts them."""


class PlanSuggestion(Body):
    """A layout that fits, and what it comes to."""

    changes: dict[str, Any]
    """Fields of the spec by path."""
    total_bytes_estimate: int
    """On the fullest rank."""
    time: PlanTime


class Suggestions(Body):
    """The quickest layouts that fit, quickest first."""

    object: Literal["plan.suggestions"] = "plan.suggestions"
    world_size: int
    hardware: str
    data: list[PlanSuggestion]
    notes: list[str]
    """What had to be assumed."""


class FieldError(Body):
    """One wrong field."""

    pointer: str
    code: str
    detail: str


class Plan(Body):
    """How a job would run; nothing was started."""

    object: Literal["plan"] = "plan"
    resolved_spec: dict[str, Any]
    world_size: int
    ranks: list[PlanRank]
    memory: PlanMemory | None
    """None while only the tokenizer's file knows the vocabulary."""
    communication: list[PlanTraffic] | None
    """None where it is not known: see `notes`."""
    bubble_share: float | None
    """Share of a step in which a pipeline rank waits for others."""
    hardware: str | None
    """What the time is estimated for."""
    time: PlanTime | None
    fits: bool | None
    """Whether the empty cluster could hold it; None while the cluster is not known."""
    room: int | None
    """Ranks of this kind that the empty cluster could hold."""
    problems: list[FieldError]
    """Why it would not run as things are."""
    notes: list[str]
    """What had to be assumed."""


class CancelRequest(Body):
    """How to end."""

    checkpoint: bool = True
    """Write a last checkpoint first."""


class Node(Body):
    """One node of a cluster."""

    node_id: str
    address: str
    alive: bool
    cpus: float
    gpus: float
    accelerator_type: str | None
    memory_bytes: int
    labels: dict[str, str]
    storage_ok: bool | None
    """Whether it could read the shared storage; None: not tried."""


class Cluster(Body):
    """A Ray cluster as its agent last saw it."""

    object: Literal["cluster"] = "cluster"
    name: str
    live: bool
    """Whether the agent has spoken lately."""
    agent_silence_s: float | None
    """Seconds since it spoke; None when it has not since the service started."""
    reported_at: datetime | None
    agent_id: str | None
    code_version: str | None
    ray_version: str | None
    namespace: str | None
    dashboard_url: str | None
    nodes: list[Node]
    drivers: list[dict[str, Any]]
    orphans: list[str]
    """Names in the namespace that belong to no known job."""

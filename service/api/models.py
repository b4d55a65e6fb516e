"""Bodies of the public API. Owns: their fields. Must not know: tables, internal messages."""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from workers.states import DesiredState, JobState, StatusReason

Item = TypeVar("Item")


class Body(BaseModel):
    """Base: the string under a field is its description in /openapi.json."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="forbid")


class Page(Body, Generic[Item]):
    """One page of a list; the next one starts `after` last_id."""

    model_config = ConfigDict(use_attribute_docstrings=False)  # pydantic looks for the source of Page[...] where there is none

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
    """Bytes on the fullest rank."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes_estimate: int
    """An estimate from tensor shapes, for one microbatch."""
    total_bytes_estimate: int
    vocab_size: int
    """Vocabulary the numbers are for."""


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

"""Defines the bodies of the public API.

Owns: their fields and descriptions, which are what /openapi.json shows. Must not know:
tables, internal messages.
"""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from megatron_ray.config.problem import Problem
from workers.protocol.states import DesiredState, JobState, StatusReason

Item = TypeVar("Item")
JobId = Annotated[str, Path(description="Id of the job.")]


class Body(BaseModel):
    """Base of all bodies.

    The string under a field is its description in /openapi.json.
    """

    # forbid: a field of a request that is misspelt must not be ignored.
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="forbid")


class Page(Body, Generic[Item]):
    """One page of a list. For the next page, set `after` to `last_id`."""

    # Descriptions are read from the source, and Page[Job] has none.
    model_config = ConfigDict(use_attribute_docstrings=False)

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


# ---- jobs and their history


class Progress(Body):
    """Progress of a job."""

    step: int | None
    """Last reported step."""
    steps: int | None
    """Number of steps of the whole job; null until the data of a job whose length is a
    number of epochs are prepared."""
    loss: float | None
    """Training loss of the last reported step, in nats per token."""
    tokens_per_s: float | None
    """Tokens per second of the last reported step, all ranks together."""
    eta_s: float | None
    """Estimated seconds until the last step."""
    mfu: float | None
    """Model FLOPs utilisation: the share of the devices' peak that the model uses."""
    val_loss: float | None
    """Last validation loss, in nats per token."""
    source_val_losses: dict[str, float | None]
    """The same by the name of the source."""
    unigram_nats: float | None
    """Loss of a model that knows only how frequent each token is. A trained model must be
    below it."""


class LastCheckpoint(Body):
    """The newest committed checkpoint."""

    step: int
    path: str
    committed_at: datetime


class JobSummary(Body):
    """A job without its specs."""

    object: Literal["job"] = "job"
    id: str
    name: str
    status: JobState
    """Current state."""
    status_reason: StatusReason | None
    """Reason of the current state."""
    message: str
    """Explanation of the current state for people."""
    desired_state: DesiredState
    """State that the job's driver works towards."""
    pause_reason: StatusReason | None
    """Why the job is paused or being paused: `user_paused`, or `stack_stopped` when
    `megatron-ray down` has stopped its stack. Null: it is not."""
    resumes: int
    """Number of times that the job was resumed after its end."""
    cluster: str
    priority: int
    """Jobs of higher priority are scheduled first."""
    metadata: dict[str, str]
    """Labels given by the user."""
    created_at: datetime
    started_at: datetime | None
    """When training started for the first time."""
    ended_at: datetime | None
    attempt: int
    """Number of the newest attempt; 0 before the first."""
    failures: int
    """Number of failed attempts, without preemptions."""
    preemptions: int
    """Number of preempted attempts."""
    progress: Progress
    problem: dict[str, Any] | None
    """Why the job failed, as a problem document (RFC 9457)."""
    storage_path: str
    """Folder or URI that the job writes everything to."""
    last_checkpoint: LastCheckpoint | None


class Job(JobSummary):
    """A job with its specs."""

    spec: dict[str, Any]
    """The spec as submitted."""
    resolved_spec: dict[str, Any]
    """The spec with every default and derived value filled in."""


class Event(Body):
    """One event of a job's history."""

    object: Literal["job.event"] = "job.event"
    id: str
    seq: int
    """Number of the event within the job: 1, 2, 3, ... without gaps."""
    job_id: str
    attempt: int
    """Attempt that the event belongs to; 0 before the first."""
    created_at: datetime
    level: str
    """`info`, `warn` or `error`."""
    type: str
    """Kind of the event. Ignore types that you do not know: new ones may be added."""
    message: str
    """Explanation for people."""
    data: dict[str, Any]
    """Details for programs."""
    ranks: list[int]
    """Ranks that the event is about."""
    actor: str
    """Who caused the event: `user` or `system`."""


class Attempt(Body):
    """One attempt to run a job on a set of ranks."""

    object: Literal["attempt"] = "attempt"
    attempt: int
    """Number of the attempt, from 1."""
    state: str
    """`starting`, `running`, `succeeded`, `failed` or `stopped`."""
    reason: str | None
    """Why it ended."""
    message: str
    """Explanation for people."""
    world_size: int | None
    """Number of ranks."""
    started_at: datetime | None
    ended_at: datetime | None


class Checkpoint(Body):
    """A committed checkpoint."""

    object: Literal["checkpoint"] = "checkpoint"
    step: int
    attempt: int
    """Attempt that wrote it."""
    path: str
    committed_at: datetime
    bytes: int | None
    """Size of all its files."""
    loss: float | None
    """Training loss at its step."""


class Log(Body):
    """A part of one rank's log."""

    object: Literal["log"] = "log"
    rank: int
    attempt: int
    offset: int
    """Byte of the file where this part starts."""
    next_offset: int
    """Byte of the file where the next part starts."""
    size: int
    """Bytes in the file now."""
    data: str
    """Text of this part."""


# ---- plans: their fields mirror the library's results, which a test compares


class PlanRank(Body):
    """Position of one rank."""

    rank: int
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
    gathered_bytes_estimate: int
    """Weights and gradients that ZeRO-3 gathers for a short time."""
    activations_bytes_estimate: int
    """Activations of all microbatches that are in progress at once."""
    total_bytes_estimate: int
    """Sum of all parts."""
    vocab_size: int
    """Vocabulary size that the numbers are computed for."""


class PlanTraffic(Body):
    """Communication of the most loaded rank in one step, by axis and collective."""

    axis: str
    """tp, cp, pp, dp (replicas of dense parameters), ep, etp, edp (replicas of an
    expert), embedding, tokens (tp x cp) or world."""
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


class Suggestions(Body):
    """The fastest layouts that fit, fastest first."""

    object: Literal["plan.suggestions"] = "plan.suggestions"
    world_size: int
    """Number of ranks of every layout."""
    hardware: str
    """Device that the layouts are for."""
    data: list[PlanSuggestion]
    notes: list[str]
    """Assumptions, and what is missing for an estimate."""


class Plan(Body):
    """How a job would run. Nothing is started."""

    object: Literal["plan"] = "plan"
    resolved_spec: dict[str, Any]
    """The spec with every default and derived value filled in."""
    world_size: int
    """Number of ranks."""
    ranks: list[PlanRank]
    memory: PlanMemory | None
    """null while the vocabulary size is unknown."""
    communication: list[PlanTraffic] | None
    """null when it is unknown; `notes` has the reason."""
    bubble_share: float | None
    """Share of a step in which a pipeline rank waits for other ranks."""
    hardware: str | None
    """Device that `time` is estimated for."""
    time: PlanTime | None
    """null when it is unknown; `notes` has the reason."""
    fits: bool | None
    """Whether the job fits in the empty cluster; null while the cluster is unknown."""
    room: int | None
    """How many ranks of this job the empty cluster has room for."""
    problems: list[Problem]
    """Why the job cannot run now."""
    notes: list[str]
    """Assumptions, and what is missing for an estimate."""


# ---- requests and clusters


class CancelRequest(Body):
    """Options of a cancellation."""

    checkpoint: bool = True
    """Whether to write a final checkpoint first."""


class PauseRequest(Body):
    """Options of a pause."""

    reason: Literal["user_paused", "stack_stopped"] = "user_paused"
    """`stack_stopped`: the stack is about to stop; its next start resumes the job."""


class ResumeRequest(Body):
    """Options of a resume."""

    changes: dict[str, Any] = Field(default_factory=dict, max_length=64)
    """For an ended job: fields of its spec to change, nested as in the spec, such as
    `{"training": {"steps": 2000}}`. Default: the job continues unchanged."""


# What a node reports, as `workers.protocol.wire.NodeInfo` carries it.
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
    """Whether the node can read the shared storage; null while it was not checked."""


class Cluster(Body):
    """A Ray cluster as its agent last reported it."""

    object: Literal["cluster"] = "cluster"
    name: str
    live: bool
    """Whether the agent has been in contact recently."""
    agent_silence_s: float | None
    """Seconds since the agent's last request; null before its first one."""
    reported_at: datetime | None
    """When the agent last reported; null before its first report."""
    agent_id: str | None
    code_version: str | None
    """Version of megatron-ray that the agent runs."""
    ray_version: str | None
    namespace: str | None
    """Ray namespace of all actors of this service."""
    dashboard_url: str | None
    """URL of Ray's dashboard."""
    nodes: list[Node]
    drivers: list[dict[str, Any]]
    """The jobs' drivers: {job_id, alive, detail}."""
    orphans: list[str]
    """Actors in the namespace that belong to no known job."""

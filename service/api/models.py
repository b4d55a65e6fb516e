"""Defines the bodies of the public API about jobs.

Owns: their fields and descriptions, which are what /openapi.json shows. Must not know:
tables, internal messages.
"""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from megatron_ray.config.problem import Problem
from workers.protocol.events import EventLevel
from workers.protocol.states import AttemptState, DesiredState, JobState, StatusReason

Item = TypeVar("Item")
MAX_JOBS_PER_REQUEST = 1000
"""Jobs that one request may change."""
NAME_PATTERN = r"^[a-z0-9*-]+$"
JobId = Annotated[str, Path(description="Id of the job.")]
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=NAME_PATTERN)]
"""A job's name, in which `*` stands for any characters."""
Label = Annotated[str, Field(max_length=500)]


class Body(BaseModel):
    """Base of all bodies.

    The string under a field is its description in /openapi.json.
    """

    # forbid: a field of a request that is misspelt must not be ignored.
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="forbid")


class Page(Body, Generic[Item]):
    """One page of a list. For the next page, set `after` to `last_id`."""

    # Not by attribute docstrings: they are read from the source, and Page[Job] has none.
    model_config = ConfigDict(
        use_attribute_docstrings=False,
        json_schema_extra={
            "description": "One page of a list. For the next page, set `after` to `last_id`."
        },
    )

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[Item] = Field(description="The entries of this page.")
    first_id: str | None = Field(None, description="Id of the first entry of this page.")
    last_id: str | None = Field(None, description="Id of the last entry of this page.")
    has_more: bool = Field(False, description="Whether entries follow after this page.")
    total: int | None = Field(
        None,
        description="Number of entries that match the request, on all pages together; null "
        "where they were not counted.",
    )


class ProblemDocument(Body):
    """Body of every answer that is an error (RFC 9457)."""

    # Some problems carry further members, as the RFC provides for.
    model_config = ConfigDict(extra="allow")

    type: str
    """URN of the kind of problem: `urn:megatron-ray:problem:` and the code."""
    title: str
    """What went wrong in general."""
    status: int
    """HTTP status."""
    detail: str
    """What went wrong this time, and what to do."""
    code: str
    """Stable name of the kind of problem, for programs."""
    errors: list[Problem]
    """The wrong fields or parameters, one by one."""
    instance: str
    """Path of the request."""
    request_id: str
    """Id of the request, under which the service's log names it."""


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
    """Step that training continues after."""
    path: str
    """Folder or URI of the checkpoint."""
    committed_at: datetime
    """When it was complete."""


class JobSummary(Body):
    """A job without its specs."""

    object: Literal["job"] = "job"
    """Kind of this object."""
    id: str
    """Id of the job."""
    name: str
    """Name that the spec gives; several jobs may have it."""
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
    """Cluster that the job runs on."""
    priority: int
    """Jobs of higher priority are scheduled first."""
    metadata: dict[str, str]
    """Labels given by the user."""
    created_at: datetime
    """When the job was created."""
    started_at: datetime | None
    """When training started for the first time."""
    ended_at: datetime | None
    """When the job ended; null while it has not."""
    attempt: int
    """Number of the newest attempt; 0 before the first."""
    failures: int
    """Number of failed attempts, without preemptions."""
    preemptions: int
    """Number of preempted attempts."""
    progress: Progress
    """How far the job is."""
    problem: dict[str, Any] | None
    """Why the job failed, as a problem document (RFC 9457)."""
    storage_path: str
    """Folder or URI that the job writes everything to."""
    last_checkpoint: LastCheckpoint | None
    """The newest committed checkpoint; null before the first."""


class Job(JobSummary):
    """A job with its specs."""

    spec: dict[str, Any]
    """The spec as submitted."""
    resolved_spec: dict[str, Any]
    """The spec with every default and derived value filled in."""


class Event(Body):
    """One event of a job's history."""

    object: Literal["job.event"] = "job.event"
    """Kind of this object."""
    id: str
    """Id of the event, unique among all jobs."""
    seq: int
    """Number of the event within the job: 1, 2, 3, ... without gaps."""
    job_id: str
    """Id of the job."""
    attempt: int
    """Attempt that the event belongs to; 0 before the first."""
    created_at: datetime
    """When it happened, by the clock of the process that reported it."""
    level: EventLevel
    """How much it matters."""
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
    """Kind of this object."""
    attempt: int
    """Number of the attempt, from 1."""
    state: AttemptState
    """Current state."""
    reason: StatusReason | None
    """Why it ended; null while it has not."""
    message: str
    """Explanation for people."""
    world_size: int | None
    """Number of ranks."""
    started_at: datetime | None
    """When it began."""
    ended_at: datetime | None
    """When it ended; null while it has not."""


class Checkpoint(Body):
    """A committed checkpoint."""

    object: Literal["checkpoint"] = "checkpoint"
    """Kind of this object."""
    step: int
    """Step that training continues after."""
    attempt: int
    """Attempt that wrote it."""
    path: str
    """Folder or URI of the checkpoint."""
    committed_at: datetime
    """When it was complete."""
    bytes: int | None
    """Size of all its files."""
    loss: float | None
    """Training loss at its step."""


class MetricsRow(Body):
    """The metrics of one step, those that the request named.

    A part of a metric has the name that was asked for, such as `val_loss/web`.
    """

    model_config = ConfigDict(extra="allow")

    # Fields of StepReport, which a test compares; this class only describes the rows.
    step: int
    """Number of the step, from 1."""
    attempt: int
    """Attempt that ran the step."""
    loss: float | None = None
    """Training loss, in nats per token."""
    grad_norm: float | None = None
    """Global L2 norm of the gradients before clipping."""
    lr: float | None = None
    """Learning rate."""
    num_tokens: int | None = None
    """Tokens that counted in the loss, all ranks together."""
    consumed_samples: int | None = None
    """Samples used since the start of the job, this step included."""
    step_s: float | None = None
    """Seconds that the step took."""
    tokens_per_s: float | None = None
    """Tokens per second, all ranks together."""
    mfu: float | None = None
    """Model FLOPs utilisation, the share of the devices' peak; null where that is unknown."""
    memory_bytes: int | None = None
    """Peak device memory; on CPUs the memory of the process."""
    split_s: dict[str, float | None] | None = None
    """Seconds of the step by part, on rank 0: data, forward, backward, communication (waits
    for other ranks), optimizer, checkpoint and other, which add up to step_s."""
    other_losses: dict[str, float | None] | None = None
    """Auxiliary losses before weighting, such as load_balancing_loss and mtp_1_loss."""
    skipped_steps: int | None = None
    """Steps of the job so far that were skipped because their numbers were not finite."""
    loss_scale: float | None = None
    """Factor of the step's loss in fp16; null in other precisions."""
    weight_decay: float | None = None
    """Weight decay of the step; null where every step has the same."""
    val_loss: float | None = None
    """Validation loss after the step, in nats per token; null where nothing was evaluated."""
    monitors: dict[str, float | None] | None = None
    """Numbers of the job's callbacks by name, null in steps in which none were due."""


class RankSlowness(Body):
    """How much slower a rank is than its peers."""

    ratio: float | None
    """Its own seconds per step, without waits, over the median of its pipeline stage."""
    since: datetime
    """When this was first reported."""


class RankPlacement(Body):
    """Where one rank runs."""

    # Rows are answered as the driver reported them: a newer one may add fields.
    model_config = ConfigDict(extra="allow")

    rank: int
    """Number of the rank."""
    slot: int | None = None
    """Number of the worker process, which stays when a rank moves."""
    node_id: str | None = None
    """Ray's id of the node."""
    address: str | None = None
    """IP address of the node."""
    gpu: int | None = None
    """Index of the GPU on its node; null on CPUs."""
    pid: int | None = None
    """Id of the process on its node."""
    coordinates: dict[str, int] = {}
    """Index of the rank along each parallel axis."""
    slow: RankSlowness | None = None
    """Set while the rank is slower than its peers, which wait for it."""
    log_url: str | None = None
    """Page of Ray's dashboard with the rank's log on its node, while the job runs and its
    cluster has a dashboard."""


class Log(Body):
    """A part of one rank's log."""

    object: Literal["log"] = "log"
    """Kind of this object."""
    rank: int
    """Rank that wrote the log."""
    attempt: int
    """Attempt that the log belongs to."""
    offset: int
    """Byte of the file where this part starts."""
    next_offset: int
    """Byte of the file where the next part starts."""
    size: int
    """Bytes in the file now."""
    data: str
    """Text of this part."""


# ---- messages of a stream


class StreamMetrics(Body):
    """Data of the message `metrics`."""

    rows: list[MetricsRow]
    """Rows of steps with all metrics, in the order in which they were stored."""


class StreamEnd(Body):
    """Data of the message `end`, the last one."""

    status: JobState | Literal["deleted"]
    """State in which the job ended, or that it was deleted."""


# ---- cancellations


class CancelRequest(Body):
    """Options of a cancellation."""

    checkpoint: StrictBool = True
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


class ResizeRequest(Body):
    """The size that a job is to have."""

    dp: int = Field(ge=1, le=1 << 20)
    """Number of data-parallel replicas; within `elastic`, where the spec has it."""


class CancelJobsRequest(CancelRequest):
    """Jobs to cancel: those of `ids`, or those that match all of the other fields."""

    ids: list[Annotated[str, Field(min_length=1, max_length=64)]] | None = Field(
        None, min_length=1, max_length=MAX_JOBS_PER_REQUEST
    )
    """Ids of the jobs; not together with another choice."""
    status: list[JobState] | None = Field(None, min_length=1)
    """States of the jobs. Default: every state but the final ones."""
    name: Name | None = None
    """Name of the jobs; `*` stands for any characters."""
    metadata: dict[str, Label] | None = Field(None, min_length=1, max_length=20)
    """Labels of the jobs; all must match."""

    @model_validator(mode="after")
    def _chooses_once(self) -> Self:
        is_filtered = (self.status or self.name or self.metadata) is not None
        if (self.ids is not None) == is_filtered:
            raise ValueError(
                "name the jobs by ids, or choose them by status, name or metadata"
            )
        return self


class JobReference(Body):
    """A job by its id."""

    id: str
    """Id of the job."""
    name: str
    """Name that the spec gives."""
    status: JobState
    """State after the request."""


class Cancellation(Body):
    """What a request to cancel jobs has done."""

    object: Literal["job.cancellation"] = "job.cancellation"
    """Kind of this object."""
    cancelled: list[JobReference]
    """Jobs that are being cancelled, or were cancelled at once."""
    ended: list[JobReference]
    """Jobs that had ended already and stay as they are."""
    not_found: list[str]
    """Ids of no job."""
    has_more: bool
    """Whether more jobs match than one request cancels: send it again."""

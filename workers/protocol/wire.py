"""Defines the messages between service, agent and driver.

Owns: their fields and the protocol number. Must not know: Ray, torch, HTTP.

The service accepts protocol N and N-1. Unknown fields are ignored, so a newer producer
may add some.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from workers.protocol.states import DesiredState, JobState

PROTOCOL = 1


class Message(BaseModel):
    """Base of all messages: frozen, and ignores unknown fields."""

    # Not "forbid": fields are added without raising the protocol number.
    model_config = ConfigDict(extra="ignore", frozen=True)


class ProblemMessage(Message):
    """One error in a spec: the wire format of megatron_ray.config.problem.Problem."""

    pointer: str
    code: str
    detail: str


# ---- agent and service


class NodeInfo(Message):
    """One Ray node as the agent reports it."""

    node_id: str
    address: str
    alive: bool = True
    cpus: float = 0
    gpus: float = 0
    accelerator_type: str | None = None
    resources: dict[str, float] = Field(default_factory=dict)
    """Other resources than CPU, GPU and memory, by name."""
    free: dict[str, float] | None = None
    """What is not in use of all resources, by Ray's names; None: not read."""
    memory_bytes: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    storage_ok: bool | None = None
    """Whether the node can read the shared storage; None: not checked yet."""
    draining: bool = False
    """Whether the node is about to go; Ray starts nothing there any more."""
    drain_deadline: float | None = None
    """When it goes, in seconds since the epoch; None: not known."""
    excluded: str | None = None
    """Why no rank may start there; None: the node is not excluded. Set by the service."""


class NodeGroup(Message):
    """Nodes of one kind that an autoscaler may give to a cluster, as an admin lists them."""

    name: str = Field(min_length=1, max_length=253)
    """Value of Ray's label `ray.io/node-group` on these nodes."""
    max_nodes: int = Field(ge=0, le=100_000)
    """Largest number of these nodes at once; those that are there count."""
    cpus: float = Field(gt=0)
    """CPUs of one node, as Ray counts them."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one node."""
    accelerator_type: str | None = None
    """Ray's name of the GPUs, as in `H100`."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray's labels of these nodes."""


class DriverStatus(Message):
    """State of one job's driver as the agent reports it."""

    job_id: str
    alive: bool
    detail: str = ""


class AgentReport(Message):
    """Agent -> service, every few seconds: nodes, drivers and orphans of the cluster."""

    protocol: int = PROTOCOL
    cluster: str
    agent_id: str
    """Unique for each agent process."""
    code_version: str
    ray_version: str
    namespace: str
    dashboard_url: str | None = None
    nodes: tuple[NodeInfo, ...] = ()
    node_groups: tuple[NodeGroup, ...] = ()
    """What the cluster may grow to; none if it does not grow."""
    drivers: tuple[DriverStatus, ...] = ()
    orphans: tuple[str, ...] = ()
    """Names of actors in the namespace that belong to no known job; reported, never
    killed."""


class ResumedJob(Message):
    """A job that is to be resumed after its end."""

    job_id: str
    has_other_data: bool
    """Whether its data are other ones than before, and must be checked."""
    had_driver: bool
    """Whether it has a journal in its folder."""


class CheckRequest(Message):
    """Service -> agent: check a spec's paths from inside the cluster, on CPU."""

    check_id: str
    spec: dict[str, Any]
    storage_path: str
    path_rules: dict[str, Any] | None = None
    """PathRules as JSON: the places that the spec may name, links followed; None from a
    service that has none."""
    resumed: ResumedJob | None = None
    """None: the spec is that of a new job."""


class CheckResult(Message):
    """Agent -> service: errors found by a check; none if empty."""

    protocol: int = PROTOCOL
    check_id: str
    problems: tuple[ProblemMessage, ...] = ()
    notes: tuple[str, ...] = ()
    """What of the data is left out, one sentence each."""


# ---- desired jobs, for agent and drivers


class ProfileOrder(Message):
    """The newest request of a profile of a job."""

    number: int = Field(ge=1)
    """Counts the requests of the job."""
    attempt: int
    """Attempt whose ranks are asked; another one ignores it."""
    first_step: int
    last_step: int
    ranks: tuple[int, ...]


class DesiredJob(Message):
    """Desired state of one job, for its driver."""

    job_id: str
    desired: DesiredState
    revision: int
    """Increases whenever any field below changes."""
    spec: dict[str, Any]
    """Resolved JobSpec as JSON."""
    job_dir: str
    """Folder or URI that the job writes everything to."""
    token: str
    """Token of this job's driver, valid for this job only."""
    final_checkpoint: bool = True
    """Whether cancel and pause write a final checkpoint."""
    checkpoint_requests: int = 0
    """Counter: each increase requests one checkpoint now."""
    diagnosis_requests: int = 0
    """Counter: each increase requests one diagnosis now."""
    profile: ProfileOrder | None = None
    """The newest request of a profile; None before the first."""
    resumes: int = 0
    """Counter: each increase resumes the job after its end, with the spec above."""
    avoid_nodes: dict[str, str] = Field(default_factory=dict)
    """Why living nodes must not be used, by node id; not counted by `revision`."""
    node_groups: tuple[NodeGroup, ...] = ()
    """What the cluster may grow to; likewise not counted."""


class DesiredReply(Message):
    """Service -> agent: reply to the long poll for desired jobs."""

    protocol: int = PROTOCOL
    revision: int
    jobs: tuple[DesiredJob, ...] = ()
    """All jobs of the cluster that are not terminal, plus terminal ones whose driver the
    agent still reports."""
    terminal: tuple[str, ...] = ()
    """Ids of ended jobs, whose actors and placement groups may be removed."""
    checks: tuple[CheckRequest, ...] = ()
    """Checks of new jobs."""
    resume_checks: tuple[CheckRequest, ...] = ()
    """Checks of jobs that are to be resumed, which earlier agents do not know."""
    states: dict[str, JobState] = Field(default_factory=dict)
    """State of every job of the cluster that has not ended, and of the latest ended ones."""


# ---- driver and service


class Record(Message):
    """One numbered record from one source.

    `kind` decides what `data` holds::

        state       {state, reason, message, ...}: the job's observed state
        event       {type, level, message, data, ranks}: an entry of the job's history
        attempt     {state, reason, message, world_size}: an attempt began or ended
        ranks       {ranks: [{slot, rank, node_id, address, gpu, pid, coordinates}]}
        prepared    {manifest, num_train_tokens, steps, ...}: data ready, the job may be queued
        checkpoint  {action: committed|deleted, step, path, bytes, loss}
        problem     {problems: [{pointer, code, detail}]}: user error found in preparation
        diagnosis   {trigger, reason, confidence, culprits, ranks, stacks, ...}: see
                    `decisions.ranks.diagnosis_report`
        profile     the fields of ProfileReport, of any rank
        step, eval, monitors
                    the fields of StepReport, EvalReport, MonitorReport
    """

    n: int = Field(ge=1)
    """Number within its source, from 1 without gaps."""
    at: float
    """Producer's wall clock in seconds since the epoch; for display, never for order."""
    kind: str
    attempt: int = 0
    """0: before the first attempt."""
    data: dict[str, Any] = Field(default_factory=dict)


class RecordBatch(Message):
    """Driver -> service: records of one source, in order and without gaps."""

    protocol: int = PROTOCOL
    job_id: str
    epoch: int
    """Incarnation of the driver; the service refuses one lower than it has seen."""
    source: str
    """`driver`, or `a<attempt>/r<rank>` for a rank's own file."""
    records: tuple[Record, ...] = ()


class RecordReply(Message):
    """Service -> driver: the highest number stored now, and the desired state."""

    protocol: int = PROTOCOL
    stored: int
    """Highest n stored for this source; the driver may drop records up to it."""
    desired: DesiredJob


class CursorReply(Message):
    """Service -> driver after its start: the highest number stored of each source."""

    protocol: int = PROTOCOL
    stored: dict[str, int] = Field(default_factory=dict)
    """Highest n stored, by source."""

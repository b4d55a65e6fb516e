"""Messages between service, agent and driver.

Owns: their fields and the protocol number. Must not know: ray, torch, HTTP.

The service accepts protocol N and N-1; unknown fields are ignored, so a newer producer
may add some.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from workers.protocol.states import DesiredState

PROTOCOL = 1


class Message(BaseModel):
    """Base: frozen, tolerant of fields it does not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ProblemMessage(Message):
    """One thing wrong with a spec (rules.problem.Problem on the wire)."""

    pointer: str
    code: str
    detail: str


class NodeInfo(Message):
    """One Ray node as the agent sees it."""

    node_id: str
    address: str
    alive: bool = True
    cpus: float = 0
    gpus: float = 0
    accelerator_type: str | None = None
    memory_bytes: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    storage_ok: bool | None = None
    """Whether the node could read the nonce from shared storage; None: not tried."""


class DriverStatus(Message):
    """What the agent knows of one job's driver."""

    job_id: str
    alive: bool
    detail: str = ""


class AgentReport(Message):
    """Agent -> service, every few seconds: the cluster as it is."""

    protocol: int = PROTOCOL
    cluster: str
    agent_id: str
    """New for every agent process."""
    code_version: str
    ray_version: str
    namespace: str
    dashboard_url: str | None = None
    nodes: tuple[NodeInfo, ...] = ()
    drivers: tuple[DriverStatus, ...] = ()
    orphans: tuple[str, ...] = ()
    """Names found in the namespace that belong to no known job; reported, never
    touched."""


class CheckRequest(Message):
    """Service -> agent: look at a spec's paths from inside the cluster, on CPU."""

    check_id: str
    spec: dict[str, Any]
    storage_path: str


class CheckResult(Message):
    """Agent -> service: what was wrong (nothing, when empty)."""

    protocol: int = PROTOCOL
    check_id: str
    problems: tuple[ProblemMessage, ...] = ()


class DesiredJob(Message):
    """What one job's driver should be doing."""

    job_id: str
    desired: DesiredState
    revision: int
    """Grows whenever anything below changes."""
    spec: dict[str, Any]
    """Resolved JobSpec as JSON."""
    job_dir: str
    """Folder or URI of everything the job writes."""
    token: str
    """Lets this job's driver speak for this job, and nothing else."""
    final_checkpoint: bool = True
    """Whether cancel and pause write a last checkpoint."""
    checkpoint_requests: int = 0
    """Counter: each increase asks for one checkpoint now."""


class DesiredReply(Message):
    """Service -> agent, answer of the long poll."""

    protocol: int = PROTOCOL
    revision: int
    jobs: tuple[DesiredJob, ...] = ()
    """All jobs of the cluster that are not terminal, plus terminal ones whose driver
    the agent still reports."""
    terminal: tuple[str, ...] = ()
    """Jobs known to be over: their actors and placement groups may be reaped."""
    checks: tuple[CheckRequest, ...] = ()


class Record(Message):
    """One numbered fact from one producer.

    `kind` decides what `data` holds:

    state       {state, reason, message, ...}        the job's observed state event
    {type, level, message, data, ranks}  anything worth a line in the history attempt
    {state, reason, message, world_size} the attempt began or ended ranks       {ranks:
    [{slot, rank, node_id, address, gpu, pid, coordinates}]} prepared    {manifest,
    num_train_tokens, ...}    data are ready; queue the job checkpoint  {action:
    committed|deleted, step, path, bytes, loss} problem     {problems: [{pointer, code,
    detail}]} the user's mistake found while preparing step, eval  fields of StepReport,
    EvalReport
    """

    n: int = Field(ge=1)
    """Number within its source, gap-free from 1."""
    at: float
    """Producer's wall clock, seconds since the epoch; for people, never for order."""
    kind: str
    attempt: int = 0
    """0: before the first attempt."""
    data: dict[str, Any] = Field(default_factory=dict)


class RecordBatch(Message):
    """Driver -> service: records of one source, in order, without holes."""

    protocol: int = PROTOCOL
    job_id: str
    epoch: int
    """Incarnation of the driver; the service refuses a lower one than it has seen."""
    source: str
    """`driver`, or `a<attempt>/r<rank>` for a rank's own file."""
    records: tuple[Record, ...] = ()


class RecordReply(Message):
    """Service -> driver: what is stored now, and what is wanted."""

    protocol: int = PROTOCOL
    stored: int
    """Highest n stored for this source; everything up to it may be forgotten."""
    desired: DesiredJob


class CursorReply(Message):
    """Service -> driver: highest n stored per source, for a driver that has just
    (re)started.
    """

    protocol: int = PROTOCOL
    stored: dict[str, int] = Field(default_factory=dict)

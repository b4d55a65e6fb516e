"""Defines the state from which a job's driver resumes after its own death.

Owns: the journal's fields, which are a file format: a newer driver reads the entries of
an older one. Tokens are never stored. Must not know: storage, Ray, torch, HTTP.
"""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from megatron_ray.checkpoint.records.rollbacks import Rollback
from workers.decisions.failures import FailureKind
from workers.decisions.peers.copies import CopySet
from workers.decisions.placement import RankPlace
from workers.protocol.preflight import PreflightConfig
from workers.protocol.states import DesiredState

FORMAT_VERSION = 1


class Phase(StrEnum):
    """The phase of the job when the driver wrote the entry; see `job_phases`."""

    PREPARING = "preparing"
    READY = "ready"
    SCHEDULING = "scheduling"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    ENDING = "ending"


class Ending(BaseModel):
    """The final state of a job that is about to end.

    Written before the clean-up, so that a restarted driver ends the job the same way.
    """

    # Earlier versions wrote this key.
    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    state: str
    reason: str | None = None
    message: str = ""
    is_recorded: bool = Field(default=False, alias="told")
    """Whether another record has already set the state in the service."""


class FailedAttempt(BaseModel):
    """The failure of the current attempt, until the restart policy has decided."""

    model_config = ConfigDict(frozen=True)

    kind: FailureKind
    message: str
    rank: int | None = None
    detail: str = ""
    step: int | None = None
    dead_ranks: tuple[int, ...] = ()
    facts: dict[str, int] = Field(default_factory=dict)


class RecheckedStep(BaseModel):
    """A step that may have been computed wrongly, and where."""

    model_config = ConfigDict(frozen=True)

    step: int
    rank: int
    node_id: str
    address: str


class DeadRank(BaseModel):
    """A rank that died in an attempt; its report and log files are on its node."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    place: RankPlace


class ResourcesReleased(BaseModel):
    """Why the resources are released, or about to be.

    The job waits until it is to run at a revision above `revision`.
    """

    model_config = ConfigDict(frozen=True)

    state: str
    reason: str | None
    message: str
    revision: int


class JournalEntry(BaseModel):
    """State of one attempt; attempt 0 is the time before the first."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: int = Field(default=FORMAT_VERSION, le=FORMAT_VERSION)
    job_id: str
    attempt: int = 0
    epoch: int = 1
    """Incarnation of the driver; workers and service refuse lower ones."""
    phase: Phase = Phase.PREPARING
    code_version: str = ""
    spec: dict[str, Any] | None = None
    """Resolved JobSpec as JSON; None until the agent has sent it."""
    prepared: dict[str, Any] | None = None
    """PreparedData as JSON, once the data are ready."""
    accelerator: str | None = None
    dp: int | None = None
    """Data-parallel size of a shrunk attempt; None: that of the spec."""
    lost_nodes: tuple[str, ...] = ()
    """Nodes that the last failure took away, whatever Ray lists."""
    bundle_size: int | None = None
    """Ranks of each bundle of the placement group; None: a tensor-parallel group."""
    nodes: tuple[str, ...] = ()
    """All nodes that the job was ever placed on, for the clean-up."""
    ranks: tuple[RankPlace, ...] = ()
    store: tuple[str, int] | None = None
    """Host and port of the TCPStore."""
    failures: int = 0
    preemptions: int = 0
    commits_at_failure: tuple[int, ...] = ()
    """Highest committed step when each failed attempt ended, oldest first."""
    last_error: str = ""
    """The last exception that ended an attempt, with its step; see `restart_policy`."""
    last_commit: int = 0
    """Step of the newest committed checkpoint; 0: none."""
    resumed_from: str | None = None
    copies: CopySet | None = None
    """Copies in the ranks' memory that the attempt continues from, not from the
    checkpoint."""
    rollbacks: tuple[Rollback, ...] = ()
    """Rollbacks of the job by training.rules."""
    recheck: RecheckedStep | None = None
    """Step that attempts compute on other nodes than before."""
    damaged: dict[str, str] = Field(default_factory=dict)
    """What is wrong with checkpoints in which ranks have read damaged bytes, by path."""
    checkpoint_requests: int = 0
    """Requests for a checkpoint that were passed on to the ranks."""
    diagnosis_requests: int = 0
    """Requests for a diagnosis that were carried out."""
    stopping: DesiredState | None = None
    """Reason of the stop command sent to this attempt's ranks."""
    failed: FailedAttempt | None = None
    dead: tuple[DeadRank, ...] = ()
    """Dead ranks whose files may not have been fetched yet."""
    measured_nodes: tuple[str, ...] = ()
    """Nodes that have passed a pre-flight of the job since it was started or resumed."""
    avoid: dict[str, str] = Field(default_factory=dict)
    """Why the next attempt must not use nodes, by node id."""
    given_back: ResourcesReleased | None = None
    resumes: int = 0
    """Requests to resume the ended job that were carried out."""
    ending: Ending | None = None

    @property
    def attempt_spec(self) -> dict[str, Any] | None:
        """The spec at the data-parallel size of the attempt."""
        if self.spec is None or self.dp is None:
            return self.spec
        return {**self.spec, "parallel": {**self.spec["parallel"], "dp": self.dp}}

    @property
    def preflight(self) -> PreflightConfig | None:
        """How the attempt measures its nodes first; None: it has measured all of them."""
        # Specs of earlier versions lack the field.
        config = PreflightConfig.model_validate((self.spec or {}).get("preflight") or {})
        nodes = {place.node_id for place in self.ranks}
        if config.mode == "never" or nodes <= set(self.measured_nodes):
            return None
        return config

    @property
    def first_step(self) -> int:
        """Steps of the run that were done before the attempt."""
        if self.copies is not None:
            return self.copies.step
        return self.last_commit

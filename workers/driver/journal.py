"""What a job's driver must remember to go on after its own death.

Owns: job_dir/attempts/NNNN.json and the epoch.

Written whole before acting, read by the next incarnation. The database says what is
wanted and what happened; the journal says how it runs, so that recovery goes on while
the service is away. Never holds a token. Must not know: Ray, torch, HTTP.
"""

import json
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ray.storage.storage import Storage, open_storage
from workers.decisions.failures import FailureKind
from workers.decisions.placement import RankPlace
from workers.exceptions import WorkersError
from workers.protocol.states import DesiredState
from workers.rank.environment import RankEnv
from workers.rank.messages import StartOrder

FOLDER = "attempts"
FORMAT_VERSION = 1


class JournalError(WorkersError):
    """A journal that cannot be used; the text names the file and why."""


class ForeignJournalError(WorkersError):
    """The folder holds another job: its checkpoints and records must not be mixed with
    this one's.
    """

    def __init__(self, job_dir: str, owner: str) -> None:
        super().__init__(
            f"{job_dir} belongs to {owner}; give this job a storage.path of its own, or "
            "leave it out"
        )
        self.owner = owner


class Phase(StrEnum):
    """How far the driver had come when it wrote the entry."""

    PREPARING = "preparing"
    READY = "ready"
    SCHEDULING = "scheduling"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    ENDING = "ending"


class Ending(BaseModel):
    """How the job ends; written before the clean-up, so that a restarted driver ends it
    the same way.
    """

    model_config = ConfigDict(frozen=True)

    state: str
    reason: str | None = None
    message: str = ""
    told: bool = False
    """Whether the service has heard it already, in the words of another record."""


class FailedAttempt(BaseModel):
    """Why the current attempt ended, until it is decided what follows: a driver that
    dies in between goes on from here.
    """

    model_config = ConfigDict(frozen=True)

    kind: FailureKind
    message: str
    rank: int | None = None
    detail: str = ""
    dead_ranks: tuple[int, ...] = ()


class DeadRank(BaseModel):
    """A rank that died in an attempt; what it left lies on its node."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    place: RankPlace


class ResourcesReleased(BaseModel):
    """The resources are given back, or about to be; the job waits for a wish newer than
    `revision`.
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
    phase: Phase = Phase.PREPARING
    code_version: str = ""
    spec: dict[str, Any] | None = None
    """Resolved JobSpec as JSON; None until the agent has told it."""
    prepared: dict[str, Any] | None = None
    """PreparedData as JSON, once the data are ready."""
    accelerator: str | None = None
    nodes: tuple[str, ...] = ()
    """Every node that was ever given to the job, for the clean-up."""
    ranks: tuple[RankPlace, ...] = ()
    store: tuple[str, int] | None = None
    """Host and port of the TCPStore."""
    failures: int = 0
    preemptions: int = 0
    commits_at_failure: tuple[int, ...] = ()
    """Highest committed step when each failed attempt ended, oldest first."""
    last_commit: int = 0
    """Step of the newest committed checkpoint; 0: none."""
    resumed_from: str | None = None
    checkpoint_requests: int = 0
    """Wishes for a checkpoint that have been passed on to the ranks."""
    stopping: DesiredState | None = None
    """Why the ranks of this attempt were told to stop."""
    failed: FailedAttempt | None = None
    dead: tuple[DeadRank, ...] = ()
    """Those whose last words may not have been fetched yet."""
    given_back: ResourcesReleased | None = None
    ending: Ending | None = None


class Journal:
    """The entries of one job under its folder.

    Methods raise StorageError when the storage does.
    """

    def __init__(self, job_dir: str) -> None:
        self._storage: Storage = open_storage(job_dir)

    def write(self, entry: JournalEntry) -> None:
        """Replaces the entry of its attempt, atomically and durably."""
        self._storage.write_bytes_atomic(
            _name(entry.attempt), entry.model_dump_json(indent=1).encode()
        )

    def latest(self) -> JournalEntry | None:
        """The entry of the highest attempt; None for a new job.

        Raises JournalError when it cannot be read as one.
        """
        names = [
            entry.name
            for entry in self._storage.list(FOLDER)
            if entry.name.endswith(".json") and entry.name[:-5].isdigit()
        ]
        if not names:
            return None
        name = f"{FOLDER}/{max(names, key=lambda name: int(name[:-5]))}"
        try:
            return JournalEntry.model_validate(json.loads(self._storage.read_bytes(name)))
        except (ValueError, ValidationError) as error:
            raise JournalError(
                f"{self._storage.uri(name)} is not a journal entry of format "
                f"{FORMAT_VERSION}: {error}"
            ) from error


def start_orders(entry: JournalEntry, accelerator: str) -> dict[int, StartOrder]:
    """What each slot's worker is told, from the journal alone.

    Raises ValueError before the rank map and the data are known.
    """
    if (
        entry.spec is None
        or entry.prepared is None
        or (entry.store is None and len(entry.ranks) > 1)
    ):
        raise ValueError(f"attempt {entry.attempt} has no spec, data or store yet")
    master_addr, master_port = entry.store or (None, None)
    # Ray shows a worker its own GPU only, so that is always number 0 there.
    device = "cuda" if accelerator == "gpu" else "cpu"
    return {
        place.slot: StartOrder(
            env=RankEnv(
                rank=place.rank,
                world_size=len(entry.ranks),
                local_rank=place.local_rank,
                local_world_size=place.local_world_size,
                node_rank=place.node_rank,
                master_addr=master_addr,
                master_port=master_port,
            ),
            spec=entry.spec,
            data=entry.prepared,
            attempt=entry.attempt,
            device=device,
            gpu=place.gpu,
            store=entry.store,
            resume_from=entry.resumed_from,
        )
        for place in entry.ranks
    }


def _name(attempt: int) -> str:
    return f"{FOLDER}/{attempt:04d}.json"

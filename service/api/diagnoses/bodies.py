"""Defines the bodies of the public API about diagnoses.

Owns: their fields and descriptions. Must not know: tables, how ranks are examined.
"""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict

from service.api.models import Body


class _Part(Body):
    """Base of the parts of a diagnosis, as the driver reported them."""

    # A newer driver may add fields.
    model_config = ConfigDict(extra="ignore")


class Culprit(_Part):
    """A rank that the others wait for."""

    rank: int
    """Number of the rank."""
    node_id: str | None = None
    """Ray's id of its node."""
    address: str | None = None
    """IP address of its node."""
    gpu: int | None = None
    """Index of its GPU on the node; null on CPUs."""
    pid: int | None = None
    """Id of its process on the node."""


class RankWait(_Part):
    """The collective or message that a rank waits in."""

    operation: str
    """Name of the collective; `send` or `receive` for a message, `device` for the queue of
    its GPU."""
    axis: str
    """Axis of the group, such as `tp`."""
    number: int
    """Number of the collective within its group, or of the message to or from its peer."""
    peer: int | None = None
    """Rank at the other end of a message; null for a collective."""
    seconds: float
    """How long it has waited."""


class ExaminedRank(Culprit):
    """What one rank did."""

    answered: bool
    """Whether it has answered in time; otherwise nothing more is known of it."""
    phase: str | None = None
    """`start`, a part of the step (`data`, `forward_backward`, `reduce`, `optimizer`,
    `reports`), `evaluation`, `checkpoint` or `ended`."""
    step: int | None = None
    """Last step that it has reported."""
    microbatch: int | None = None
    """Microbatch of its last pass, from 0."""
    waits_in: RankWait | None = None
    """What it waits in; null: in no collective."""
    innermost: str | None = None
    """Innermost line of its training thread."""
    threads: tuple[str, ...] = ()
    """Innermost lines of its other threads."""
    memory_bytes: int | None = None
    """Resident memory of its process."""
    free_memory_bytes: int | None = None
    """Memory that its node has left."""
    device_memory_bytes: int | None = None
    """Memory that it has allocated on its GPU; null on CPUs."""
    load: float | None = None
    """Load average of its node over a minute."""
    device_collectives: tuple[str, ...] = ()
    """Collectives that its GPU has not finished, oldest first, where torch records them."""


class RankStack(_Part):
    """The stack of the training threads of some ranks."""

    ranks: tuple[int, ...]
    """Ranks with this stack."""
    lines: tuple[str, ...]
    """Functions and lines, innermost first."""


class Diagnosis(_Part):
    """What all ranks of a job did at one moment, and which one the others wait for."""

    object: Literal["job.diagnosis"] = "job.diagnosis"
    """Kind of this object."""
    id: str
    """Id of the diagnosis, which is that of its event."""
    job_id: str
    """Id of the job."""
    attempt: int
    """Attempt whose ranks were examined."""
    created_at: datetime
    """When it was taken, by the clock of the driver."""
    trigger: Literal["hang", "request"]
    """`hang`: no rank had reported anything for too long. `request`: a user asked."""
    reason: str
    """Explanation for people."""
    confidence: str
    """`high`: peers wait for the culprit, which waits for none. `medium`: several ranks, or
    none that peers are known to wait for. `low`: no rank stands out."""
    quiet_s: float = 0.0
    """Seconds since a rank had reported anything."""
    culprits: tuple[Culprit, ...] = ()
    """Ranks that the others wait for; empty where none stands out."""
    num_ranks: int = 0
    """Number of ranks."""
    num_silent: int = 0
    """Ranks that have not answered in time."""
    ranks: tuple[ExaminedRank, ...] = ()
    """What the ranks did, at most 64 of them, culprits first."""
    stacks: tuple[RankStack, ...] = ()
    """Different stacks, those of single ranks first."""

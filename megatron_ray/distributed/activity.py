"""Keeps what this process does now, for another thread that looks at it during a hang.

Owns: the phase of the step, the collectives entered in each group, the one that the
host waits in. Torch-free. Must not know: its readers, process groups.

One record per process, as in torch's own flight recorder, because a hang is one of the
process: plain values that only the training thread changes, which costs a collective
less than a microsecond and never waits for a device. Another thread may read them at
any time; they may be of two moments, a collective apart.
"""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol, Self

DEVICE = "device"
"""Name of the host's wait for the device's queue, in which it learns a step's numbers."""


@dataclass(slots=True)
class GroupRecord:
    """The collectives and messages of one process group that this rank has entered."""

    axis: str
    members: tuple[int, ...]
    """Global ranks, in the order of the group."""
    entered: int = 0
    """Number of collectives; the n-th of one rank belongs to the n-th of its peers."""
    sent: dict[int, int] = field(default_factory=dict)
    """Messages by global rank of the receiver; the n-th is its n-th receive."""
    received: dict[int, int] = field(default_factory=dict)


class Operation:
    """One collective, or one message, that this rank has entered.

    Its maker sets the fields: one is made for each collective, and a constructor would
    take a third of the record's time.
    """

    __slots__ = ("group", "name", "number", "peer")
    name: str
    group: GroupRecord | None
    number: int
    peer: int | None
    """Global rank at the other end of a message."""

    @classmethod
    def of(cls, name: str, group: GroupRecord | None = None, number: int = 0) -> Self:
        """Returns an operation without a peer, where time does not matter."""
        operation = cls()
        operation.name = name
        operation.group = group
        operation.number = number
        operation.peer = None
        return operation


class WaitMark(Protocol):
    """Marks a wait in a device's stream."""

    def __call__(self, *, begins: bool) -> None:
        """Marks where a wait begins, or ends."""


class Activity:
    """The record of a process."""

    def __init__(self) -> None:
        self.phase = "start"
        """Part of the run or of the step: `start`, then those of a step's time split."""
        self.microbatch: int | None = None
        """Microbatch of the pass that runs."""
        self.groups: dict[int, GroupRecord] = {}
        """By the identity of the process group: a reference would keep it open."""
        self.waiting: Operation | None = None
        """What the host waits in."""
        self.waiting_since = 0.0
        """By `perf_counter`."""
        self.waited_s = 0.0
        """Seconds that the host has waited in all."""
        self.on_wait: WaitMark | None = None
        """Called around each wait for a collective, where these hold up a device."""
        self.own_s = 0.0
        """Seconds of all steps without waits for other ranks."""
        self.step_s = 0.0
        """Seconds of all steps."""
        self.steps = 0
        """Steps of this process, of which these are the seconds."""

    def begin(self) -> None:
        """Forgets the groups and the phase of an earlier run of this process."""
        self.groups = {}
        self.phase = "start"
        self.microbatch = None
        self.waiting = None
        self.on_wait = None
        self.own_s = 0.0
        self.step_s = 0.0
        self.steps = 0

    def add_step(self, total_s: float, own_s: float) -> None:
        """Adds the times of a step."""
        self.steps += 1
        self.step_s += total_s
        self.own_s += own_s

    def begin_wait(self, operation: Operation) -> float:
        """Marks that the host waits; `end_wait` takes the result."""
        started = perf_counter()
        self.waiting_since = started
        self.waiting = operation
        return started

    def end_wait(self, started: float) -> None:
        """Marks that the host goes on."""
        self.waiting = None
        self.waited_s += perf_counter() - started


PROCESS = Activity()
"""The record of this process."""

"""Decides which jobs of a run synchronize, and which continue from another's state.

Pure. Must not know: clocks, files, tensors.

Every job is one replica group. At a meeting, each shows where it is; those that have come
furthest synchronize, the others take over the state of one of them. One of the jobs, the
host, decides for all; when it is lost, the next one does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

Address = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True)
class Arrival:
    """Where a job is when it comes to a meeting."""

    group: int
    incarnation: str
    """A new one with each start of the job."""
    number: int
    """Counts the arrivals of one incarnation."""
    step: int
    """Steps taken."""
    has_synchronized: bool
    """Whether what was due after that step is done; a job that starts has nothing due."""
    layout: str
    """Of the state of its ranks, which must be that of all jobs."""
    met: str = ""
    """Name of the meeting at which it has last synchronized; empty after a start."""

    @property
    def position(self) -> tuple[int, bool]:
        """How far the job has come."""
        return self.step, self.has_synchronized


@dataclass(frozen=True)
class Meeting:
    """What the jobs of one meeting do together. All ranks of all of them get the same."""

    host: str
    """Incarnation of the job that has decided it."""
    number: int
    """Counts the meetings of one host."""
    store: Address
    """Where the ranks of the jobs find each other: the host's store."""
    members: tuple[Arrival, ...]
    """The jobs that have come furthest, in order of the groups."""
    behind: tuple[Arrival, ...]
    """Those that continue from the state of the first member."""

    @property
    def name(self) -> str:
        """Distinguishes this meeting from all others."""
        return f"{self.host}/{self.number}"

    @property
    def is_due(self) -> bool:
        """Whether the members synchronize; not where they have just started."""
        return not self.members[0].has_synchronized

    def includes(self, arrival: Arrival) -> bool:
        """Returns whether this is the meeting that an arrival waits for."""
        return arrival in self.members or arrival in self.behind

    def index_of(self, group: int) -> int | None:
        """Returns the index of a group among the members; None if it is behind."""
        for index, member in enumerate(self.members):
            if member.group == group:
                return index
        return None


@dataclass(frozen=True)
class Heartbeat:
    """What a job shows to the others while it lives."""

    group: int
    incarnation: str
    store: Address
    """The store of the job's first rank."""
    count: int = 0
    """Changes with each renewal."""
    is_host: bool = False
    """Whether this job decides for all."""
    arrival: Arrival | None = None
    """The last one of this job."""
    meeting: Meeting | None = None
    """The last one that this job has decided on."""


_HEARTBEAT = TypeAdapter(Heartbeat)


def to_json(beat: Heartbeat) -> bytes:
    """Returns a heartbeat as text."""
    return _HEARTBEAT.dump_json(beat)


def from_json(text: bytes) -> Heartbeat:
    """Returns the heartbeat that `to_json` described. Raises ValueError."""
    return _HEARTBEAT.validate_json(text)


def host_of(living: Mapping[int, Heartbeat]) -> Heartbeat:
    """Returns the job that decides for the living ones.

    It stays the same until it is lost. Raises ValueError where none lives.
    """
    hosts = [group for group, beat in living.items() if beat.is_host]
    return living[min(hosts or living)]


def waiting(living: Mapping[int, Heartbeat], last: Meeting | None) -> dict[int, Arrival]:
    """Returns the arrivals, by group, that the host's last meeting has not answered."""
    arrivals = {}
    for group, beat in living.items():
        arrival = beat.arrival
        if arrival is not None and (last is None or not last.includes(arrival)):
            arrivals[group] = arrival
    return arrivals


def is_complete(
    arrivals: Mapping[int, Arrival],
    living: Mapping[int, Heartbeat],
    num_groups: int,
    *,
    has_time: bool,
) -> bool:
    """Returns whether the meeting can take place.

    Every living job must have come. As long as none of them trains, there is time for the
    others to start, too.
    """
    if set(arrivals) != set(living):
        return False
    trains = any(not arrival.has_synchronized for arrival in arrivals.values())
    return trains or len(arrivals) >= num_groups or not has_time


def split(
    arrivals: Sequence[Arrival],
) -> tuple[tuple[Arrival, ...], tuple[Arrival, ...]]:
    """Returns the members of a meeting, and those behind them.

    Jobs that could not see each other for a while have synchronized apart, so equal steps
    are not enough. Raises ValueError without an arrival.
    """
    in_order = sorted(arrivals, key=lambda arrival: arrival.group)
    # The first of those that have come furthest, because groups are in order.
    first = max(in_order, key=lambda arrival: arrival.position)
    members = []
    behind = []
    for arrival in in_order:
        if (arrival.position, arrival.met) == (first.position, first.met):
            members.append(arrival)
        else:
            behind.append(arrival)
    return tuple(members), tuple(behind)

"""Decides which rank a job waits for, from what every rank does at one moment.

Owns: the evidence of a rank, and the reasoning from all of it to the culprits. Pure.
Must not know: Ray, torch, how evidence is gathered, what follows from a diagnosis.

The n-th collective of a rank in a group belongs to the n-th of its peers there, so a
rank that waits in number n waits for the members that have entered fewer. Following
these links ends at a rank that waits for none: the culprit.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

DEVICE = "device"
"""Operation of a host that waits for its device: NCCL's collectives run there."""
QUIET_S = 10.0
"""Seconds without a report after which a healthy job counts as stalled."""


class Confidence(StrEnum):
    """How sure a diagnosis is."""

    HIGH = "high"
    """Peers wait for this rank, and it waits for none."""
    MEDIUM = "medium"
    """Several ranks, or none that peers are known to wait for."""
    LOW = "low"
    """No rank stands out."""


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


@dataclass(frozen=True)
class Wait:
    """The collective or message that a rank's host waits in."""

    operation: str
    axis: str
    number: int
    """Number of the collective within its group, or of the message to or from its peer."""
    group: int
    """Lowest global rank of the group."""
    seconds: float
    peer: int | None = None
    """Global rank at the other end of a message; None for a collective."""

    def __str__(self) -> str:
        if self.operation == DEVICE:
            return "the device's queue"
        if self.peer is None:
            return f"{self.operation} {self.number} of {self.axis}"
        return f"message {self.number} of {self.axis} ({self.operation})"


@dataclass(frozen=True)
class GroupCounts:
    """What a rank has entered in one group."""

    group: int
    """Lowest global rank of the group."""
    entered: int
    sent: Mapping[int, int] = field(default_factory=dict)
    """Messages by global rank of the receiver."""
    received: Mapping[int, int] = field(default_factory=dict)
    """Messages by global rank of the sender."""


@dataclass(frozen=True)
class RankEvidence:
    """What one rank does now; neither values of variables nor its environment."""

    rank: int
    phase: str
    """`start`, a part of the step, `evaluation`, `checkpoint`, or `ended`."""
    step: int = 0
    """Last reported step."""
    microbatch: int | None = None
    wait: Wait | None = None
    """None: it waits in no collective."""
    groups: Mapping[str, GroupCounts] = field(default_factory=dict)
    """By axis."""
    frames: tuple[Frame, ...] = ()
    """The training thread's stack, innermost first."""
    threads: tuple[str, ...] = ()
    """Names and innermost frames of the other threads."""
    memory_bytes: int | None = None
    """Resident memory of the process."""
    free_memory_bytes: int | None = None
    """What its node still has."""
    device_memory_bytes: int | None = None
    """Memory that it has allocated on its GPU."""
    load: float | None = None
    """Load average of its node, over a minute."""
    device_collectives: tuple[str, ...] = ()
    """What NCCL has not finished, oldest first, where torch records it."""


Evidence = Mapping[int, RankEvidence | None]
"""By rank; None for a rank that has not answered."""


@dataclass(frozen=True)
class Diagnosis:
    """Which ranks a job waits for, and why."""

    culprits: tuple[int, ...]
    reason: str
    """One sentence for people."""
    confidence: Confidence


def diagnose(evidence: Evidence, quiet_s: float, *, is_hang: bool) -> Diagnosis:
    """Returns the ranks that the others wait for.

    `quiet_s` are the seconds since any rank has reported anything. A job that is not
    hung and has reported lately has no culprit.
    """
    if not is_hang and quiet_s < QUIET_S:
        reason = f"the job makes progress: a rank has reported {quiet_s:.1f} s ago"
        return Diagnosis((), reason, Confidence.HIGH)
    waits = _Waits(evidence)
    ends = waits.ends()
    if ends:
        return _of_ends(waits, ends)
    if waits.silent:
        reason = f"{_ranks(waits.silent)} {_verb(waits.silent, 'has', 'have')} not answered"
        return Diagnosis(waits.silent, reason, Confidence.MEDIUM)
    return _without_end(waits)


class _Waits:
    """Who waits for whom."""

    def __init__(self, evidence: Evidence) -> None:
        silent = []
        self.answered: dict[int, RankEvidence] = {}
        for rank, answer in sorted(evidence.items()):
            if answer is None:
                silent.append(rank)
            else:
                self.answered[rank] = answer
        self.silent = tuple(silent)
        self._members: dict[tuple[str, int], list[int]] = {}
        for rank, row in self.answered.items():
            for axis, counts in row.groups.items():
                self._members.setdefault((axis, counts.group), []).append(rank)
        self._behind_of: dict[tuple[str, int, int], frozenset[int]] = {}
        self.blockers: dict[int, tuple[int, ...]] = {}
        waiting = []
        for rank, row in self.answered.items():
            self.blockers[rank] = tuple(self._blockers(rank))
            if is_waiting(row):
                waiting.append(rank)
        self.waiting = tuple(waiting)
        """The ranks that wait in something."""

    def ends(self) -> dict[int, int]:
        """Returns the ranks that others wait for and that wait for none.

        Each with the number of ranks that wait for it, directly or not.
        """
        reached: Counter[int] = Counter()
        for rank in self.waiting:
            reached.update(self._ends_from(rank))
        return dict(reached)

    def waiter_of(self, culprit: int) -> int | None:
        """Returns the rank that has waited for the culprit the longest, if any."""
        waiters = [rank for rank in self.waiting if culprit in self.blockers[rank]]
        return max(waiters, key=lambda rank: _seconds(self.answered[rank]), default=None)

    def _ends_from(self, start: int) -> set[int]:
        ends = set()
        passed = {start}
        open_ranks = [start]
        while open_ranks:
            for blocker in self.blockers[open_ranks.pop()]:
                if blocker in passed:
                    continue
                passed.add(blocker)
                row = self.answered.get(blocker)
                if row is None or not is_waiting(row):
                    ends.add(blocker)
                else:
                    open_ranks.append(blocker)
        return ends

    def _blockers(self, rank: int) -> Iterator[int]:
        """Yields the ranks that have not entered what a rank waits in."""
        row = self.answered[rank]
        wait = row.wait
        if wait is None:
            return
        if wait.peer is not None:
            if self._is_behind_message(rank, wait):
                yield wait.peer
            return
        behind: frozenset[int] = frozenset()
        if wait.operation == DEVICE:
            # The host has entered more than the device has done, in every group.
            for axis, counts in row.groups.items():
                behind |= self._behind(axis, counts.group, counts.entered)
        else:
            behind = self._behind(wait.axis, wait.group, wait.number)
        # A rank that does not answer may be a member, too.
        yield from sorted(behind or self.silent)

    def _behind(self, axis: str, group: int, number: int) -> frozenset[int]:
        # Once for all members, of which there may be thousands.
        key = (axis, group, number)
        if key not in self._behind_of:
            behind = set()
            for member in self._members.get((axis, group), ()):
                if self.answered[member].groups[axis].entered < number:
                    behind.add(member)
            self._behind_of[key] = frozenset(behind)
        return self._behind_of[key]

    def _is_behind_message(self, rank: int, wait: Wait) -> bool:
        """Whether the other end of a message has not come to it."""
        assert wait.peer is not None
        peer = self.answered.get(wait.peer)
        if peer is None:
            return True
        counts = peer.groups.get(wait.axis)
        if counts is None:
            return False
        matching = counts.sent
        if wait.operation == "send":
            matching = counts.received
        return matching.get(rank, 0) < wait.number


def is_waiting(row: RankEvidence) -> bool:
    """Whether a rank waits in a collective, also one that is not in the record."""
    if row.wait is not None:
        return True
    # ZeRO-3 and the plan of a checkpoint use torch's collectives directly.
    return bool(row.frames) and "torch/distributed/" in row.frames[0].file


def place_of(row: RankEvidence) -> str:
    """Returns where a rank that waits for no peer is, for people."""
    if row.phase == "ended" or not row.frames:
        return "its training has ended"
    return f"it {_doing(row)} in {_telling_frame(row.frames)}"


def _doing(row: RankEvidence) -> str:
    for frame in row.frames:
        for part, doing in _DOING.items():
            if part in frame.file:
                return doing
    return f"is in phase {row.phase}"


_DOING = {
    "megatron_ray/data/": "reads data",
    "megatron_ray/storage/": "uses the storage",
    "megatron_ray/checkpoint/": "works on a checkpoint",
}
"""What a rank does in a file of these folders."""


def _telling_frame(frames: tuple[Frame, ...]) -> str:
    """Returns the innermost line, and the innermost one of the project's if it differs."""
    innermost = frames[0]
    for frame in frames:
        if frame.file.startswith("megatron_ray/") and frame is not innermost:
            return f"{innermost}, called by {frame}"
        if frame.file.startswith("megatron_ray/"):
            break
    return str(innermost)


def _of_ends(waits: _Waits, ends: Mapping[int, int]) -> Diagnosis:
    """Returns the diagnosis when some ranks wait for others that wait for none."""
    most = max(ends.values())
    culprits = tuple(sorted(rank for rank, number in ends.items() if number == most))
    first = culprits[0]
    confidence = Confidence.MEDIUM
    if len(culprits) == 1:
        confidence = Confidence.HIGH
    if first in waits.silent:
        reason = _of_silent(waits, culprits)
    else:
        where = place_of(waits.answered[first])
        reason = f"{_of_late(waits, culprits)}; {where}"
    return Diagnosis(culprits, reason, confidence)


def _of_silent(waits: _Waits, culprits: tuple[int, ...]) -> str:
    reason = f"{_ranks(culprits)} {_verb(culprits, 'does', 'do')} not answer"
    waiter = waits.waiter_of(culprits[0])
    if waiter is None:
        return reason
    wait = waits.answered[waiter].wait
    return f"{reason}, and rank {waiter} has waited in {wait} for {_seconds_of(wait)}"


def _of_late(waits: _Waits, culprits: tuple[int, ...]) -> str:
    """Returns what the peers of ranks wait in that have not entered it."""
    wait = None
    waiter = waits.waiter_of(culprits[0])
    if waiter is not None:
        wait = waits.answered[waiter].wait
    if wait is None:
        return f"all others wait for {_ranks(culprits)}"
    if wait.operation == DEVICE:
        behind = f"{_ranks(culprits)} {_verb(culprits, 'is', 'are')} behind its peers"
        return f"{behind}, whose devices wait (rank {waiter} for {_seconds_of(wait)})"
    late = f"{_ranks(culprits)} {_verb(culprits, 'has', 'have')} not entered {wait}"
    return f"{late}, in which rank {waiter} has waited for {_seconds_of(wait)}"


def _without_end(waits: _Waits) -> Diagnosis:
    """Returns the diagnosis when each rank waits, or none does."""
    different = _different_paths(waits)
    if different is not None:
        return different
    ring = _ring(waits)
    if ring:
        reason = (
            f"{_ranks(ring)} wait for each other: their collectives are in different orders"
        )
        return Diagnosis(ring, reason, Confidence.MEDIUM)
    if waits.waiting:
        first = waits.waiting[0]
        wait = waits.answered[first].wait
        where = wait or f"a collective of torch, {waits.answered[first].frames[0]}"
        reason = (
            f"{_ranks(waits.waiting)} {_verb(waits.waiting, 'waits', 'wait')} in {where}, "
            "which every member has entered: the network or the transport, or a rank's device"
        )
        return Diagnosis((), reason, Confidence.LOW)
    ranks = tuple(waits.answered)
    reason = "no rank waits in a collective"
    if ranks:
        reason += f"; rank {ranks[0]}: {place_of(waits.answered[ranks[0]])}"
    if len(ranks) == 1:
        return Diagnosis(ranks, f"rank {ranks[0]} is alone: {reason}", Confidence.HIGH)
    return Diagnosis((), reason, Confidence.LOW)


def _different_paths(waits: _Waits) -> Diagnosis | None:
    """Returns the diagnosis when members of a group are in different collectives."""
    names: dict[tuple[str, int, int], dict[str, list[int]]] = {}
    for rank in waits.waiting:
        wait = waits.answered[rank].wait
        if wait is not None and wait.peer is None and wait.operation != DEVICE:
            place = (wait.axis, wait.group, wait.number)
            names.setdefault(place, {}).setdefault(wait.operation, []).append(rank)
    for (axis, _, number), by_name in sorted(names.items()):
        if len(by_name) < 2:
            continue
        fewest = min(by_name, key=lambda name: (len(by_name[name]), name))
        most = max(by_name, key=lambda name: (len(by_name[name]), name))
        culprits = tuple(by_name[fewest])
        reason = (
            f"{_ranks(culprits)} {_verb(culprits, 'is', 'are')} in {fewest} {number} of "
            f"{axis}, where rank {by_name[most][0]} is in {most}: they have taken different "
            "paths through the code"
        )
        return Diagnosis(culprits, reason, Confidence.MEDIUM)
    return None


def _ring(waits: _Waits) -> tuple[int, ...]:
    """Returns ranks that wait for each other in a ring, if any."""
    for start in waits.waiting:
        passed = [start]
        while True:
            blockers = waits.blockers[passed[-1]]
            if not blockers:
                break
            if blockers[0] in passed:
                return tuple(sorted(passed[passed.index(blockers[0]) :]))
            passed.append(blockers[0])
    return ()


def _seconds(row: RankEvidence) -> float:
    if row.wait is None:
        return 0.0
    return row.wait.seconds


def _seconds_of(wait: Wait | None) -> str:
    if wait is None:
        return "some time"
    return f"{wait.seconds:.0f} s"


def _ranks(ranks: Collection[int]) -> str:
    """Returns ranks for people, at most eight of them by number."""
    listed = sorted(ranks)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    shown = list(map(str, listed[:8]))
    if len(listed) > 8:
        return f"ranks {', '.join(shown)} and {len(listed) - 8} more"
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"


def _verb(ranks: Collection[int], of_one: str, of_many: str) -> str:
    if len(ranks) == 1:
        return of_one
    return of_many


def stacks_by_ranks(
    rows: Iterable[RankEvidence], max_stacks: int
) -> list[tuple[list[int], tuple[Frame, ...]]]:
    """Returns the different stacks with their ranks, rare ones first.

    The rank that differs from all others is often the culprit. Lines do not count, as
    ranks that wait in a loop are at different ones.
    """
    groups: dict[tuple[str, ...], list[RankEvidence]] = {}
    for row in rows:
        key = tuple(f"{frame.file} {frame.function}" for frame in row.frames)
        groups.setdefault(key, []).append(row)
    stacks = []
    for group in sorted(groups.values(), key=lambda group: (len(group), group[0].rank)):
        stacks.append(([row.rank for row in group], group[0].frames))
    return stacks[:max_stacks]

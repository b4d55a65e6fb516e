"""Which faults strike which job when; a pure function of the seed.

Owns: kinds of faults, their moments. Must not know: how a fault is made.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

STALL_S = 30.0


class FaultKind(StrEnum):
    """What a fault hits."""

    RANK = "SIGKILL of a rank"
    DRIVER = "SIGKILL of the driver"
    SERVICE = "the service away"
    NODE_KILLED = "SIGKILL of a node"
    NODE_FROZEN = "SIGSTOP of a node"
    STORAGE_FAILS = "EIO for everything"
    WRITES_FAIL = "EIO for writes"
    READS_FAIL = "EIO for reads"
    DISK_FULL = "ENOSPC"
    STALL = "storage stalls"


OF_NODES = (FaultKind.NODE_KILLED, FaultKind.NODE_FROZEN)
OF_STORAGE = (
    FaultKind.STORAGE_FAILS,
    FaultKind.WRITES_FAIL,
    FaultKind.READS_FAIL,
    FaultKind.DISK_FULL,
    FaultKind.STALL,
)
_SECONDS = {
    FaultKind.SERVICE: (0.5, 10.0),
    FaultKind.NODE_FROZEN: (5.0, 40.0),
    FaultKind.STORAGE_FAILS: (3.0, 15.0),
    FaultKind.WRITES_FAIL: (3.0, 20.0),
    FaultKind.READS_FAIL: (3.0, 15.0),
    FaultKind.DISK_FULL: (3.0, 20.0),
    FaultKind.STALL: (STALL_S, STALL_S),
}
"""Shortest and longest duration; other faults are over at once."""


@dataclass(frozen=True)
class Fault:
    """One fault."""

    kind: FaultKind
    pause_s: float
    """Seconds after the moment of its strike."""
    rank: int
    """The rank, or the rank whose node it is."""
    seconds: float = 0.0
    thaws: bool = False
    """Whether a frozen node goes on; else it is killed."""

    def __str__(self) -> str:
        words = str(self.kind)
        if self.kind is FaultKind.RANK or self.kind in OF_NODES:
            words = f"{words} (rank {self.rank})"
        if self.seconds:
            words = f"{words} for {self.seconds:.1f} s"
        if self.kind is FaultKind.NODE_FROZEN:
            end = "thaws" if self.thaws else "is killed"
            words = f"{words}, then it {end}"
        return words


@dataclass(frozen=True)
class Strike:
    """One or two faults at a moment of a job's life."""

    job: int
    step: int
    """The job has come to this step."""
    delay_s: float
    """Seconds after it."""
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        moment = f"job {self.job}, step {self.step} + {self.delay_s:.2f} s"
        first, *others = self.faults
        parts = [f"{moment}: {first}"]
        for fault in others:
            parts.append(f"{fault.pause_s:.1f} s later {fault}")
        return "; ".join(parts)


def make_schedule(
    chance: random.Random,
    kinds: Sequence[FaultKind],
    *,
    num_jobs: int,
    per_job: int,
    num_double: int,
    num_steps: int,
) -> list[Strike]:
    """Returns `num_jobs * per_job` strikes, of which `num_double` are of two faults.

    All kinds occur equally often, up to one.
    """
    num_strikes = num_jobs * per_job
    double = set(chance.sample(range(num_strikes), num_double))
    bag: list[FaultKind] = []
    strikes = []
    for number in range(num_strikes):
        job, turn = divmod(number, per_job)
        # Each strike of a job has its own part of the job's steps.
        part = num_steps // (per_job + 1)
        step = part // 2 + turn * part + chance.randrange(part)
        faults = [_fault(chance, _draw(chance, kinds, bag), 0.0)]
        if number in double:
            second = _draw(chance, kinds, bag, after=faults[0].kind)
            faults.append(_fault(chance, second, chance.uniform(0.0, 3.0)))
        delay_s = chance.uniform(0.0, 1.5)
        strikes.append(Strike(job, step, delay_s, tuple(faults)))
    return strikes


def _draw(
    chance: random.Random,
    kinds: Sequence[FaultKind],
    bag: list[FaultKind],
    after: FaultKind | None = None,
) -> FaultKind:
    """Takes a kind from a shuffled bag, which is filled again when it is empty."""
    if not bag:
        bag.extend(kinds)
        chance.shuffle(bag)
    # The storage has one fault at a time.
    for index, kind in enumerate(bag):
        if after is None or not (kind in OF_STORAGE and after in OF_STORAGE):
            return bag.pop(index)
    return chance.choice([kind for kind in kinds if kind not in OF_STORAGE])


def _fault(chance: random.Random, kind: FaultKind, pause_s: float) -> Fault:
    shortest, longest = _SECONDS.get(kind, (0.0, 0.0))
    return Fault(
        kind,
        pause_s,
        chance.randrange(2),
        chance.uniform(shortest, longest),
        chance.random() < 0.5,
    )

"""Keeps copies of ranks' states in the memory of this process, over its attempts.

Owns: which copies are kept and for how long, and that a copy is whole before it counts.
Must not know: Ray, torch, sockets, what is in a copy.

At most two copies are kept of this rank and two of the rank whose partner it is: the
newest, which may be incomplete on other ranks, and the one before it.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from workers.decisions.peers.copies import CopyFacts
from workers.exceptions import WorkersError

NUM_COPIES = 2
"""Copies that a process keeps of one rank."""


class PeerCopyError(WorkersError):
    """A copy is missing, damaged or another one than was asked for."""


@dataclass(frozen=True)
class CopyKey:
    """Identifies a copy; one with any other value is never used in its place."""

    job_id: str
    layout: str
    attempt: int
    step: int
    rank: int

    @property
    def facts(self) -> CopyFacts:
        """The key as the driver gets it."""
        return CopyFacts(
            layout=self.layout, attempt=self.attempt, step=self.step, rank=self.rank
        )


@dataclass(frozen=True, eq=False)
class KeptCopy:
    """A whole copy in memory."""

    key: CopyKey
    header: bytes
    """JSON: what the parts are, and the state other than tensors."""
    parts: tuple[memoryview, ...]
    """The tensors' memory, published files, and at the end rank 0's reports."""
    checksum: int
    memory: Any = None
    """What the library allocated for the first part; None for a copy from a peer."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(map(len, self.parts))

    def verify(self) -> None:
        """Raises PeerCopyError when the bytes are not those that were sent."""
        if checksum_of(self.header, self.parts) != self.checksum:
            raise PeerCopyError(f"the copy of step {self.key.step} arrived damaged")


def checksum_of(header: bytes, parts: Sequence[memoryview]) -> int:
    """Returns the checksum of a copy. Lets other threads run meanwhile."""
    checksum = crc32(header)
    for part in parts:
        checksum = crc32(part, checksum)
    return checksum


def empty_memory(num_bytes: int) -> memoryview:
    """Returns memory to receive into.

    Not filled with zeros, which would stop all threads for seconds.
    """
    return np.empty(num_bytes, dtype=np.uint8).data


class PeerCopies:
    """The copies in one process: of its own rank, and of the rank whose partner it is."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self._lock = threading.Lock()
        self._layout = ""
        self._attempt = 0
        self._resumed: tuple[int, int] | None = None
        self._own: list[KeptCopy] = []
        self._received: dict[int, list[KeptCopy]] = {}
        self._free: list[Any] = []

    def facts(self) -> tuple[CopyFacts, ...]:
        """Returns which copies are here."""
        with self._lock:
            copies = list(self._own)
            for received in self._received.values():
                copies += received
        facts = []
        for copy in copies:
            facts.append(copy.key.facts)
        return tuple(facts)

    def find(self, attempt: int, step: int, rank: int) -> KeptCopy | None:
        """Returns the copy of a rank after a step of an attempt, if it is here."""
        with self._lock:
            for copy in self._own + self._received.get(rank, []):
                key = copy.key
                if (key.attempt, key.step, key.rank) == (attempt, step, rank):
                    return copy
        return None

    def begin(self, layout: str, attempt: int, resumed: tuple[int, int] | None) -> None:
        """Begins an attempt: drops all copies but those that it continues from.

        `resumed` is their attempt and step; None: the run continues from elsewhere.
        """
        with self._lock:
            self._layout = layout
            self._attempt = attempt
            self._resumed = resumed
            for copy in list(self._own):
                if not self._is_resumed(copy.key):
                    self._drop_own(copy)
            for received in self._received.values():
                received[:] = filter(lambda copy: self._is_resumed(copy.key), received)

    # ---- this rank's own copies

    def adopt(self, copy: KeptCopy) -> None:
        """Makes a copy, wherever it was kept, this rank's own and only one."""
        with self._lock:
            for other in list(self._own):
                if other is not copy:
                    self._drop_own(other)
            self._own = [copy]

    def reserve(self, num_bytes: int, allocate: Callable[[int], Any]) -> None:
        """Makes sure that there is memory for two own copies."""
        with self._lock:
            # Memory of another size is left from another layout.
            self._free = [memory for memory in self._free if memory.nbytes == num_bytes]
            in_use = 0
            for copy in self._own:
                in_use += copy.memory is not None
            while len(self._free) + in_use < NUM_COPIES:
                self._free.append(allocate(num_bytes))

    def next_memory(self) -> Any:
        """Returns memory for the next own copy; drops all older ones but the last."""
        with self._lock:
            for copy in self._own[:-1]:
                self._drop_own(copy)
            return self._free.pop()

    def keep_own(self, copy: KeptCopy) -> None:
        """Adds a whole copy of this rank; one of an ended attempt is dropped."""
        with self._lock:
            self._own.append(copy)
            if copy.key.attempt != self._attempt:
                self._drop_own(copy)

    # ---- copies of other ranks

    def check(self, key: CopyKey) -> None:
        """Raises PeerCopyError for a copy that does not belong to this attempt."""
        with self._lock:
            if (key.job_id, key.layout) != (self.job_id, self._layout):
                raise PeerCopyError(f"the copy of step {key.step} belongs to another run")
            if key.attempt != self._attempt and not self._is_resumed(key):
                raise PeerCopyError(
                    f"the copy of step {key.step} is from attempt {key.attempt}, and this "
                    f"is attempt {self._attempt}"
                )

    def has(self, key: CopyKey) -> bool:
        """Whether a received copy is here and whole."""
        with self._lock:
            for copy in self._received.get(key.rank, []):
                if copy.key == key:
                    return True
        return False

    def memory_for(self, key: CopyKey, num_bytes: int) -> memoryview:
        """Returns memory to receive a rank's copy into.

        All older copies of the rank but the last are dropped, and those of ranks that
        have other partners by now.
        """
        with self._lock:
            received = self._received.get(key.rank, [])
            # A copy of a new step comes only once all ranks' last ones are at their
            # partners, so no other rank needs what is left here of earlier attempts.
            if key.attempt == self._attempt:
                self._received = {}
            self._received[key.rank] = received[-1:]
        for copy in received[:-1]:
            if len(copy.parts[0]) == num_bytes:
                return copy.parts[0]
        return empty_memory(num_bytes)

    def keep_received(self, copy: KeptCopy) -> None:
        """Adds a whole copy of another rank. Raises PeerCopyError for a damaged one."""
        copy.verify()
        # Again, because an attempt may have begun meanwhile.
        self.check(copy.key)
        with self._lock:
            self._received.setdefault(copy.key.rank, []).append(copy)

    # ---- under the lock

    def _is_resumed(self, key: CopyKey) -> bool:
        return key.layout == self._layout and (key.attempt, key.step) == self._resumed

    def _drop_own(self, copy: KeptCopy) -> None:
        """Drops an own copy; its memory is used again."""
        if copy.memory is not None:
            self._free.append(copy.memory)
        self._own.remove(copy)

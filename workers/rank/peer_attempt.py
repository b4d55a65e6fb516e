"""Makes, sends and restores the copies of one rank in one attempt.

Owns: the thread that sends, the addresses in the attempt's store, the agreement of all
ranks to continue from copies. Must not know: Ray, HTTP, which copies to continue from.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.distributed.stores import Store
from megatron_ray.reports import PeerCopiesRefusedReport, PhaseReport, Report
from megatron_ray.training.state_copy import StateCopy
from workers.decisions.peers.copies import layout_of
from workers.rank.messages import CopySource, StartRequest
from workers.rank.peer_copies import (
    CopyKey,
    KeptCopy,
    PeerCopyError,
    checksum_of,
)
from workers.rank.peer_server import PeerAddress, connected
from workers.rank.process_copies import ProcessCopies

_RETRY_S = 1.0
_REFUSED = "copies/refused"


class AttemptCopies:
    """The copies of one rank in one attempt: what a session's CopyStore is.

    `close` ends the thread; a copy that is being sent is abandoned.
    """

    def __init__(self, peers: ProcessCopies, request: StartRequest, store: Store) -> None:
        self._peers = peers
        self._request = request
        self._store = store
        self._rank = request.env.rank
        self._layout = layout_of(request.spec, request.data, request.env.world_size)
        self._changed = threading.Condition()
        self._next: Callable[[], KeptCopy] | None = None
        self._is_closed = False
        self._memory: Any = None
        self._partner_address: PeerAddress | None = None
        self.restored: StateCopy | None = None
        """The copy that the run continues from, on all ranks or on none."""
        self.is_sending = False
        """Whether the last copy has not arrived at the partner yet."""
        source = request.copy
        resumed = None
        if source is not None:
            resumed = (source.attempt, source.step)
        peers.copies.begin(self._layout, request.attempt, resumed)
        # After `begin`, so that a peer that knows the address finds the attempt begun.
        store.set(_address_key(self._rank), peers.address.to_json())
        threading.Thread(target=self._run, name="send-copies", daemon=True).start()

    # ---- the begin: all ranks continue from copies, or none does

    def restore(self, mesh: ParallelMesh, report: Callable[[Report], None]) -> None:
        """Fetches this rank's copy where the request names one. Collective.

        When a rank has none, no rank uses its own, and rank 0 reports why.
        """
        assert self._request.partner is not None
        self._partner_address = self._address_of(self._request.partner)
        source = self._request.copy
        if source is None:
            return
        began = time.monotonic()
        copy = None
        try:
            copy = self._fetch(source)
        except (PeerCopyError, OSError) as error:
            cause = f"rank {self._rank}: {error}"
            self._peers.log(f"cannot continue from the copy of step {source.step}: {error}")
            self._store.set(_REFUSED, cause)
        refusals = torch.tensor(float(copy is None), device=mesh.device)
        refusals = collectives.all_reduce(refusals, mesh.world_group)
        if copy is None or refusals.item():
            self._peers.copies.begin(self._layout, self._request.attempt, None)
            if self._rank == 0:
                cause = self._store.get(_REFUSED).decode(errors="replace")
                report(PeerCopiesRefusedReport(source.step, cause))
            return
        self.restored = _state_of(copy)
        # The partner may be another one than in the attempt before.
        self._send(lambda: copy)
        detail = {"step": source.step, "bytes": copy.num_bytes}
        report(PhaseReport("copies", time.monotonic() - began, detail))

    def _fetch(self, source: CopySource) -> KeptCopy:
        """Raises PeerCopyError, OSError."""
        key = CopyKey(
            self._peers.copies.job_id, self._layout, source.attempt, source.step, self._rank
        )
        copy = self._peers.copies.find(source.attempt, source.step, self._rank)
        if copy is None:
            with connected(self._address_of(source.holder)) as client:
                copy = client.get(key)
        if copy.key != key:
            raise PeerCopyError(f"the copy of step {source.step} belongs to another run")
        self._peers.copies.adopt(copy)
        return copy

    # ---- the session's CopyStore

    def reserve(self, num_bytes: int, allocate: Callable[[int], Any]) -> None:
        """Allocates the memory of two copies, unless it is there from an earlier run."""
        self._peers.copies.reserve(num_bytes, allocate)

    def next_memory(self) -> Any:
        """Returns the memory for a new copy; all older ones but the last are dropped."""
        self._memory = self._peers.copies.next_memory()
        return self._memory

    def keep(self, copy: StateCopy, wait: Callable[[], None]) -> None:
        """Keeps a copy and starts sending it, once `wait`, which may block, returns."""
        memory = self._memory

        def finish() -> KeptCopy:
            wait()
            kept = self._kept(copy, memory)
            self._peers.copies.keep_own(kept)
            return kept

        self._send(finish)

    def close(self) -> None:
        """Ends the thread without waiting for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _kept(self, copy: StateCopy, memory: Any) -> KeptCopy:
        key = CopyKey(
            self._peers.copies.job_id,
            self._layout,
            self._request.attempt,
            copy.step,
            self._rank,
        )
        header = {
            "step": copy.step,
            "layout": copy.layout,
            "state": copy.state,
            "published": list(copy.published),
        }
        parts = [copy.memory]
        for content in copy.published.values():
            parts.append(memoryview(content))
        # Rank 0's node may be lost together with its report file.
        reports = b""
        if self._rank == 0:
            reports = self._peers.unstored_reports(self._request)
        parts.append(memoryview(reports))
        text = json.dumps(header).encode()
        return KeptCopy(key, text, tuple(parts), checksum_of(text, parts), memory)

    # ---- the thread that sends

    def _send(self, finish: Callable[[], KeptCopy]) -> None:
        with self._changed:
            self._next = finish
            self.is_sending = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._next is not None)
                finish = self._next
                self._next = None
            # Also a last copy of a closed attempt is finished: it is this rank's own.
            if finish is None:
                return
            copy = finish()
            if self._deliver(copy):
                self.is_sending = False

    def _deliver(self, copy: KeptCopy) -> bool:
        """Sends a copy until it has arrived; returns False when the attempt has ended."""
        failures = 0
        while not self._is_closed:
            try:
                self._put(copy)
                return True
            except (PeerCopyError, OSError) as error:
                failures += 1
                if failures == 1:
                    self._peers.log(
                        f"cannot send the copy of step {copy.key.step} to rank "
                        f"{self._request.partner}, trying again: {error}"
                    )
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, _RETRY_S)
        return False

    def _put(self, copy: KeptCopy) -> None:
        assert self._partner_address is not None
        with connected(self._partner_address) as client:
            client.put(copy)

    def _address_of(self, rank: int) -> PeerAddress:
        # Waits until the rank has begun the attempt.
        return PeerAddress.from_json(self._store.get(_address_key(rank)))


@contextmanager
def attempt_copies(
    peers: ProcessCopies | None,
    request: StartRequest,
    store: Store,
    mesh: ParallelMesh,
    report: Callable[[Report], None],
) -> Iterator[AttemptCopies | None]:
    """Yields the attempt's copies, restored where possible; None for a job without."""
    if peers is None or request.partner is None:
        yield None
        return
    copies = AttemptCopies(peers, request, store)
    try:
        copies.restore(mesh, report)
        yield copies
    finally:
        copies.close()


def _state_of(copy: KeptCopy) -> StateCopy:
    header = json.loads(copy.header)
    memory, *published, _ = copy.parts
    files = {}
    for name, content in zip(header["published"], published, strict=True):
        files[name] = bytes(content)
    return StateCopy(header["step"], memory, header["layout"], header["state"], files)


def _address_key(rank: int) -> str:
    return f"copies/{rank}"

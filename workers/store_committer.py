"""Commits the checkpoints of a run that has no driver.

Owns: the counters in the store that show which ranks have written their part. Must not
know: Ray, HTTP, how the run is started.
"""

import queue
import threading
import time
from contextlib import suppress

from megatron_ray.distributed.stores import Store
from megatron_ray.reports import (
    CheckpointFailedReport,
    CheckpointReport,
    EvalReport,
    MonitorReport,
    PhaseReport,
    Report,
    StepReport,
)
from workers.driver.commit import CheckpointLedger, WholeCheckpoint, commit_whole
from workers.protocol.job import JobSpec
from workers.rank.messages import StartRequest
from workers.run_start import RunStart

_COMMIT_CHECK_S = 0.02


class StoreCommitter:
    """Commits checkpoints on rank 0 once all ranks have counted their parts in the store.

    On other ranks it only counts. It uses its own thread, since rank 0 waits for the
    slowest rank.
    """

    def __init__(
        self, spec: JobSpec, request: StartRequest, store: Store, start: RunStart
    ) -> None:
        assert spec.storage is not None
        self._path = spec.storage.path
        self._keep_last = spec.checkpoint.keep_last
        self._request = request
        self._store = store
        self._start = start
        self._is_first = request.env.rank == 0
        self._ledger = CheckpointLedger(1, request.attempt)
        self._items: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self.committed: str | None = None
        """Path of the newest checkpoint committed here."""
        self.last_step = 0
        """Last step that this rank has reported."""
        self._newest_save = 0
        """Step of the last checkpoint that this rank has written or given up."""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def report(self, item: Report) -> None:
        """Adds a report of this rank; never blocks.

        Raises the first error of a commit, so that no run trains on without checkpoints.
        """
        self.raise_error()
        if isinstance(item, StepReport):
            self.last_step = item.step
        if isinstance(item, CheckpointReport | CheckpointFailedReport):
            self._newest_save = item.step
        # Phases are neither counted nor stored in a checkpoint.
        if not isinstance(item, PhaseReport):
            self._items.put(item)

    def raise_error(self) -> None:
        """Raises the first error of the thread, if there was one."""
        if self._error is not None:
            raise self._error

    def rank_failed(self) -> None:
        """Lets rank 0 stop waiting for parts: a rank has failed and writes no more."""
        # The store may have ended with another rank.
        with suppress(RuntimeError):
            self._store.add(self._failed_key, 1)

    def close(self) -> None:
        """Waits until everything reported so far is committed."""
        self._items.put(None)
        self._thread.join()

    @property
    def _failed_key(self) -> str:
        return f"failed/{self._request.attempt}"

    def _run(self) -> None:
        while True:
            item = self._items.get()
            if item is None:
                return
            try:
                self._handle(item)
            except Exception as error:  # noqa: BLE001 - raised again by the main thread, which must not miss it
                self._error = self._error or error

    def _handle(self, item: Report) -> None:
        if isinstance(item, CheckpointReport):
            self._count(item)
        elif isinstance(item, CheckpointFailedReport):
            self._store.add(self._unwritten_key(item.step), 1)
        elif self._is_first and isinstance(item, StepReport | EvalReport | MonitorReport):
            self._ledger.reported(
                {
                    "kind": item.kind,
                    "attempt": self._request.attempt,
                    "data": dict(vars(item)),
                }
            )
        # A checkpoint that all ranks have written is complete only after rank 0 has
        # reported its step.
        while self._is_first:
            whole = self._ledger.take_whole()
            if whole is None:
                return
            self._commit(whole)

    def _count(self, item: CheckpointReport) -> None:
        """Adds this rank's part of a checkpoint; on rank 0, waits for all others'."""
        key = f"written/{self._request.attempt}/{item.step}"
        # Bytes before the count: rank 0 reads the sum once the count is complete.
        self._store.add(f"{key}/bytes", item.bytes_written)
        self._store.add(key, 1)
        if self._is_first and self._await_all(key, item.step):
            num_bytes = self._store.add(f"{key}/bytes", 0)
            self._ledger.written(0, item.step, item.path, num_bytes)

    def _unwritten_key(self, step: int) -> str:
        return f"unwritten/{self._request.attempt}/{step}"

    def _await_all(self, key: str, step: int) -> bool:
        """Returns whether all ranks have written their parts, once that is certain.

        Raises TimeoutError.
        """
        timeout_s = self._request.timeout_s
        deadline = time.monotonic() + timeout_s
        # Adding 0 reads the counter; `get` would block while it does not exist.
        while self._store.add(key, 0) < self._request.env.world_size:
            if self._store.add(self._failed_key, 0):
                raise TimeoutError(
                    "a rank failed before it had written its part of the checkpoint, which "
                    "stays uncommitted"
                )
            # A rank tries its last part again, but never one that a later save replaces.
            if self._newest_save > step and self._store.add(self._unwritten_key(step), 0):
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not every rank wrote its part of the checkpoint within {timeout_s:g} s; "
                    "it stays uncommitted"
                )
            time.sleep(_COMMIT_CHECK_S)
        return True

    def _commit(self, whole: WholeCheckpoint) -> None:
        # Another run may have been started in the same folder meanwhile.
        if self._start.claim is not None:
            self._start.claim.require(self._path)
        manifest = {
            "world_size": self._request.env.world_size,
            "spec": self._request.spec,
            **self._start.run.to_manifest(),
        }
        commit_whole(whole, self._path, self._keep_last, manifest)
        self.committed = whole.path

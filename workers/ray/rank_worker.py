"""Runs one rank's process as a Ray actor.

Owns: the actor, its fence, its lease, the store it serves. Must not know: HTTP, the
work of the training thread.

A worker holds no handle to its driver; it accepts calls of the one with the highest
(attempt, epoch). Torch is imported after output is redirected to the log, so this
module must not import it.
"""

import contextlib
import gc
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import ray

from megatron_ray.commands import Command, ProfileRequest
from workers.decisions.peers.copies import CopyFacts
from workers.decisions.placement import SlotFacts
from workers.decisions.ranks.diagnosis import RankEvidence
from workers.rank.attempt import LINGER_S, RankAttempt, Train, import_and_train
from workers.rank.environment import (
    lower_priority,
    prepare_process,
    raise_priority,
    set_visible_gpu,
)
from workers.rank.evidence import stacks_from_outside
from workers.rank.log_file import LogFile, log_path
from workers.rank.messages import (
    BusyError,
    Fence,
    FencedError,
    NextReply,
    Poll,
    RankState,
    StartRequest,
)
from workers.rank.process_copies import ProcessCopies
from workers.rank.spool import Line
from workers.ray.nodes import (
    job_folder,
    link_into_ray_logs,
    nvlink_domain,
    own_address,
)

LEASE_S = 300.0
"""Seconds without a driver's call after which a worker ends itself."""
SWITCH_S = 0.001
"""Switch interval of the interpreter, after which a thread that answers the driver
yields to the training thread. Python's default of 5 ms is a fifth of a short step."""
LEAVE_S = 4.0
"""Seconds that `leave` waits for the training thread to leave its collectives."""
_EXIT_LEASE_EXPIRED = 3
_BOOT_LOG_BYTES = 64 << 10


class FenceGuard:
    """Admits callers with ascending fences; a replaced driver is refused."""

    def __init__(self) -> None:
        self._latest = Fence(0, 0)
        self._lock = threading.Lock()

    def admit(self, fence: Fence) -> None:
        """Records a caller's fence.

        Raises FencedError for a lower epoch, or a lower attempt in the same epoch, than
        was seen before.
        """
        with self._lock:
            latest = self._latest
            if (fence.epoch, fence.attempt) < (latest.epoch, latest.attempt):
                raise FencedError(
                    f"(attempt {fence.attempt}, epoch {fence.epoch}) was replaced by "
                    f"({latest.attempt}, {latest.epoch})"
                )
            self._latest = fence


class RankWorker:
    """One rank's process.

    `next` runs in a concurrency group of its own, so it answers while any other method is
    running. Every method raises FencedError when the caller was replaced.
    """

    train: ClassVar[Train] = staticmethod(import_and_train)

    def __init__(
        self, job_id: str, slot: int, bundle: int, num_threads: int, standby: bool = False
    ) -> None:
        # A spare keeps Ray's low priority until its attempt starts.
        if not standby:
            raise_priority()
        self._job_id = job_id
        self._slot = slot
        self._bundle = bundle
        self._standby = standby
        self._node_id = ray.get_runtime_context().get_node_id()
        self._address = own_address()
        self._folder = job_folder(self._node_id, job_id)
        # The order matters: the log comes before anything that may print or crash, the
        # environment before torch is imported.
        # For users who open the actor's log in Ray's dashboard.
        os.write(2, f"the output of this process is in {self._folder}\n".encode())
        self._log = LogFile(self._folder / f"slot-{slot:05d}-{os.getpid()}.log")
        self._log.capture()
        link_into_ray_logs(self._folder)
        prepare_process(num_threads, self._address)
        sys.setswitchinterval(SWITCH_S)
        self._guard = FenceGuard()
        self._attempt: RankAttempt | None = None
        self._polled_at = time.monotonic()
        self._store: Any = None
        self._copies = ProcessCopies(job_id, self._address, self._folder)
        self._preload_thread = threading.Thread(target=self._preload, daemon=True)
        self._preload_thread.start()
        threading.Thread(target=self._watch_lease, daemon=True).start()

    def __repr__(self) -> str:
        """Returns what Ray's dashboard lists: of equal length, so that slots sort well."""
        return f"{self._job_id} slot {self._slot:05d}"

    def probe(self, fence: Fence) -> SlotFacts:
        """Returns where this worker runs; renews its lease, also that of a spare."""
        self._guard.admit(fence)
        self._polled_at = time.monotonic()
        gpu = None
        assigned_gpus = ray.get_gpu_ids()
        if assigned_gpus:
            gpu = int(assigned_gpus[0])
        return SlotFacts(
            slot=self._slot,
            bundle=self._bundle,
            node_id=self._node_id,
            address=self._address,
            pid=os.getpid(),
            gpu=gpu,
            is_spare=self._standby,
            domain=nvlink_domain(self._node_id),
            local_dir=str(self._folder),
        )

    def open_store(self, fence: Fence) -> tuple[str, int]:
        """Returns host and port of a TCPStore that this process serves while it lives.

        Each attempt uses its own prefix in it. The kernel chooses the port.
        """
        self._guard.admit(fence)
        # The store is part of torch, which the preload thread is still importing.
        self._preload_thread.join()
        if self._store is None:
            from megatron_ray.distributed.stores import serve_store

            self._store = serve_store(self._address)
        return self._address, self._store.port

    def start(self, fence: Fence, request: StartRequest) -> None:
        """Starts the attempt's training thread; repeating a request changes nothing.

        Raises BusyError while the training thread of another attempt is alive.
        """
        self._guard.admit(fence)
        current = self._attempt
        # A repeated request has no effect.
        if current is not None:
            if current.request.attempt == request.attempt:
                return
            if current.thread.is_alive():
                raise BusyError(f"attempt {current.request.attempt} is still running")
            current.spool.close()
        # Ray assigned no GPU to a process that replaces a dead rank; it uses the dead
        # rank's GPU, which belongs to the same bundle.
        if request.gpu is not None and not ray.get_gpu_ids():
            set_visible_gpu(request.gpu)
        self._start_log(request)
        train: Callable[..., str] = type(self).train
        if request.partner is not None:
            self._copies.stored = 0
            train = partial(train, copies=self._copies)
        self._attempt = RankAttempt(request, train, self._folder)
        self._attempt.thread.start()

    @ray.method(concurrency_group="poll")
    def next(self, fence: Fence, poll: Poll) -> NextReply:
        """Returns reports since the cursor, log bytes and the rank's state.

        Waits up to `poll.wait_s` for a report.
        """
        self._guard.admit(fence)
        self._polled_at = time.monotonic()
        self._copies.stored = poll.stored
        attempt = self._attempt
        if attempt is None:
            time.sleep(min(poll.wait_s, LINGER_S))
            return NextReply(RankState.IDLE, 0, poll.after or 0)
        return attempt.next(poll, self._log)

    @ray.method(concurrency_group="inspect")
    def inspect(self, fence: Fence) -> RankEvidence | None:
        """Returns what the attempt's training thread does now; None without an attempt."""
        self._guard.admit(fence)
        attempt = self._attempt
        if attempt is None:
            return None
        return attempt.evidence()

    @ray.method(concurrency_group="inspect")
    def stacks_from_outside(self, fence: Fence, pid: int) -> str:
        """Returns the stacks of another worker on this node, which does not answer."""
        self._guard.admit(fence)
        return stacks_from_outside(pid)

    @ray.method(concurrency_group="inspect")
    def profile(self, fence: Fence, request: ProfileRequest) -> bool:
        """Passes a request on to the caller's attempt; returns whether it runs here.

        The training thread takes it at its next step, and reports what comes of it.
        """
        self._guard.admit(fence)
        attempt = self._attempt
        if attempt is None or attempt.request.attempt != fence.attempt:
            return False
        attempt.profile = request
        return not attempt.state.is_over

    def command(self, fence: Fence, command: Command) -> None:
        """Puts a command into the inbox of the caller's attempt, if it is running here."""
        self._guard.admit(fence)
        attempt = self._attempt
        # A command for an earlier attempt must not stop this one.
        if attempt is not None and attempt.request.attempt == fence.attempt:
            attempt.inbox.put(command)

    def leave(self, fence: Fence, wait_s: float = LEAVE_S) -> bool:
        """Stops the training thread; returns whether the process can be reused.

        It can once the thread has left its process groups. A rank that is blocked in a
        collective leaves it when its peers close their connections; otherwise its
        process must be replaced.
        """
        self._guard.admit(fence)
        attempt = self._attempt
        if attempt is None:
            return True
        attempt.inbox.put(Command.STOP)
        attempt.thread.join(wait_s)
        return not attempt.thread.is_alive()

    def copies(self, fence: Fence) -> tuple[CopyFacts, ...]:
        """Returns which copies of ranks' states are in this process."""
        self._guard.admit(fence)
        return self._copies.facts()

    def copied_reports(self, fence: Fence, attempt: int, step: int) -> Sequence[Line]:
        """Returns the reports in rank 0's copy of a step, if it is in this process."""
        self._guard.admit(fence)
        return self._copies.reports_in_copy(attempt, step)

    def retire(self, fence: Fence) -> str:
        """Deletes the files of an ended job on this node; returns the node id."""
        self._guard.admit(fence)
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._node_id

    def _start_log(self, request: StartRequest) -> None:
        """Opens the attempt's log; the first one begins with the start-up's output."""
        boot_output = b""
        if self._attempt is None:
            _, boot_output = self._log.read(0, _BOOT_LOG_BYTES)
        log = LogFile(log_path(self._folder, request.attempt, request.env.rank))
        log.capture()
        os.write(1, boot_output)
        self._log.close()
        self._log = log

    def _preload(self) -> None:
        """Imports torch and the library while the driver probes the workers.

        A failed import is ignored, because the training thread repeats and reports it.
        """
        if self._standby:
            lower_priority()
        # Imports create no garbage, and collecting would take a tenth of their time.
        gc.disable()
        try:
            with contextlib.suppress(ImportError):
                import workers.rank.session  # noqa: F401
        finally:
            # Imported objects never become garbage, so collections during training skip
            # them.
            gc.freeze()
            gc.enable()

    def _watch_lease(self) -> None:
        """Ends the process when no driver has polled it for the length of a lease."""
        while time.monotonic() - self._polled_at < LEASE_S:
            time.sleep(LEASE_S / 30)
        os.write(2, f"[no driver polled for {LEASE_S:.0f} s: this worker exits]\n".encode())
        os._exit(_EXIT_LEASE_EXPIRED)

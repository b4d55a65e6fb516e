"""RankWorker: the Ray actor around one rank.

Owns: the training thread, the report spool, the inbox, the lease.

The training thread never calls Ray: it writes to the spool and reads the inbox. A
worker holds no handle to its driver; it answers whoever has the highest (attempt,
epoch). Torch is imported after the log is captured, so this module must not import it.
"""

import contextlib
import gc
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import ray

from megatron_ray.commands import Command
from megatron_ray.reports import (
    CheckpointReport,
    EvalReport,
    PhaseReport,
    Report,
    StepReport,
)
from workers.decisions.placement import SlotFacts
from workers.rank.environment import (
    let_ranks_go_first,
    prepare_process,
    run_before_others,
    see_gpu,
)
from workers.rank.messages import (
    BusyError,
    Fence,
    FencedError,
    NextReply,
    Poll,
    RankState,
    StartOrder,
)
from workers.rank.spool import LogFile, Spool, SpoolReader
from workers.ray.nodes import domain_of, job_folder, node_info, own_address, ray_nodes

LEASE_S = 300.0
"""A worker that no driver has asked for so long ends itself."""
LINGER_S = 0.5
"""Step reports wait so long for company: a call per step would cost more than the step
of a small model."""
SWITCH_S = 0.001
"""A thread that answers the driver gives the interpreter back to the training thread
after so long; Python's own 5 ms are a fifth of a short step."""
LEAVE_S = 4.0
"""How long `leave` waits for the training thread to come out of its collectives."""

Train = Callable[[StartOrder, Callable[[Report], None], Callable[[], Command]], str]


def train_for_real(
    order: StartOrder, report: Callable[[Report], None], poll: Callable[[], Command]
) -> str:
    """The library's session; imports torch."""
    from workers.rank.session import train

    return train(order, report, poll)


class Inbox:
    """One command at a time from the driver to the training loop; a stop stays, a
    checkpoint request is taken once.
    """

    def __init__(self) -> None:
        self._command = Command.CONTINUE

    def put(self, command: Command) -> None:
        """The stronger of two commands wins."""
        self._command = max(self._command, command)

    def take(self) -> Command:
        """What the loop should do at this step boundary; costs nothing."""
        command = self._command
        if command is Command.CHECKPOINT:
            self._command = Command.CONTINUE
        return command


class RankAttempt:
    """The training thread of one attempt, and what it has said."""

    def __init__(self, order: StartOrder, train: Train, folder: Path) -> None:
        self.order = order
        self.inbox = Inbox()
        self.state = RankState.RUNNING
        self.step = 0
        self.error: dict[str, Any] | None = None
        path = report_file(folder, order.attempt, order.env.rank)
        self.spool = Spool(path, order.attempt)
        self._first_n = self.spool.last_n
        self._reader = SpoolReader(path)
        self._reading = threading.Lock()
        self._news = threading.Event()
        self._urgent = threading.Event()
        self._released = 0
        self._train = train
        self.thread = threading.Thread(
            target=self._run, name=f"attempt-{order.attempt}", daemon=True
        )

    def report(self, item: Report) -> None:
        """Takes a report from the training thread or the checkpoint writer's: one write
        to a local file.
        """
        self.spool.append(item.kind, vars(item))
        if isinstance(item, StepReport):
            if not self.step:
                self._urgent.set()  # the first one makes the job a running one
            self.step = item.step
        else:
            self._log(_in_words(item))
        if isinstance(item, CheckpointReport | PhaseReport):
            self._urgent.set()
        self._news.set()

    def _log(self, text: str) -> None:
        """A line in the rank's log; never one a step, which the report file has."""
        os.write(2, f"{time.strftime('%H:%M:%S')} {text}\n".encode())

    def _run(self) -> None:
        started = time.monotonic()
        run_before_others()
        env = self.order.env
        self._log(
            f"rank {env.rank} of {env.world_size}, attempt {self.order.attempt}, pid "
            f"{os.getpid()} on {socket.gethostname()}"
        )
        try:
            import workers.rank.session  # noqa: F401 - torch and the library: a phase of its own

            self.report(PhaseReport("import", time.monotonic() - started))
            outcome = self._train(self.order, self.report, self.inbox.take)
            self.spool.append("ended", {"outcome": outcome, "step": self.step})
            self._log(f"{outcome} at step {self.step}")
            self.state = RankState.FINISHED if outcome == "finished" else RankState.STOPPED
        except BaseException as error:  # noqa: BLE001 - whatever ends a rank is told to the driver
            text = "".join(traceback.format_exception(error))
            self.error = {
                "type": type(error).__name__,
                "message": str(error) or type(error).__name__,
                "failure_kind": str(getattr(error, "failure_kind", "")),
                "traceback": text[-16000:],
            }
            self.error["step"] = self.step
            with contextlib.suppress(OSError):
                self.spool.append("failed", self.error)
            os.write(2, text.encode(errors="replace"))
            self.state = RankState.FAILED
        finally:
            self._urgent.set()
            self._news.set()

    def next(self, poll: Poll, log: LogFile | None) -> NextReply:
        """Waits for news, then answers; see RankWorker.next."""
        after = self._released if poll.after is None else poll.after
        if poll.released > self._released:
            self._released = poll.released
            self.spool.release(poll.released)
        if after >= self.spool.last_n:
            self._news.wait(poll.wait_s)
        if not self.state.is_over:
            self._urgent.wait(min(LINGER_S, poll.wait_s))
        self._urgent.clear()
        self._news.clear()
        with self._reading:
            state = self.state
            lines = self._reader.read(after)
        last_n = lines[-1].n if lines else after
        if not poll.steps:
            lines = [
                line
                for line in lines
                if line.kind not in (StepReport.kind, EvalReport.kind)
            ]
        offset, data = (
            log.read(poll.log_offset, poll.log_bytes) if log else (poll.log_offset, b"")
        )
        return NextReply(
            state=state
            if last_n >= self.spool.last_n or state is RankState.FAILED
            else RankState.RUNNING,
            attempt=self.order.attempt,
            last_n=last_n,
            lines=lines,
            step=self.step,
            reports=self.spool.last_n - self._first_n,
            error=self.error,
            log_offset=offset,
            log=data,
        )


class RankWorker:
    """One rank's process.

    `next` runs in its own concurrency group, so it answers while anything else is under
    way.
    """

    train: ClassVar[Train] = staticmethod(train_for_real)

    def __init__(
        self, job_id: str, slot: int, bundle: int, num_threads: int, standby: bool = False
    ) -> None:
        if not standby:
            run_before_others()
        self._job_id = job_id
        self._slot = slot
        self._bundle = bundle
        self._standby = standby
        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        self._address = own_address()
        self._folder = job_folder(self._node_id, job_id)
        self._log = LogFile(self._folder / f"slot-{slot:05d}-{os.getpid()}.log")
        self._log.capture()
        prepare_process(num_threads, self._address)
        sys.setswitchinterval(SWITCH_S)
        self._fence = Fence(0, 0)
        self._guard = threading.Lock()
        self._attempt: RankAttempt | None = None
        self._polled_at = time.monotonic()
        self._store: Any = None
        self._preloading = threading.Thread(target=self._preload, daemon=True)
        for thread in (
            self._preloading,
            threading.Thread(target=self._watch_lease, daemon=True),
        ):
            thread.start()

    def probe(self, fence: Fence) -> SlotFacts:
        """Where this worker is. Keeps one alive that stands by."""
        self._admit(fence)
        self._polled_at = time.monotonic()
        gpus = [int(gpu) for gpu in ray.get_gpu_ids()]
        nodes = [
            node_info(node, {}) for node in ray_nodes() if node["NodeID"] == self._node_id
        ]
        return SlotFacts(
            slot=self._slot,
            bundle=self._bundle,
            node_id=self._node_id,
            address=self._address,
            pid=os.getpid(),
            gpu=gpus[0] if gpus else None,
            is_spare=self._standby,
            domain=domain_of(nodes[0]) if nodes else "",
            local_dir=str(self._folder),
        )

    def open_store(self, fence: Fence) -> tuple[str, int]:
        """Host and port of the TCPStore that this process serves as long as it lives;
        each attempt has its own prefix in it.

        The kernel picks the port. Raises Fenced.
        """
        self._admit(fence)
        self._preloading.join()
        if self._store is None:
            from workers.rank.stores import TCPStore

            self._store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
        return self._address, self._store.port

    def start(self, fence: Fence, order: StartOrder) -> None:
        """Starts the attempt's training thread; repeating the same order changes
        nothing.

        Raises Fenced, Busy.
        """
        self._admit(fence)
        current = self._attempt
        if current is not None:
            if current.order.attempt == order.attempt:
                return
            if current.thread.is_alive():
                raise BusyError(f"attempt {current.order.attempt} is still running")
            current.spool.close()
        if order.gpu is not None and not ray.get_gpu_ids():
            see_gpu(order.gpu)
        self._start_log(order)
        self._attempt = RankAttempt(order, type(self).train, self._folder)
        self._attempt.thread.start()

    @ray.method(concurrency_group="poll")
    def next(self, fence: Fence, poll: Poll) -> NextReply:
        """Reports since the cursor, log bytes and liveness in one; waits up to
        `poll.wait_s` for news. Raises Fenced.
        """
        self._admit(fence)
        self._polled_at = time.monotonic()
        attempt = self._attempt
        if attempt is None:
            time.sleep(min(poll.wait_s, LINGER_S))
            return NextReply(RankState.IDLE, 0, poll.after or 0)
        return attempt.next(poll, self._log)

    def command(self, fence: Fence, command: Command) -> None:
        """Puts a command into the inbox of the running attempt. Raises Fenced."""
        self._admit(fence)
        if self._attempt is not None and self._attempt.order.attempt == fence.attempt:
            self._attempt.inbox.put(command)

    def leave(self, fence: Fence, wait_s: float = LEAVE_S) -> bool:
        """Asks the training thread to end; True once it has left its process groups and
        the process may be used again.

        A rank blocked in a collective comes out when its neighbours close their ends.
        One that does not must be replaced.
        """
        self._admit(fence)
        attempt = self._attempt
        if attempt is None:
            return True
        attempt.inbox.put(Command.STOP)
        attempt.thread.join(wait_s)
        return not attempt.thread.is_alive()

    def retire(self, fence: Fence) -> str:
        """Removes the job's files on this node, for good: the job is over.

        Returns the node's id. Raises Fenced.
        """
        self._admit(fence)
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._node_id

    def _admit(self, fence: Fence) -> None:
        """Refuses whoever was replaced: a lower epoch, or a lower attempt in the same
        epoch.
        """
        with self._guard:
            seen = self._fence
            if fence.epoch < seen.epoch or (
                fence.epoch == seen.epoch and fence.attempt < seen.attempt
            ):
                raise FencedError(
                    f"(attempt {fence.attempt}, epoch {fence.epoch}) was replaced by "
                    f"({seen.attempt}, {seen.epoch})"
                )
            self._fence = fence

    def _start_log(self, order: StartOrder) -> None:
        """A log of the attempt; what the process wrote before its first one goes in
        front.
        """
        boot = self._log.read(0, 64 << 10)[1] if self._attempt is None else b""
        log = LogFile(log_file(self._folder, order.attempt, order.env.rank))
        log.capture()
        os.write(1, boot)
        self._log.close()
        self._log = log

    def _preload(self) -> None:
        """Imports torch and the library while the driver is still probing; a failure is
        the training thread's to report.
        """
        if self._standby:
            let_ranks_go_first()
        # nothing of it is garbage, and looking for some takes a tenth of the import
        gc.disable()
        try:
            with contextlib.suppress(ImportError):
                import workers.rank.session  # noqa: F401
        finally:
            # nor will it be: collections while training need not look at it
            gc.freeze()
            gc.enable()

    def _watch_lease(self) -> None:
        while time.monotonic() - self._polled_at < LEASE_S:
            time.sleep(LEASE_S / 30)
        os.write(2, f"[no driver asked for {LEASE_S:.0f} s: this worker ends]\n".encode())
        os._exit(3)


def report_file(folder: Path, attempt: int, rank: int) -> Path:
    """A rank's spool on its node."""
    return folder / f"attempt-{attempt:04d}" / f"rank-{rank:05d}.jsonl"


def log_file(folder: Path, attempt: int, rank: int) -> Path:
    """A rank's log on its node."""
    return folder / f"attempt-{attempt:04d}" / f"rank-{rank:05d}.log"


def _in_words(item: Report) -> str:
    """A report as a line of the log."""
    if isinstance(item, PhaseReport):
        return f"{item.phase} took {item.seconds:.2f} s"
    if isinstance(item, CheckpointReport):
        return (
            f"wrote {item.bytes_written} bytes of the checkpoint of step {item.step} in "
            f"{item.seconds:.2f} s: {item.path}"
        )
    if isinstance(item, EvalReport):
        return f"step {item.step}: {item.split} loss {item.loss:.4f} over {item.num_tokens} tokens"
    return f"step {item.step}: loss {item.loss:.4f}"

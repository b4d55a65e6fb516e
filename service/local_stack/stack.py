"""Starts, supervises and ends a local stack of Ray, service and agent.

Owns: the order of a start, which can be undone at every moment, and restarts. Signals
only set a flag (`Interruption`) that every wait polls, so that no exception interrupts a
clean-up. Must not know: terminals, torch, ray.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from service.http.tokens import Scope
from service.local_stack.files import StackFiles
from service.local_stack.interruption import Interruption, StackError, StartInterruptedError
from service.local_stack.job_stops import Report, StoppedJobs, resume_jobs, stop_jobs
from service.local_stack.options import StackOptions
from service.local_stack.processes import LABELS, StackProcesses
from service.local_stack.ray_head import MAX_TEMP_DIR_LENGTH
from service.local_stack.record import (
    TEMP_PREFIX,
    ProcessName,
    StackRecord,
    boot_id,
    pid_namespace,
    read_record,
    write_record,
)
from service.local_stack.sessions import read_process
from service.local_stack.starting import (
    start_agent,
    start_ray,
    start_service,
    wait_for_service,
    wait_until_ready,
)
from service.local_stack.teardown import TeardownReport, end_recorded

_SUPERVISE_POLL_S = 0.03
_LOGS_EVERY_S = 5.0


@dataclass
class LocalStack:
    """One Ray head, one service and one agent.

    Call `start`, then `supervise`, and `end` in any case.
    """

    options: StackOptions
    report: Report
    """Receives messages that stay on the screen."""
    interruption: Interruption
    progress: Report = lambda message: None
    """Receives the current step of the start."""
    _processes: StackProcesses | None = None
    _lock: IO[str] | None = None

    def start(self) -> StackRecord:
        """Returns the record once agent and Ray are ready.

        Raises StackError, StartInterruptedError; call `end` after either.
        """
        data_dir = self.options.data_dir
        files = StackFiles(data_dir)
        # Only the holder of the lock may change a record or the processes in it.
        self._lock = files.lock()
        previous = read_record(data_dir)
        if previous is not None:
            self.report("cleaning up a stack that was not stopped")
            end_recorded(previous)
        # The record comes before all that it names, the temp dir included.
        record = _new_record(data_dir)
        write_record(record)
        processes = StackProcesses(record, files, self.interruption)
        self._processes = processes
        Path(record.temp_dir).mkdir(mode=0o700)
        files.rotate_logs()
        processes.update_record(
            token=files.tokens()[Scope.USER], ray_token=secrets.token_hex(32)
        )
        self._start_processes(processes)
        processes.update_record(phase="ready")
        resume_jobs(processes.record, self.report)
        return processes.record

    def _start_processes(self, processes: StackProcesses) -> None:
        options = self.options
        self.progress("starting Ray and the service")
        # The service imports while Ray starts; the agent needs the addresses of both.
        start_service(processes, options, processes.files.last_port())
        start_ray(processes, options)
        wait_for_service(processes, options)
        start_agent(processes, options)
        wait_until_ready(processes, options, self.progress)

    def supervise(self, until: Callable[[], bool] = lambda: False) -> None:
        """Restarts exited processes, with back-off, until `until()` or a signal."""
        processes = self._processes
        assert processes is not None, "call start() first"
        logs_due = 0.0
        while not until() and not self.interruption.is_requested:
            time.sleep(_SUPERVISE_POLL_S)
            if time.monotonic() >= logs_due:
                processes.files.limit_logs()
                logs_due = time.monotonic() + _LOGS_EVERY_S
            # A copy, because a restart replaces entries.
            for name in list(processes.children):
                try:
                    self._check_child(processes, name)
                except StartInterruptedError:
                    return
                except StackError as error:
                    # The next round counts the failed start as a crash and backs off.
                    self.report(f"{error}; retrying\n{error.log_tail}")

    def _check_child(self, processes: StackProcesses, name: ProcessName) -> None:
        """Plans the restart of an exited process, and runs it when its time has come."""
        child = processes.children[name]
        now = time.monotonic()
        if not child.has_ended():
            return
        if child.restart_at is None:
            restart = child.after_end(now)
            child.crashes = restart.crashes
            child.restart_at = now + restart.wait_s
            message = (
                f"{LABELS[name]} exited ({_exit_cause(child.gated.process.returncode)})"
            )
            if restart.wait_s >= 1:
                self.report(f"{message}; restarting in {restart.wait_s:.0f} s")
            else:
                self.report(f"{message}; restarting")
        if now >= child.restart_at:
            child.restart_at = None
            self._restart(processes, name)

    def _restart(self, processes: StackProcesses, name: ProcessName) -> None:
        # The leader has exited, but its children may live and hold ports or GPUs.
        processes.kill(name)
        if name == "agent":
            start_agent(processes, self.options)
        elif name == "ray":
            start_ray(processes, self.options)
            # A new Ray head has a new address, which the agent gets on its command line.
            self._restart_agent(processes)
        else:
            self._restart_service(processes)

    def _restart_agent(self, processes: StackProcesses) -> None:
        self._restart(processes, "agent")
        self.report("agent restarted")

    def _restart_service(self, processes: StackProcesses) -> None:
        old_url = processes.record.url
        start_service(processes, self.options, processes.files.last_port())
        wait_for_service(processes, self.options)
        # Its port may have been taken in the meantime.
        if processes.record.url != old_url:
            self.report(f"the service moved to {processes.record.url}")
            self._restart_agent(processes)

    def end(self) -> TeardownReport:
        """Ends everything that `start` began; harmless when it began nothing."""
        try:
            processes = self._processes
            if processes is None:
                return TeardownReport(was_up=False)
            # Cleared first, so that a second call does not repeat the teardown.
            self._processes = None
            try:
                jobs = self._stop_jobs(processes.record)
            # Whatever happens to the jobs, no process outlives this one.
            finally:
                teardown = end_recorded(processes.record)
            processes.wait()
            return replace(teardown, jobs=jobs)
        finally:
            if self._lock is not None:
                self._lock.close()

    def _stop_jobs(self, record: StackRecord) -> StoppedJobs:
        if record.phase != "ready":
            return StoppedJobs()
        return stop_jobs(
            record,
            self.report,
            self.options.job_grace_s,
            is_urgent=lambda: self.interruption.is_urgent,
        )


def _new_record(data_dir: Path) -> StackRecord:
    process = read_process(os.getpid())
    if process is None:
        raise StackError("the local stack needs Linux: /proc is missing")
    stack_id = secrets.token_hex(8)
    # TMPDIR is often too long for Ray's sockets, /tmp never is.
    root = Path("/tmp")
    if not os.access(root, os.W_OK):
        root = Path(tempfile.gettempdir())
    temp_dir = root / f"{TEMP_PREFIX}{stack_id}"
    if len(str(temp_dir)) > MAX_TEMP_DIR_LENGTH:
        raise StackError(
            f"temp dir {temp_dir} is too long for Ray's sockets; make /tmp writable or "
            "set TMPDIR to a short path"
        )
    return StackRecord(
        stack_id=stack_id,
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
        up_pid=process.pid,
        up_start_ticks=process.start_ticks,
        temp_dir=str(temp_dir),
        data_dir=str(data_dir),
    )


def _exit_cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {-code}"

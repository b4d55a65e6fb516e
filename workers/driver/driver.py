"""Defines JobDriver, the detached, named Ray actor of one job.

Owns: the actor's methods, its thread, the real dependencies of the job's lifecycle. The
thread's work is in `lifecycle`. Must not know: torch, phases.

The constructor takes ids only and cannot raise: Ray never restarts an actor whose
constructor raises on a restart. The agent passes the service's address and the token at
run time, by `attach`.
"""

import os
import random
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import ray

from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import open_storage
from workers.decisions.journal_entry import Ending
from workers.driver.context import DriverReplacedError
from workers.driver.dead_rank_files import DeadRankFiles
from workers.driver.gauges import TrainingGauges
from workers.driver.journal import ForeignJournalError, JournalError
from workers.driver.lifecycle import JobLifecycle
from workers.driver.logs import JobLogs
from workers.driver.ports import JobPorts
from workers.driver.records.outbox import Outbox, RecordLog
from workers.protocol.states import JobState, StatusReason
from workers.protocol.version import code_version
from workers.protocol.wire import DesiredJob, DriverStatus
from workers.rank.environment import lower_priority
from workers.rank.messages import FencedError
from workers.ray import tasks
from workers.ray.actors import kill
from workers.ray.drain_watch import DrainWatch
from workers.ray.nodes import read_free_nodes, unreachable_nodes
from workers.ray.processes import end_processes
from workers.ray.rank_worker import RankWorker
from workers.ray.worker_group import WorkerGroup

_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_MAX_BUGS = 4
"""Number of unexpected errors of the driver after which the job fails instead of being
resumed."""


def open_ports(job_id: str, job_dir: str, namespace: str, worker_class: type) -> JobPorts:
    """Returns the real dependencies of a job's driver. Raises StorageError."""
    storage = open_storage(job_dir)
    outbox = Outbox(job_id, RecordLog(storage))
    logs = JobLogs(storage)
    return JobPorts(
        open_storage=open_storage,
        outbox=outbox,
        group=WorkerGroup(job_id, namespace, worker_class),
        tasks=tasks,
        drains=DrainWatch(),
        read_nodes=read_free_nodes,
        unreachable_nodes=unreachable_nodes,
        end_processes=end_processes,
        dead_rank_files=DeadRankFiles(outbox, logs),
        logs=logs,
        gauges=TrainingGauges(job_id),
        executor=ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit"),
        clock=time.monotonic,
        jitter=random.random,
        code_version=code_version(),
    )


class JobDriver:
    """Drives one job; `attach` and `status` return at once, a thread does the work."""

    worker_class: ClassVar[type] = RankWorker

    def __init__(self, job_id: str, job_dir: str) -> None:
        # A driver shares its node with ranks, which it must not delay.
        lower_priority()
        self._job_id = job_id
        self._job_dir = job_dir
        self._attached: tuple[str, str, DesiredJob] | None = None
        self._ports: JobPorts | None = None
        self._lifecycle: JobLifecycle | None = None
        self._last_error = ""
        self._ending: Ending | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._main, name="job", daemon=True).start()

    def __repr__(self) -> str:
        """Returns what Ray's dashboard lists."""
        return f"{self._job_id} driver"

    def attach(self, url: str, token: str, desired: dict[str, Any]) -> DriverStatus:
        """Sets the service's address and the job's desired state.

        Called whenever either changes, and periodically.
        """
        with self._lock:
            job = DesiredJob.model_validate({**desired, "token": token})
            self._attached = (url, token, job)
            if self._ports is not None:
                self._ports.outbox.attach(*self._attached)
        return self.status()

    def status(self) -> DriverStatus:
        """Returns a one-line status for the agent's report."""
        detail = "starting"
        if self._last_error:
            detail = self._last_error
        elif self._lifecycle is not None:
            detail = self._lifecycle.phase
        return DriverStatus(job_id=self._job_id, alive=True, detail=detail)

    def pid(self) -> int:
        """Returns the process id, for operators and tests."""
        return os.getpid()

    def _main(self) -> None:
        """Runs the job to its end, then ends this actor.

        After an error (storage unavailable, a bug) the job is resumed from the journal.
        """
        failures = 0
        bugs = 0
        while True:
            try:
                self._run_lifecycle()
                break
            except (DriverReplacedError, FencedError) as error:
                sys.stderr.write(f"this driver was replaced and ends: {error}\n")
                sys.stderr.flush()
                # Not ray.kill: that would end the newer incarnation, which has the same
                # actor id.
                os._exit(0)
            except ForeignJournalError as error:
                self._fail_foreign_job(error)
                continue
            # Storage outages are temporary: ranks keep training, and the journal is
            # read again.
            except (StorageError, JournalError) as error:
                self._last_error = str(error)
            except Exception as error:  # noqa: BLE001 - the thread must not die silently; it goes on from the journal
                self._last_error = f"{type(error).__name__}: {error}"
                bugs += 1
                traceback.print_exc()
                if bugs == _MAX_BUGS:
                    self._ending = Ending(
                        state=JobState.FAILED.value,
                        reason=StatusReason.INTERNAL.value,
                        message=f"the job's driver cannot go on: {self._last_error}",
                    )
            # Every resume gets new ports, so that threads of the previous run send
            # nothing more.
            finally:
                if self._ports is not None:
                    self._ports.close()
            time.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
            failures += 1
        # With no_restart, because an actor whose methods have returned keeps running.
        kill(ray.get_runtime_context().current_actor)

    def _fail_foreign_job(self, error: ForeignJournalError) -> None:
        """Fails the job from a separate folder, as the given one belongs to another job."""
        self._job_dir = f"{self._job_dir}/refused-{self._job_id}"
        self._ending = Ending(
            state=JobState.FAILED.value,
            reason=StatusReason.SPEC_INVALID.value,
            message=f"/storage/path: {error}",
        )

    def _run_lifecycle(self) -> None:
        namespace = ray.get_runtime_context().namespace
        ports = open_ports(self._job_id, self._job_dir, namespace, type(self).worker_class)
        # Attached first; nothing is sent before the epoch is taken.
        with self._lock:
            self._ports = ports
            if self._attached is not None:
                ports.outbox.attach(*self._attached)
        lifecycle = JobLifecycle(self._job_id, self._job_dir, ports, self._last_error)
        self._last_error = ""
        self._lifecycle = lifecycle
        lifecycle.run(self._ending)

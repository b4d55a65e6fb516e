"""JobDriver: the detached, named Ray actor of one job.

Owns: the actor's face and its thread. What it does is in `job_life`.

Its constructor takes ids only and does nothing that can raise: an actor whose
constructor raises on restart is dead for ever. Where the service is, and the token,
come by `attach` from the agent at run time. Must not know: torch, phases.
"""

import os
import sys
import threading
import time
import traceback
from typing import Any, ClassVar

import ray

from megatron_ray.storage.errors import StorageError
from workers.driver.exceptions import DriverReplacedError
from workers.driver.journal import Ending, ForeignJournalError, JournalError
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import JobState, StatusReason
from workers.protocol.wire import DesiredJob, DriverStatus
from workers.rank.environment import lower_priority
from workers.rank.messages import FencedError
from workers.ray.actors import kill
from workers.ray.rank_worker import RankWorker

_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_MOST_BUGS = 4
"""Unexpected errors of the driver itself after which the job is failed instead of
entered again."""


class JobDriver:
    """`attach` and `status` answer at once; the job's thread does the work."""

    worker_class: ClassVar[type] = RankWorker

    def __init__(self, job_id: str, job_dir: str) -> None:
        lower_priority()
        self._job_id = job_id
        self._job_dir = job_dir
        self._attached: tuple[str, str, DesiredJob] | None = None
        self._life: JobLifecycle | None = None
        self._trouble = ""
        self._ending: Ending | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._main, name="job", daemon=True).start()

    def attach(self, url: str, token: str, desired: dict[str, Any]) -> DriverStatus:
        """Where the service is and what it wants; said again whenever the agent sees
        either change, or just to be sure.
        """
        with self._lock:
            self._attached = (
                url,
                token,
                DesiredJob.model_validate({**desired, "token": token}),
            )
            if self._life is not None:
                self._life.outbox.attach(*self._attached)
        return self.status()

    def status(self) -> DriverStatus:
        """What a person wants to know of it."""
        life = self._life
        return DriverStatus(
            job_id=self._job_id,
            alive=True,
            detail=self._trouble or (life.phase if life else "starting"),
        )

    def pid(self) -> int:
        """Process id, for operators and tests."""
        return os.getpid()

    def _main(self) -> None:
        """Runs the job's life; after trouble (storage away, a bug) it is entered again
        from the journal.
        """
        failures = bugs = 0
        while True:
            try:
                self._live()
                break
            except (DriverReplacedError, FencedError) as why:
                sys.stderr.write(f"this driver was replaced and ends: {why}\n")
                sys.stderr.flush()
                # Not ray.kill: that would end the newer incarnation, which has the same
                # actor id.
                os._exit(0)
            except ForeignJournalError as foreign:
                ending = Ending(
                    state=JobState.FAILED.value,
                    reason=StatusReason.SPEC_INVALID.value,
                    message=f"/storage/path: {foreign}",
                )
                self._job_dir = f"{self._job_dir}/refused-{self._job_id}"
                self._ending = ending
                continue
            except (StorageError, JournalError) as error:
                self._trouble = str(error)
            except Exception as error:  # noqa: BLE001 - the thread must not die silently; the journal says where to go on
                self._trouble = f"{type(error).__name__}: {error}"
                bugs += 1
                traceback.print_exc()
                if bugs == _MOST_BUGS:
                    text = f"the job's driver cannot go on: {self._trouble}"
                    self._ending = Ending(
                        state=JobState.FAILED.value,
                        reason=StatusReason.INTERNAL.value,
                        message=text,
                    )
            finally:
                if self._life is not None:
                    self._life.outbox.close()
            time.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
            failures += 1
        kill(ray.get_runtime_context().current_actor)

    def _live(self) -> None:
        namespace = ray.get_runtime_context().namespace
        life = JobLifecycle(
            self._job_id, self._job_dir, namespace, type(self).worker_class, self._trouble
        )
        self._trouble = ""
        with self._lock:
            self._life = life
            if self._attached is not None:
                life.outbox.attach(*self._attached)
        life.run(self._ending)

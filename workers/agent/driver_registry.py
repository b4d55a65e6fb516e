"""Drivers as the agent handles them.

Owns: get-or-create, attach, statuses, reaping. Must not know: HTTP, how a job runs.
"""

import contextlib
import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError

from workers.driver.driver import JobDriver
from workers.protocol.wire import DesiredJob, DesiredReply, DriverStatus
from workers.ray.worker_group import driver_name, find_actor, kill

_LOG = logging.getLogger("megatron_ray.agent")
REAP_AFTER_S = 10.0
"""What an ended job's driver has not taken down by then is ended."""
REAP_DRIVER_AFTER_S = 90.0
"""The driver itself ends by itself, but may wait for a busy node to be cleaned
first."""
_ANSWER_S = 3.0


class DriverRegistry:
    """What the service wants of each job, and what the namespace holds.

    Acts only on jobs known to be active or terminal.
    """

    def __init__(
        self, service_url: str, namespace: str, driver_class: type = JobDriver
    ) -> None:
        self._url = service_url
        self._namespace = namespace
        # Once: each remote class that is made is sent to Ray's head and kept there and
        # here.
        self._driver_class: Any = ray.remote(driver_class)
        self._jobs: dict[str, DesiredJob] = {}
        self._terminal: dict[str, float] = {}
        self._reaped: set[str] = set()
        self._reaped_drivers: set[str] = set()
        self._statuses: dict[str, DriverStatus] = {}
        self._known = False

    def want(self, reply: DesiredReply) -> None:
        """What the service wants now."""
        self._known = True
        terminal = set(reply.terminal)
        self._jobs = {job.job_id: job for job in reply.jobs if job.job_id not in terminal}
        now = time.monotonic()
        self._terminal = {job_id: self._terminal.get(job_id, now) for job_id in terminal}

    def reconcile(self) -> None:
        """Makes and attaches drivers, reaps what ended jobs left.

        Raises RayError, ConnectionError when Ray is lost.
        """
        calls = {}
        for job_id, job in self._jobs.items():
            try:
                calls[
                    self._driver(job).attach.remote(
                        self._url, job.token, job.model_dump(mode="json", exclude={"token"})
                    )
                ] = job_id
            except ValueError as error:
                self._statuses[job_id] = DriverStatus(
                    job_id=job_id, alive=False, detail=str(error)[:500]
                )
        done, late = (
            ray.wait(list(calls), num_returns=len(calls), timeout=_ANSWER_S)
            if calls
            else ([], [])
        )
        for call in done:
            self._statuses[calls[call]] = self._status_of(calls[call], call)
        for call in late:
            self._statuses[calls[call]] = DriverStatus(
                job_id=calls[call], alive=False, detail=f"no answer within {_ANSWER_S:g} s"
            )
        self._statuses = {
            job_id: status
            for job_id, status in self._statuses.items()
            if job_id in self._jobs
        }
        self._reap()

    def statuses(self) -> tuple[DriverStatus, ...]:
        """What is known of each wanted job's driver."""
        return tuple(self._statuses.values())

    def orphans(self) -> tuple[str, ...]:
        """Names in the namespace that belong to no job the service has named; never
        touched.
        """
        if not self._known:
            return ()
        return tuple(
            name
            for name in self._names()
            if name.partition("/")[0] not in self._jobs.keys() | self._terminal.keys()
        )

    def _driver(self, job: DesiredJob) -> Any:
        return self._driver_class.options(
            name=driver_name(job.job_id),
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
        ).remote(job.job_id, job.job_dir)

    def _status_of(self, job_id: str, call: Any) -> DriverStatus:
        try:
            return DriverStatus.model_validate(ray.get(call).model_dump())
        except RayError as error:
            return DriverStatus(
                job_id=job_id,
                alive=False,
                detail=f"{type(error).__name__}: {str(error)[:300]}",
            )

    def _names(self) -> list[str]:
        return [str(name) for name in ray.util.list_named_actors()]

    def _reap(self) -> None:
        due = self._due(REAP_AFTER_S, self._reaped)
        drivers_due = self._due(REAP_DRIVER_AFTER_S, self._reaped_drivers)
        if not due and not drivers_due:
            return
        for name in self._names():
            job_id, _, role = name.partition("/")
            actor = (
                find_actor(name, self._namespace)
                if job_id in (drivers_due if role == "driver" else due)
                else None
            )
            if actor is not None:
                _LOG.warning("reaping %s: its job is over", name)
                kill(actor)
        for job_id in due:
            with contextlib.suppress(ValueError):
                ray.util.remove_placement_group(ray.util.get_placement_group(job_id))
                _LOG.warning("reaped the placement group of %s", job_id)
        self._reaped = (self._reaped | due) & self._terminal.keys()
        self._reaped_drivers = (self._reaped_drivers | drivers_due) & self._terminal.keys()

    def _due(self, after_s: float, done: set[str]) -> set[str]:
        now = time.monotonic()
        return {
            job_id
            for job_id, since in self._terminal.items()
            if now - since > after_s and job_id not in done
        }

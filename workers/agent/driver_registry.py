"""Creates, attaches and removes the drivers of a cluster's jobs.

Owns: get-or-create, attach, statuses, removing leftovers of ended jobs. Must not know:
HTTP, how a job runs.
"""

import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from workers.decisions.cluster_growth import NODE_GROUP_LABEL
from workers.driver.driver import JobDriver
from workers.protocol.wire import DesiredJob, DesiredReply, DriverStatus
from workers.ray.actors import driver_name, find_actor, kill

_LOG = logging.getLogger("megatron_ray.agent")
REAP_AFTER_S = 10.0
"""Actors that an ended job's driver has not removed by then are killed."""
REAP_DRIVER_AFTER_S = 90.0
"""The driver exits by itself, but may first wait for the clean-up of a busy node."""
_ATTACH_S = 3.0


class DriverRegistry:
    """Drives the cluster's drivers towards the desired jobs of the service.

    Acts only on jobs known to be active or terminal.
    """

    def __init__(
        self,
        service_url: str,
        namespace: str,
        driver_class: type = JobDriver,
        node_groups: Sequence[str] = (),
    ) -> None:
        self._url = service_url
        self._namespace = namespace
        # A driver lives as long as its job, which may be paused for days: on a node of an
        # autoscaler it would keep that node. Ray's head is always outside of the groups.
        self._label_selector: dict[str, str] | None = None
        if node_groups:
            self._label_selector = {NODE_GROUP_LABEL: f"!in({','.join(node_groups)})"}
        # Wrapped once, because each remote class stays in memory, here and in Ray's
        # head.
        self._driver_class: Any = ray.remote(driver_class)
        self._jobs: dict[str, DesiredJob] = {}
        self._terminal_since: dict[str, float] = {}
        self._reaped: set[str] = set()
        self._reaped_drivers: set[str] = set()
        self._statuses: dict[str, DriverStatus] = {}
        self._has_reply = False

    def set_desired(self, reply: DesiredReply) -> None:
        """Stores the desired jobs and the ended jobs of the service's reply."""
        self._has_reply = True
        terminal = set(reply.terminal)
        self._jobs = {job.job_id: job for job in reply.jobs if job.job_id not in terminal}
        now = time.monotonic()
        since = {}
        for job_id in terminal:
            since[job_id] = self._terminal_since.get(job_id, now)
        self._terminal_since = since

    def reconcile(self) -> None:
        """Creates and attaches drivers, and removes leftovers of ended jobs.

        Raises RayError, ConnectionError when Ray is lost.
        """
        self._attach_drivers()
        for job_id in self._statuses.keys() - self._jobs.keys():
            del self._statuses[job_id]
        self._reap()

    def statuses(self) -> tuple[DriverStatus, ...]:
        """Returns the last known status of each desired job's driver."""
        return tuple(self._statuses.values())

    def orphans(self) -> tuple[str, ...]:
        """Returns actors of jobs that the service does not list; they are not killed."""
        # Before the first reply every job is unknown.
        if not self._has_reply:
            return ()
        known = self._jobs.keys() | self._terminal_since.keys()
        names = []
        for name in self._actor_names():
            job_id, _, _ = name.partition("/")
            if job_id not in known:
                names.append(name)
        return tuple(names)

    def has_actors(self) -> bool:
        """Returns whether any driver or rank is left in the namespace."""
        return bool(self._actor_names())

    def _attach_drivers(self) -> None:
        calls = {}
        for job_id, job in self._jobs.items():
            message = job.model_dump(mode="json", exclude={"token"})
            try:
                call = self._driver(job).attach.remote(self._url, job.token, message)
            except ValueError as error:
                self._set_dead(job_id, str(error)[:500])
            else:
                calls[call] = job_id
        if not calls:
            return
        # All calls start before the first wait, so that one driver cannot delay the
        # others.
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=_ATTACH_S)
        for call in done:
            self._take_status(calls[call], call)
        for call in late:
            self._set_dead(calls[call], f"no reply within {_ATTACH_S:g} s")

    def _take_status(self, job_id: str, call: Any) -> None:
        try:
            # Validated again: the driver may run another version of the code.
            status = DriverStatus.model_validate(ray.get(call).model_dump())
        except RayError as error:
            self._set_dead(job_id, f"{type(error).__name__}: {str(error)[:300]}")
        else:
            self._statuses[job_id] = status

    def _set_dead(self, job_id: str, detail: str) -> None:
        self._statuses[job_id] = DriverStatus(job_id=job_id, alive=False, detail=detail)

    def _driver(self, job: DesiredJob) -> Any:
        """Returns the job's driver actor, created if missing."""
        return self._driver_class.options(
            name=driver_name(job.job_id),
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            # Ray restarts it whenever it dies; it then continues from its journal.
            max_restarts=-1,
            num_cpus=0,
            label_selector=self._label_selector,
        ).remote(job.job_id, job.job_dir)

    def _actor_names(self) -> list[str]:
        return [str(name) for name in ray.util.list_named_actors()]

    def _reap(self) -> None:
        """Kills leftover actors and placement groups of ended jobs, once per job."""
        due = self._due(REAP_AFTER_S, self._reaped)
        drivers_due = self._due(REAP_DRIVER_AFTER_S, self._reaped_drivers)
        if not due and not drivers_due:
            return
        for name in self._actor_names():
            job_id, _, role = name.partition("/")
            is_due = job_id in due
            if role == "driver":
                is_due = job_id in drivers_due
            if is_due:
                self._kill_actor(name)
        for job_id in due:
            with contextlib.suppress(ValueError):
                ray.util.remove_placement_group(ray.util.get_placement_group(job_id))
                _LOG.warning("removed the placement group of ended job %s", job_id)
        # Jobs that the service no longer lists are removed here too.
        self._reaped = (self._reaped | due) & self._terminal_since.keys()
        self._reaped_drivers |= drivers_due
        self._reaped_drivers &= self._terminal_since.keys()

    def _kill_actor(self, name: str) -> None:
        actor = find_actor(name, self._namespace)
        if actor is not None:
            _LOG.warning("killing %s: its job has ended", name)
            kill(actor)

    def _due(self, after_s: float, done: Collection[str]) -> set[str]:
        """Returns the jobs that ended `after_s` ago or earlier and are not done yet."""
        now = time.monotonic()
        due = set()
        for job_id, since in self._terminal_since.items():
            if now - since > after_s and job_id not in done:
                due.add(job_id)
        return due

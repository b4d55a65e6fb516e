"""Creates a job from a submitted spec.

Owns: the order of checks before a job is stored. Must not know: HTTP.

Nothing is stored before all checks have passed, so a rejected spec leaves no trace.
"""

import secrets
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from sqlalchemy.orm import Session

from megatron_ray.config.problem import Problem
from service.exceptions import JobActiveError, SpecInvalidError
from service.jobs import cluster_fit, lifecycle, pausing, spec_checks
from service.jobs.agents import Agents, CheckedPaths
from service.jobs.capacity import ClusterCapacity
from service.jobs.pausing import ChangedSpec
from service.settings import Settings
from service.store.database import Store
from service.store.schema import JobRow
from workers.protocol.job import JobSpec
from workers.protocol.spec_warnings import spec_warnings
from workers.protocol.states import JobState
from workers.protocol.wire import ResumedJob

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def new_job_id() -> str:
    """Returns a readable id of 60 random bits."""
    return "job-" + "".join(secrets.SystemRandom().choices(_ALPHABET, k=12))


@dataclass(frozen=True)
class PreparedJob:
    """A new job that is not stored yet."""

    spec: JobSpec
    row: JobRow
    is_checked: bool
    """Whether the cluster's agent has looked at the spec's paths."""


@dataclass(frozen=True)
class Submitter:
    """Checks submitted specs and creates jobs from them."""

    settings: Settings
    store: Store
    agents: Agents
    compute: CapacityLimiter
    """Limits the threads that compute."""

    async def prepare(self, spec: JobSpec, submitted: dict[str, Any]) -> PreparedJob:
        """Returns a new job, to be stored by `create`.

        `submitted` is the spec as the user sent it. Raises SpecInvalidError with
        everything that is wrong at once.
        """
        capacity, problems = await run_sync(self.read_cluster, spec)
        # Checked in a thread: a layout that fits may have to be searched for.
        unfit = await run_sync(self._check, spec, capacity, limiter=self.compute)
        problems = [*unfit, *problems]
        if problems:
            raise SpecInvalidError(problems)
        job_id = new_job_id()
        job_dir = self.job_dir(spec, job_id)
        # The agent's check of paths comes last, because it takes longest.
        checked = await self.check_paths(spec, capacity, job_dir)
        if checked is not None and checked.problems:
            raise SpecInvalidError(checked.problems)
        job = JobRow(id=job_id, name=spec.name, cluster=spec.cluster)
        job.priority = spec.priority
        job.created_at = time.time()
        job.job_dir = job_dir
        job.spec = submitted
        # Without a known cluster the first report resolves the spec.
        if capacity.is_known:
            resolve = partial(cluster_fit.resolve, spec, capacity, job_dir)
            resolved = await run_sync(resolve, limiter=self.compute)
            job.resolved_spec = resolved.spec.model_dump(mode="json")
            job.world_size = resolved.world_size
        else:
            job.resolved_spec = spec.model_dump(mode="json")
            job.world_size = None
        return PreparedJob(spec, job, is_checked=checked is not None)

    def create(self, session: Session, prepared: PreparedJob) -> None:
        """Stores a prepared job in the caller's transaction, which locks its cluster.

        Raises SpecInvalidError when another job has taken the folder since `prepare`.
        """
        # Checked again: another job may have been stored since `prepare` looked.
        spec = prepared.spec
        problems = spec_checks.check_storage(session, spec)
        if problems:
            raise SpecInvalidError(problems)
        job = prepared.row
        event = _created(prepared)
        is_agent_ready = job.world_size is not None and self.agents.is_live(job.cluster)
        lifecycle.create(
            session, job, spec.metadata, event=event, is_agent_ready=is_agent_ready
        )
        _add_warnings(session, job, spec)
        session.flush()

    async def prepare_resume(
        self, job_id: str, changes: dict[str, Any]
    ) -> ChangedSpec | None:
        """Returns the changed spec of an ended job, to be stored by `resume`.

        None for a job that has not ended. Raises NotFoundError, and SpecInvalidError with
        what is wrong with the changed spec.
        """
        prepare = partial(self._changed_spec, job_id, changes)
        changed, had_driver = await run_sync(prepare, limiter=self.compute)
        if changed is None:
            return None
        # The agent's check comes last, because it takes longest.
        spec = changed.resolved
        checked = None
        if spec.storage is not None and self.agents.is_live(spec.cluster):
            resumed = ResumedJob(
                job_id=job_id, has_other_data=changed.has_other_data, had_driver=had_driver
            )
            checked = await self._ask_agent(spec, spec.storage.path, resumed)
        if checked is not None and checked.problems:
            raise SpecInvalidError(checked.problems)
        return changed

    def resume(self, session: Session, job: JobRow, changed: ChangedSpec | None) -> None:
        """Resumes an ended job in the caller's transaction, which has locked it.

        Raises SpecInvalidError when another job has taken the folder, JobActiveError when
        the job has changed since `prepare_resume`.
        """
        if changed is None or changed.resumes != job.resumes:
            raise JobActiveError("the job was changed at the same time; send it again")
        problems = spec_checks.check_storage(session, changed.resolved)
        if problems:
            raise SpecInvalidError(problems)
        is_agent_ready = job.world_size is not None and self.agents.is_live(job.cluster)
        pausing.resume_ended(session, job, changed, is_agent_ready=is_agent_ready)
        if changed.changes:
            _add_warnings(session, job, changed.resolved)

    def _changed_spec(
        self, job_id: str, changes: dict[str, Any]
    ) -> tuple[ChangedSpec | None, bool]:
        """Returns the changed spec, and whether the job has had a driver.

        Not inside a transaction: a layout that fits may have to be searched for.
        """
        with self.store.read() as session:
            job = lifecycle.find(session, job_id)
            if not JobState(job.status).is_terminal:
                return None, False
            changed = pausing.changed_spec(job, changes)
            capacity = cluster_fit.capacity_of(session, job.cluster)
        # What is unchanged was accepted before, maybe by an earlier version.
        if not changes:
            return changed, job.epoch > 0
        problems = self._check(changed.resolved, capacity)
        if problems:
            raise SpecInvalidError(problems)
        if job.world_size is not None and changed.resolved.parallel.dp == "auto":
            resolved = cluster_fit.resolve(changed.resolved, capacity, job.job_dir)
            changed = replace(changed, resolved=resolved.spec)
        return changed, job.epoch > 0

    def read_cluster(self, spec: JobSpec) -> tuple[ClusterCapacity, list[Problem]]:
        """Returns the spec's cluster, and why its folder cannot be used."""
        with self.store.read() as session:
            capacity = cluster_fit.capacity_of(session, spec.cluster)
            return capacity, spec_checks.check_storage(session, spec)

    async def check_paths(
        self, spec: JobSpec, capacity: ClusterCapacity, job_dir: str
    ) -> CheckedPaths | None:
        """Returns what the agent finds in the spec's paths.

        The service itself cannot see the cluster's files. Returns None when no agent
        answers in time.
        """
        # Waiting for a lost agent would be useless.
        if not self.agents.is_live(spec.cluster) or not capacity.is_known:
            return None
        resolve = partial(cluster_fit.resolve, spec, capacity, job_dir)
        resolved = await run_sync(resolve, limiter=self.compute)
        return await self._ask_agent(resolved.spec, job_dir)

    async def _ask_agent(
        self, spec: JobSpec, job_dir: str, resumed: ResumedJob | None = None
    ) -> CheckedPaths | None:
        path_check = self.agents.start_check(
            spec.cluster,
            spec=spec.model_dump(mode="json"),
            storage_path=job_dir,
            path_rules=asdict(spec_checks.path_rules(self.settings)),
            resumed=resumed,
        )
        # The check is added before the agent's long poll is woken to fetch it.
        await run_sync(self._wake_agent, spec.cluster)
        return await path_check.result(self.settings.check_wait_s)

    def job_dir(self, spec: JobSpec, job_id: str) -> str:
        """Returns the folder or URI of everything that the job writes."""
        if spec.storage is not None:
            return spec.storage.path
        return str(self.settings.jobs_dir / job_id)

    def _check(self, spec: JobSpec, capacity: ClusterCapacity) -> list[Problem]:
        # The fit is checked only for a consistent spec.
        problems = spec_checks.check_rules(spec, self.settings)
        return problems or cluster_fit.check_fit(spec, capacity)

    def _wake_agent(self, cluster: str) -> None:
        with self.store.write() as session:
            lifecycle.raise_revision(session, cluster)


def _created(prepared: PreparedJob) -> lifecycle.NewEvent:
    """Returns the first event of a job, a warning if its paths were not checked."""
    job = prepared.row
    event = lifecycle.NewEvent("job.created", f"job {job.name!r} created", actor="user")
    if prepared.is_checked:
        return event
    message = (
        f"{event.message}; its paths were not checked, because the agent of cluster "
        f"{job.cluster!r} does not answer: a wrong one fails the job later"
    )
    return replace(event, message=message, level="warn")


def _add_warnings(session: Session, job: JobRow, spec: JobSpec) -> None:
    """Adds an event for everything that is legal in a spec and may not be intended."""
    for warning in spec_warnings(spec):
        data = {"pointer": warning.pointer, "code": warning.code}
        message = f"{warning.pointer}: {warning.detail}"
        event = lifecycle.NewEvent("spec.warning", message, "warn", data)
        lifecycle.add_event(session, job, event)

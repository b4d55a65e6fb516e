"""Decides where a run under torchrun begins.

Owns: the checkpoint to resume from, the attempt's number, the id of the run, and what is
refused before any data are prepared. Must not know: Ray, HTTP, how ranks train.
"""

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from megatron_ray.checkpoint.claim import Claim, read_claim
from megatron_ray.checkpoint.directory import (
    COMMITTED,
    FOLDER,
    CheckpointInfo,
    RunIdentity,
    finish_commit,
    forget_rollbacks,
    list_checkpoints,
    record_rollback,
    rollbacks_of,
)
from megatron_ray.checkpoint.disk_space import room_problems, writable_problems
from megatron_ray.checkpoint.integrity.digests import verify_share
from megatron_ray.checkpoint.records.rollbacks import Rollback, steps_left_out
from megatron_ray.checkpoint.resume_config import compare_with_checkpoint
from megatron_ray.checkpoint.resume_point import choose_resume_point
from megatron_ray.config.problem import Problem
from workers.announcements import Announcements
from workers.driver.journal import JournalError, job_of_folder
from workers.protocol.job import JobSpec
from workers.rank.environment import RankEnv
from workers.rank.messages import UserError

Notify = Callable[[str], None]

_START = "start"
_VERIFY = "verify"


@dataclass(frozen=True)
class RunStart:
    """Where a run begins."""

    attempt: int
    run: RunIdentity = field(default_factory=RunIdentity)
    resume_from: str | None = None
    """Path of the checkpoint to resume from; None: begin at step 0."""
    step: int = 0
    """Steps that are done already."""
    left_out: tuple[int, ...] = ()
    """Steps whose samples are left out, because the run was rolled back to before them."""
    claim: Claim | None = None
    """The claim of the folder, on rank 0."""

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        values = asdict(self)
        del values["claim"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the start that `to_json` described."""
        run = values["run"]
        identity = RunIdentity(**{**run, "damaged": tuple(run["damaged"])})
        left_out = tuple(values["left_out"])
        return cls(**{**values, "run": identity, "left_out": left_out})


class StartDecision:
    """Agrees on the start of a run with all ranks; rank 0 decides.

    `notify` gets a line for everything that users should know. `run_id` is the id of a new
    run; a run of this id in the folder is resumed. Raises UserError when the run cannot
    start, StorageError.
    """

    def __init__(
        self,
        spec: JobSpec,
        env: RankEnv,
        announcements: Announcements,
        notify: Notify,
        run_id: str | None = None,
    ) -> None:
        assert spec.storage is not None
        self._spec = spec
        self._path = spec.storage.path
        self._env = env
        self._announcements = announcements
        self._notify = notify
        self._run_id = run_id

    def decide(self, *, resume: bool) -> RunStart:
        """Decides on rank 0, and claims the folder for the attempt."""
        _raise_for(writable_problems(self._path))
        resume = resume or self._has_begun()
        self._require_no_live_job(resume)
        self._require_no_live_run(resume)
        if resume:
            start = self._resume()
        else:
            self._require_own_folder()
            forget_rollbacks(self._path)
            start = self._new_run()
        _raise_for(room_problems(self._spec, self._path))
        return self._claimed(start)

    def roll_back(self, rollback: Rollback, rolled_back: RunStart) -> RunStart:
        """Records a rollback on rank 0, and decides where the run goes on."""
        record_rollback(self._path, rollback)
        start = self._resume()
        # Without a checkpoint it begins anew as the same run.
        if start.resume_from is None:
            start = replace(start, run=rolled_back.run)
        self._notify(f"the run goes on from step {start.step}")
        return self._claimed(start)

    def _claimed(self, start: RunStart) -> RunStart:
        left_out = steps_left_out(rollbacks_of(self._path))
        claim = Claim.of_this_process(start.attempt, start.run.id)
        claim.write(self._path)
        start = replace(start, left_out=left_out)
        self._announcements.announce(_START, start.to_json())
        return replace(start, claim=claim)

    def follow(self) -> RunStart:
        """Reads this rank's share of checkpoints that rank 0 considers, then its decision."""
        while True:
            kind, value = self._announcements.receive()
            if kind == _START:
                return RunStart.from_json(value)
            damage = verify_share(value, self._env.rank, self._env.world_size)
            self._announcements.answer(damage or "")

    def _has_begun(self) -> bool:
        """Whether an earlier start of this very run has used the folder."""
        claim = read_claim(self._path)
        return claim is not None and self._is_own(claim)

    def _is_own(self, claim: Claim) -> bool:
        return self._run_id is not None and claim.run == self._run_id

    def _new_run(self) -> RunStart:
        attempt = self._next_attempt()
        run_id = self._run_id or new_run_id()
        return RunStart(attempt, RunIdentity(run_id, first_attempt=attempt))

    def _next_attempt(self) -> int:
        """Returns a number above that of every attempt that has used the folder."""
        last = max((item.attempt for item in rollbacks_of(self._path)), default=0)
        claim = read_claim(self._path)
        if claim is not None:
            last = claim.attempt
        for checkpoint in list_checkpoints(self._path):
            last = max(last, checkpoint.attempt)
        return last + 1

    def _resume(self) -> RunStart:
        self._finish_commits()
        point = choose_resume_point(self._path, self._find_damage)
        for item in point.passed_over:
            self._notify(
                f"warning: passing over a checkpoint that cannot be loaded, {item}"
            )
        checkpoint = point.checkpoint
        if checkpoint is None:
            self._notify(f"{self._path} holds no checkpoint; the run begins at step 0")
            return self._new_run()
        comparison = compare_with_checkpoint(checkpoint.path, self._spec)
        _raise_for(comparison.problems)
        for line in comparison.accepted:
            self._notify(f"resuming with a change: {line}")
        damaged = [item.info.name for item in point.passed_over if item.info.was_committed]
        run = replace(checkpoint.run, damaged=(*checkpoint.run.damaged, *damaged))
        return RunStart(self._next_attempt(), run, checkpoint.path, checkpoint.step)

    def _finish_commits(self) -> None:
        """Finishes commits that ended before the marker, as the successor of a driver does."""
        for info in list_checkpoints(self._path):
            if info.lacks_marker:
                finish_commit(info.path)
                self._notify(
                    f"{info.path} lacked only its {COMMITTED} marker, which it has now"
                )

    def _require_own_folder(self) -> None:
        """Raises UserError when another run's checkpoints are in, or around, the folder."""
        outer = _run_around(self._path)
        if outer is not None:
            detail = (
                f"{self._path} is inside the checkpoints of the run in {outer}; give this one "
                "a storage.path of its own"
            )
            _raise_for([Problem("/storage/path", "in_use", detail)])
        others = []
        for info in list_checkpoints(self._path):
            if info.was_committed or info.lacks_marker:
                others.append(info)
        if not others:
            return
        detail = (
            f"{self._path} holds committed checkpoints of another run, up to "
            f"step {others[-1].step}; go on with that run with --resume, or give this one a "
            "storage.path of its own"
        )
        _raise_for([Problem("/storage/path", "in_use", detail)])

    def _require_no_live_job(self, resume: bool) -> None:
        """Raises UserError when the folder belongs to a job of a service."""
        try:
            job = job_of_folder(self._path)
        except JournalError as error:
            raise UserError(f"the job cannot start: {error}") from error
        if job is None or (resume and job.has_ended):
            return
        remedy = "give this run a storage.path of its own"
        if resume:
            remedy = f"cancel {job.job_id} first, or {remedy}"
        detail = f"{self._path} belongs to {job.job_id}, a job of a service; {remedy}"
        _raise_for([Problem("/storage/path", "in_use", detail)])

    def _require_no_live_run(self, resume: bool) -> None:
        """Raises UserError while another run, or this one, is writing to the folder."""
        claim = read_claim(self._path)
        if claim is None or not claim.may_be_running:
            return
        # The launcher that starts a run again has ended its processes.
        if self._is_own(claim):
            return
        remedy = "give this one a storage.path of its own"
        if claim.is_of_this_machine:
            remedy = f"stop it first, or {remedy}"
        # On another machine it may have been killed, which only the user can know.
        elif resume:
            return
        else:
            remedy = (
                f"{remedy}, or, if that one was killed, take the folder over with --resume"
            )
        detail = (
            f"{self._path} is in use by another run that has not ended: attempt {claim.attempt} "
            f"of {claim.run}, process {claim.pid} on {claim.host}; {remedy}"
        )
        _raise_for([Problem("/storage/path", "in_use", detail)])

    def _find_damage(self, info: CheckpointInfo) -> str | None:
        """Returns what is wrong with a checkpoint; all ranks read a share of its bytes."""
        self._announcements.announce(_VERIFY, info.path)
        damage = verify_share(info.path, self._env.rank, self._env.world_size)
        for answer in self._announcements.answers():
            damage = damage or answer or None
        return damage


def new_run_id() -> str:
    """Returns an id for a run without a job."""
    return f"run-{uuid.uuid4().hex[:12]}"


def _run_around(path: str) -> str | None:
    """Returns the folder of a run whose checkpoints a path would be among."""
    parts = path.rstrip("/").split("/")
    for number, part in enumerate(parts):
        root = "/".join(parts[:number]) or "."
        if part == FOLDER and list_checkpoints(root):
            return root
    return None


def _raise_for(problems: tuple[Problem, ...] | list[Problem]) -> None:
    """Raises UserError with all problems, if there are any."""
    if problems:
        lines = ""
        for problem in problems:
            lines += f"\n  {problem.pointer}: {problem.detail}"
        raise UserError(f"the job cannot start:{lines}")

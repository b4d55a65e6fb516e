"""Runs a job without a driver and without a service: under torchrun, Slurm or Ray Train.

Owns: the order of spec, start, data and training, and which rank reports an error.

Rank 0 decides where the run begins and prepares the data while the others wait on the
store, and commits a checkpoint once a counter in the store shows that every rank has
written its part. Must not know: Ray, HTTP.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from signal import SIGTERM

import torch

from megatron_ray.checkpoint.claim import Claim
from megatron_ray.checkpoint.directory import (
    latest_committed,
    list_checkpoints,
    rollbacks_of,
)
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.stores import PrefixStore, Store
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.reports import (
    CheckpointFailedReport,
    ProfileReport,
    Report,
    RuleReport,
    SkippedStepReport,
)
from megatron_ray.training.rules.errors import RollbackError, RuleError
from megatron_ray.training.session import discard_report
from workers.announcements import Announcements, RefusedError
from workers.data_tasks import prepare_data
from workers.decisions.faults.rollbacks import plan_rollback
from workers.decisions.planned_exit import reached_limit
from workers.driver.relay import describe_failed_save
from workers.exceptions import WorkersError
from workers.hang_watch import HangWatch
from workers.job_file import read_spec
from workers.protocol.job import JobSpec
from workers.protocol.spec_warnings import spec_warnings
from workers.rank.environment import (
    ProcessEnvironmentError,
    RankEnv,
    export_credentials,
)
from workers.rank.messages import StartRequest, UserError
from workers.rank.session import connect_store, train
from workers.run_reports import RunReports, prepared_report
from workers.run_start import Notify, RunStart, StartDecision
from workers.stop_signals import StopSignals
from workers.store_committer import StoreCommitter

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 75
"""A run ended at a limit of its spec: it is to be started again (EX_TEMPFAIL)."""

_PREPARED = "prepared"
_REPORTED_KEY = "reported"
_ERROR_KEY = "error"
_ENDED_KEY = "ended"
_OTHER_ERROR_CHECK_S = 0.05
_OTHER_ERROR_S = 5.0
"""Seconds to wait for the error of another rank, which is the cause of a lost
connection."""
_STOPPED_BY_SIGNAL = 128
"""Exit codes of processes that a signal has ended, as shells report them: 128 + number."""


class TrainingFailedError(WorkersError):
    """A run has failed for a reason that is no bug; the message is complete.

    It is empty on ranks whose error another rank has reported.
    """

    def __init__(self, message: str, exit_code: int, kind: ErrorKind) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.kind = kind


@dataclass(frozen=True)
class Ending:
    """How a run ended on this rank."""

    message: str | None = None
    """A line about the outcome, on rank 0."""
    exit_code: int = 0


def discard(_: str) -> None:
    """Ignores a line."""


def run_standalone(
    job: Path,
    overrides: Sequence[str],
    reports: Path | None,
    *,
    resume: bool,
    notify: Notify = discard,
) -> Ending:
    """Trains a job on the ranks that torchrun, or srun, started.

    `overrides` are `path.to.field=value`; `reports` is a file for rank 0's reports;
    `notify` gets a line for everything that users should know meanwhile. Raises
    UserError when the run cannot start and TrainingFailedError when it fails, with an
    empty message on all ranks but one, so that each error is printed once.
    """
    try:
        env = RankEnv.from_environ()
    except ProcessEnvironmentError as error:
        raise UserError(str(error)) from error
    # torchrun prints the output of all its processes, so only one has messages.
    if env.rank != 0:
        notify = discard
    try:
        spec = read_spec(job, overrides, env.world_size)
        request = start_request(env, spec, device_of(spec), _device_index(env))
        return RankRun(request, spec, notify).run(reports, resume=resume)
    except UserError as error:
        if env.rank == 0:
            raise
        raise UserError("") from error


class RankRun:
    """One process of a run, on the ranks that a launcher has started.

    `run_id` is the id of a new run; a launcher that starts the same run again resumes it
    by this id. `listener` gets every report of this rank.
    """

    def __init__(
        self,
        request: StartRequest,
        spec: JobSpec,
        notify: Notify,
        run_id: str | None = None,
        listener: Callable[[Report], None] = discard_report,
    ) -> None:
        assert spec.storage is not None
        self._env = request.env
        self._spec = spec
        self._storage_path = spec.storage.path
        self._notify = notify
        self._request = request
        self._listener = listener
        # torchrun's own store is shared by every group of the process: these keys, like
        # each attempt's process group, have a prefix of their own in it.
        self._store: Store = PrefixStore("megatron-ray", connect_store(request))
        env = request.env
        self._announcements = Announcements(self._store, env.rank, env.world_size)
        self._decision = StartDecision(spec, env, self._announcements, notify, run_id)
        self._reports = RunReports(None, notify)
        self._claim: Claim | None = None

    def run(self, reports: Path | None, *, resume: bool) -> Ending:
        """Trains on this rank to the end; `reports` is a file for rank 0's reports.

        Raises RefusedError on every rank when the run cannot start, and
        TrainingFailedError when it fails.
        """
        for line in warning_lines(self._spec):
            self._notify(line)
        if self._env.rank == 0:
            self._reports = RunReports(reports, self._notify)
        try:
            start = self._begin(resume=resume)
            if self._is_done(start, self._spec.training.known_steps):
                return self._nothing_left(start)
            data = self._prepared(start)
            if self._is_done(start, self._spec.training.steps_over(data.num_train_tokens)):
                return self._nothing_left(start)
            while True:
                try:
                    return self._train(self._request_of(start, data), start)
                except RollbackError as error:
                    start = self._rolled_back(error, start)
        finally:
            if self._claim is not None:
                self._claim.end(self._storage_path)
            self._reports.close()

    def _begin(self, *, resume: bool) -> RunStart:
        """Returns where the run begins; rank 0 decides before any data are prepared."""
        if self._env.rank:
            return self._decision.follow()
        with self._announcements.refusing_on_error():
            # Before any path is opened; the process belongs to this run alone.
            export_credentials(self._spec.credentials)
            start = self._decision.decide(resume=resume)
            self._claim = start.claim
            self._reports.open(start)
        return start

    def _rolled_back(self, error: RollbackError, start: RunStart) -> RunStart:
        """Returns where the run goes on after a rollback, which rank 0 decides.

        Raises TrainingFailedError when it may not be rolled back.
        """
        try:
            if self._env.rank:
                return self._decision.follow()
            with self._announcements.refusing_on_error():
                plan = plan_rollback(
                    start.attempt,
                    error.facts,
                    str(error),
                    rollbacks_of(self._storage_path),
                    list_checkpoints(self._storage_path),
                    self._spec.training.max_rollbacks,
                )
                if plan.rollback is None:
                    raise UserError(f"{error}, but not {plan.refusal}")
                start = self._decision.roll_back(plan.rollback, start)
                self._claim = start.claim
                self._reports.open(start)
            return start
        except RefusedError as refused:
            message = self._on_first(str(refused)) or ""
            raise TrainingFailedError(message, EXIT_FAILED, ErrorKind.RULE) from refused

    def _request_of(self, start: RunStart, data: PreparedData) -> StartRequest:
        return replace(
            self._request,
            data=data.model_dump(mode="json"),
            attempt=start.attempt,
            resume_from=start.resume_from,
            left_out=start.left_out,
        )

    def _is_done(self, start: RunStart, steps: int | None) -> bool:
        # A number of epochs is known in steps only once the data are prepared.
        return start.resume_from is not None and steps is not None and start.step >= steps

    def _nothing_left(self, start: RunStart) -> Ending:
        message = (
            f"nothing was left to do: the run has all of its {start.step} steps; newest "
            f"checkpoint: {start.resume_from}"
        )
        return Ending(self._on_first(message))

    def _prepared(self, start: RunStart) -> PreparedData:
        """Prepares the data on rank 0 and returns their description on all ranks."""
        if self._env.rank:
            _, value = self._announcements.receive()
            return PreparedData.model_validate(value)
        started = time.monotonic()
        with self._announcements.refusing_on_error():
            export_credentials(self._spec.credentials)
            data = prepare_data(self._spec, resume_from=start.resume_from)
            # Of runs that have started at once, only the last one goes on.
            if start.claim is not None:
                start.claim.require(self._storage_path)
            for note in data.notes:
                self._notify(f"warning: {note}")
            if data.first_document:
                sys.stdout.write(f"{data.first_document}\n")
            seconds = time.monotonic() - started
            self._reports.write(prepared_report(self._spec, data, seconds))
        self._announcements.announce(_PREPARED, data.model_dump(mode="json"))
        return data

    def _train(self, request: StartRequest, start: RunStart) -> Ending:
        committer = StoreCommitter(self._spec, request, self._store, start)
        with StopSignals(self._notify) as signals:
            try:
                outcome = self._train_and_commit(request, committer, signals)
            except RollbackError:
                raise
            except MegatronRayError as error:
                raise self._reported(error) from error
            except RuntimeError as error:
                # The error of a connection to a rank that has failed itself.
                if self._is_reported():
                    kind = ErrorKind.INTERNAL
                    raise TrainingFailedError("", EXIT_FAILED, kind) from error
                raise
        if outcome == "finished":
            message = f"finished; newest checkpoint: {committer.committed or 'none'}"
            return Ending(self._on_first(message))
        if outcome == "exited":
            limit = reached_limit(request.spec["training"], committer.last_step)
            message = (
                f"ended after step {committer.last_step} by {limit}; newest checkpoint: "
                f"{committer.committed}; --resume goes on from it"
            )
            return Ending(self._on_first(message), EXIT_RESUMABLE)
        cause = "a signal to another rank"
        if signals.received is not None:
            cause = signals.received.name
        message = (
            f"stopped after step {committer.last_step} by {cause}; newest checkpoint: "
            f"{committer.committed}; --resume goes on from it"
        )
        number = signals.received or SIGTERM
        return Ending(self._on_first(message), _STOPPED_BY_SIGNAL + number)

    def _train_and_commit(
        self, request: StartRequest, committer: StoreCommitter, signals: StopSignals
    ) -> str:
        watch = HangWatch(
            self._env.rank, self._spec.restart.hang_timeout_s, sys.stderr.write
        )

        def report(item: Report) -> None:
            watch.advanced(item)
            self._reports.write(item)
            if isinstance(item, SkippedStepReport | RuleReport):
                self._notify(f"warning: {item.message}")
            # The other ranks know nothing of these.
            if isinstance(item, ProfileReport):
                sys.stderr.write(f"{item.sentence()}\n")
            if isinstance(item, CheckpointFailedReport):
                message = describe_failed_save(self._env.rank, vars(item))
                sys.stderr.write(f"warning: {message}\n")
            committer.report(item)
            self._listener(item)

        try:
            with watch:
                outcome = train(request, report, signals.command)
        except RuleError:
            # Its last checkpoint is written, and every rank leaves off like this one.
            raise
        except BaseException:
            committer.rank_failed()
            raise
        finally:
            # Also after a failure, so that a complete checkpoint is committed.
            committer.close()
        committer.raise_error()
        # A rank that ends early lets torchrun end the others, also rank 0 while it commits.
        if outcome != "finished":
            self._await_commit()
        return outcome

    def _await_commit(self) -> None:
        if self._env.rank == 0:
            self._store.set(_ENDED_KEY, "")
            return
        # The store ends with rank 0 where no agent of torchrun serves it.
        with suppress(RuntimeError):
            self._store.wait([_ENDED_KEY], timedelta(seconds=self._request.timeout_s))

    def _on_first(self, message: str) -> str | None:
        if self._env.rank:
            return None
        return message

    # ---- errors

    def _reported(self, error: MegatronRayError) -> MegatronRayError:
        """Returns the error to raise; only the first rank that has one has a message."""
        kind = error.failure_kind
        # A bug, which needs its traceback.
        if kind is ErrorKind.INTERNAL:
            return error
        if kind is ErrorKind.RULE:
            self._await_commit()
        exit_code = EXIT_FAILED
        if kind is ErrorKind.USER:
            exit_code = EXIT_USER_ERROR
        if self._store.add(_REPORTED_KEY, 1) > 1:
            return TrainingFailedError("", exit_code, kind)
        message = str(error)
        if kind in (ErrorKind.STORAGE, ErrorKind.DISK_FULL, ErrorKind.RULE):
            message = f"{message}; newest checkpoint: {self._newest_checkpoint()}"
        self._store.set(_ERROR_KEY, message)
        return TrainingFailedError(message, exit_code, kind)

    def first_error(self) -> str:
        """Waits for the message of the first rank that has failed; no longer than a moment.

        Empty when there is none.
        """
        with suppress(RuntimeError):
            self._store.wait([_ERROR_KEY], timedelta(seconds=_OTHER_ERROR_S))
            return self._store.get(_ERROR_KEY).decode()
        return ""

    def _is_reported(self) -> bool:
        """Returns whether another rank reports an error, for which it waits a moment."""
        deadline = time.monotonic() + _OTHER_ERROR_S
        while self._env.world_size > 1 and time.monotonic() < deadline:
            if self._store.add(_REPORTED_KEY, 0):
                return True
            time.sleep(_OTHER_ERROR_CHECK_S)
        return False

    def _newest_checkpoint(self) -> str:
        try:
            newest = latest_committed(self._storage_path)
        except MegatronRayError:
            return "unknown"
        if newest is None:
            return "none"
        return newest.path


def warning_lines(spec: JobSpec) -> list[str]:
    """Returns what is legal in a spec and may not be intended, a line each."""
    return [
        f"warning: {warning.pointer}: {warning.detail}" for warning in spec_warnings(spec)
    ]


def start_request(
    env: RankEnv, spec: JobSpec, device: str, device_index: int
) -> StartRequest:
    """Returns the request of a rank before its data and its attempt are known."""
    return StartRequest(
        env=env,
        spec=spec.model_dump(mode="json"),
        data={},
        attempt=1,
        device=device,
        device_index=device_index,
    )


def _device_index(env: RankEnv) -> int:
    """Returns the index of this rank's GPU among those that its process can use."""
    # Batch systems may show each process its own GPU only (srun --gpus-per-task=1).
    if torch.cuda.device_count() == 1:
        return 0
    return env.local_rank


def device_of(spec: JobSpec) -> str:
    """Returns the device that resources.accelerator selects on this machine."""
    if spec.resources.accelerator == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if spec.resources.accelerator == "gpu":
        raise UserError(
            "resources.accelerator is gpu, but this machine has no usable GPU; set it to "
            "auto or cpu"
        )
    return "cpu"

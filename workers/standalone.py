"""Runs a job under torchrun, without Ray and without a service.

Owns: spec, data and commits, for which the driver is responsible under Ray.

Rank 0 prepares the data while the others wait on the store, and commits a checkpoint
once a counter in the store shows that every rank has written its part. Must not know:
Ray, HTTP.
"""

import queue
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_ray.checkpoint.directory import latest_committed, list_checkpoints
from megatron_ray.commands import Command
from megatron_ray.config.checkpoint import StorageConfig
from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.problem import ConfigError, Problem
from megatron_ray.config.train_config import apply_overrides, read_mapping
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.prepared import PreparedData
from megatron_ray.reports import (
    CheckpointReport,
    EvalReport,
    PhaseReport,
    Report,
    SkippedStepReport,
    StepReport,
)
from megatron_ray.validation import check, resolution
from workers.data_tasks import prepare_data
from workers.driver.commit import CheckpointLedger, WholeCheckpoint, commit_whole
from workers.protocol.job import JobSpec
from workers.protocol.spec_warnings import spec_warnings
from workers.rank.environment import ProcessEnvironmentError, RankEnv
from workers.rank.messages import StartRequest, UserError
from workers.rank.session import connect_store, train
from workers.rank.spool import Spool
from workers.rank.stores import PrefixStore, Store

_PREPARE_TIMEOUT = timedelta(hours=24)
_COMMIT_CHECK_S = 0.02
_DATA_KEY = "data"
_PREPARED = "prepared:"
_PROBLEM = "problem:"


def run_standalone(
    job: Path, overrides: Sequence[str], reports: Path | None, resume: bool
) -> str | None:
    """Trains a job on the ranks that torchrun started.

    `overrides` are `path.to.field=value`; `reports` is a file for rank 0's reports.
    Returns a line about the outcome on rank 0, None elsewhere. Raises UserError, with
    an empty message on all ranks but 0, so that the error is printed once.
    """
    try:
        env = RankEnv.from_environ()
    except ProcessEnvironmentError as error:
        raise UserError(str(error)) from error
    try:
        return _run(env, job, overrides, reports, resume)
    except UserError as error:
        # torchrun prints the output of all its processes, so only one has a message.
        if env.rank == 0:
            raise
        raise UserError("") from error


def _run(
    env: RankEnv, job: Path, overrides: Sequence[str], reports: Path | None, resume: bool
) -> str | None:
    spec = read_spec(job, overrides, env.world_size)
    assert spec.storage is not None
    if env.rank == 0:
        _print_warnings(spec)
    request = StartRequest(
        env=env,
        spec=spec.model_dump(mode="json"),
        data={},
        attempt=1,
        device=_device(spec),
        device_index=env.local_rank,
    )
    # torchrun's own store is shared by every group of the process: these keys, like each
    # attempt's process group, have a prefix of their own in it.
    store = PrefixStore("megatron-ray", connect_store(request))
    # Every rank finds the same checkpoint and number, because none is written before all
    # ranks have joined the process group.
    started = time.monotonic()
    data = _share_prepared(spec, env, store)
    prepared = _prepared_report(spec, data, time.monotonic() - started)
    resume_from = None
    if resume:
        newest = latest_committed(spec.storage.path)
        resume_from = newest.path if newest else None
    request = replace(
        request,
        data=data.model_dump(mode="json"),
        attempt=_next_attempt(spec.storage.path),
        resume_from=resume_from,
    )
    return _train(request, spec, store, reports, prepared)


def _prepared_report(spec: JobSpec, data: PreparedData, seconds: float) -> PhaseReport:
    """Returns the first report: the data, and the number of steps on them."""
    detail: dict[str, Any] = {"steps": spec.training.steps_over(data.num_train_tokens)}
    for split, corpora in (("train", data.train), ("validation", data.validation)):
        detail[f"{split}_documents"] = sum(corpus.num_documents for corpus in corpora)
        detail[f"{split}_tokens"] = sum(corpus.num_tokens for corpus in corpora)
    return PhaseReport("prepare", seconds, detail | {"notes": list(data.notes)})


def _print_warnings(spec: JobSpec) -> None:
    """Prints to stderr what is legal in a spec and may not be intended."""
    for warning in spec_warnings(spec):
        sys.stderr.write(f"warning: {warning.pointer}: {warning.detail}\n")


def _next_attempt(storage_path: str) -> int:
    """Returns the number after that of the last attempt that wrote a checkpoint."""
    last = 0
    for checkpoint in list_checkpoints(storage_path):
        last = max(last, checkpoint.attempt)
    return last + 1


def _train(
    request: StartRequest,
    spec: JobSpec,
    store: Store,
    reports: Path | None,
    prepared: PhaseReport,
) -> str | None:
    is_first = request.env.rank == 0
    spool = None
    if reports is not None and is_first:
        spool = _open_spool(reports, request.attempt)
    committer = StoreCommitter(spec, request, store)

    def report(item: Report) -> None:
        if spool is not None:
            spool.append(item.kind, vars(item))
        if isinstance(item, SkippedStepReport) and is_first:
            sys.stderr.write(
                f"warning: step {item.step} skipped, weights unchanged: loss {item.loss}, "
                f"gradient norm {item.grad_norm} ({item.reason})\n"
            )
        committer.report(item)

    report(prepared)
    try:
        outcome = train(request, report, lambda: Command.CONTINUE)
    except ConfigError as error:
        raise UserError(str(error)) from error
    finally:
        # Also after a failure, so that a complete checkpoint is committed.
        committer.close()
        if spool is not None:
            spool.close()
    if committer.error is not None:
        raise committer.error
    if not is_first:
        return None
    return f"{outcome}; newest checkpoint: {committer.committed or 'none'}"


def _open_spool(path: Path, attempt: int) -> Spool:
    try:
        return Spool(path, attempt, segment_bytes=None)
    except OSError as error:
        raise UserError(f"cannot write --reports {path}: {error.strerror}") from error


def read_spec(job: Path, overrides: Sequence[str], world_size: int) -> JobSpec:
    """Returns a job spec with the overrides, resolved for a world of that size.

    Without a storage path the job writes to runs/<name>. Raises UserError with every
    problem, one per line.
    """
    spec = _parse_spec(job, overrides)
    # The same rules as in the service, before anything is started.
    problems = check.find_problems(spec, world_size)
    if problems:
        raise UserError(f"{job} cannot run:{_listed(problems)}")
    resolved = resolution.resolve(spec, world_size)
    needed = resolution.world_size(resolved)
    if needed != world_size:
        raise UserError(
            f"the layout needs a world size of {needed}, but torchrun started {world_size}; "
            f"use --nproc-per-node {needed}, or change parallel"
        )
    storage = resolved.storage
    if storage is None:
        storage = StorageConfig(path=str(Path("runs", spec.name).absolute()))
    # Through JSON, so that the storage path is validated with all other fields.
    values = resolved.model_dump(mode="json")
    values["storage"] = storage.model_dump()
    return JobSpec.from_mapping(values)


def _parse_spec(job: Path, overrides: Sequence[str]) -> JobSpec:
    values: dict[str, Any] = {}
    try:
        values = apply_overrides(read_mapping(job), overrides)
        return JobSpec.from_mapping(values)
    except OSError as error:
        raise UserError(f"cannot read {job}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {job}: it is not a text file") from error
    except ValidationError as error:
        problems = problems_from_pydantic(error.errors(), values, model=JobSpec)
        raise UserError(f"{job} is not a valid job spec:{_listed(problems)}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _listed(problems: Iterable[Problem]) -> str:
    lines = ""
    for problem in problems:
        lines += f"\n  {problem.pointer}: {problem.detail}"
    return lines


def _device(spec: JobSpec) -> str:
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


def _share_prepared(spec: JobSpec, env: RankEnv, store: Store) -> PreparedData:
    """Prepares the data on rank 0 and returns its description on all ranks.

    Raises UserError on all ranks when the data are not usable.
    """
    if env.rank == 0:
        try:
            data = prepare_data(spec)
            for note in data.notes:
                sys.stderr.write(f"warning: {note}\n")
            if data.first_document:
                sys.stdout.write(f"{data.first_document}\n")
        except UnusableDataError as error:
            # The other ranks read it and end too, instead of waiting until torchrun kills
            # them.
            store.set(_DATA_KEY, _PROBLEM)
            raise UserError(f"the job cannot start:{_listed(error.problems)}") from error
        store.set(_DATA_KEY, _PREPARED + data.model_dump_json())
        return data
    store.wait([_DATA_KEY], _PREPARE_TIMEOUT)
    message = store.get(_DATA_KEY).decode()
    if message.startswith(_PROBLEM):
        raise UserError("rank 0 could not prepare the data")
    return PreparedData.model_validate_json(message.removeprefix(_PREPARED))


class StoreCommitter:
    """Commits checkpoints on rank 0 once all ranks have counted their parts in the store.

    On other ranks it only counts. It uses its own thread, since rank 0 waits for the
    slowest rank.
    """

    def __init__(self, spec: JobSpec, request: StartRequest, store: Store) -> None:
        assert spec.storage is not None
        self._path = spec.storage.path
        self._keep_last = spec.checkpoint.keep_last
        self._request = request
        self._store = store
        self._is_first = request.env.rank == 0
        self._ledger = CheckpointLedger(1, request.attempt)
        self._items: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self.committed: str | None = None
        """Path of the newest checkpoint committed here."""
        self.error: Exception | None = None
        """First error of the thread, for the main thread to raise."""
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def report(self, item: Report) -> None:
        """Adds a report of this rank; never blocks."""
        # Phases are neither counted nor stored in a checkpoint.
        if not isinstance(item, PhaseReport):
            self._items.put(item)

    def close(self) -> None:
        """Waits until everything reported so far is committed."""
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            item = self._items.get()
            if item is None:
                return
            try:
                self._handle(item)
            except Exception as error:  # noqa: BLE001 - raised again by the main thread, which must not miss it
                self.error = self.error or error

    def _handle(self, item: Report) -> None:
        if isinstance(item, CheckpointReport):
            self._count(item)
        elif self._is_first and isinstance(item, StepReport | EvalReport):
            self._ledger.reported(
                {
                    "kind": item.kind,
                    "attempt": self._request.attempt,
                    "data": dict(vars(item)),
                }
            )
        # A checkpoint that all ranks have written is complete only after rank 0 has
        # reported its step.
        while self._is_first:
            whole = self._ledger.take_whole()
            if whole is None:
                return
            self._commit(whole)

    def _count(self, item: CheckpointReport) -> None:
        """Adds this rank's part of a checkpoint; on rank 0, waits for all others'."""
        key = f"written/{self._request.attempt}/{item.step}"
        # Bytes before the count: rank 0 reads the sum once the count is complete.
        self._store.add(f"{key}/bytes", item.bytes_written)
        self._store.add(key, 1)
        if self._is_first:
            self._await_all(key)
            num_bytes = self._store.add(f"{key}/bytes", 0)
            self._ledger.written(0, item.step, item.path, num_bytes)

    def _await_all(self, key: str) -> None:
        timeout_s = self._request.timeout_s
        deadline = time.monotonic() + timeout_s
        # Adding 0 reads the counter; `get` would block while it does not exist.
        while self._store.add(key, 0) < self._request.env.world_size:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not every rank wrote its part of the checkpoint within {timeout_s:g} s; "
                    "it stays uncommitted"
                )
            time.sleep(_COMMIT_CHECK_S)

    def _commit(self, whole: WholeCheckpoint) -> None:
        manifest = {
            "world_size": self._request.env.world_size,
            "spec": self._request.spec,
        }
        commit_whole(whole, self._path, self._keep_last, manifest)
        self.committed = whole.path

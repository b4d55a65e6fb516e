"""A job without Ray: what the driver does elsewhere, done by the ranks themselves.

Owns: spec, data and commits under torchrun.

Rank 0 prepares the data while the others wait at the store, and commits a checkpoint
once a counter in the store says that every rank has written its part. Must not know:
Ray, HTTP.
"""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from pydantic import ValidationError

from megatron_ray.checkpoint.directory import latest_committed, list_checkpoints
from megatron_ray.commands import Command
from megatron_ray.config.checkpoint import StorageConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import apply_overrides, read_mapping
from megatron_ray.data.prepare import UnusableDataError
from megatron_ray.data.prepared import PreparedData
from megatron_ray.reports import (
    CheckpointReport,
    EvalReport,
    PhaseReport,
    Report,
    StepReport,
)
from megatron_ray.training.loop import Outcome
from megatron_ray.validation import check, resolution
from workers.data_tasks import prepare_data
from workers.driver.commit import CheckpointLedger, commit_whole
from workers.protocol.job import JobSpec
from workers.rank.environment import ProcessEnvironmentError, RankEnv
from workers.rank.messages import StartOrder, UserError
from workers.rank.session import connect_store, train
from workers.rank.spool import Spool
from workers.rank.stores import PrefixStore, Store

_PREPARE_TIMEOUT = timedelta(hours=24)
_PREPARED = "prepared:"
_PROBLEM = "problem:"


def run_standalone(
    job: Path, overrides: Sequence[str], reports: Path | None, resume: bool
) -> str | None:
    """Trains; returns a last line for people on rank 0, None elsewhere.

    Raises UserError (empty text on all ranks but 0).
    """
    try:
        env = RankEnv.from_environ()
    except ProcessEnvironmentError as problem:
        raise UserError(str(problem)) from problem
    try:
        spec = read_spec(job, overrides, env.world_size)
    except UserError as mistake:
        raise UserError(str(mistake) if env.rank == 0 else "") from None
    assert spec.storage is not None
    kind = _device(spec)
    order = StartOrder(env, spec.model_dump(mode="json"), {}, 1, kind, env.local_rank)
    store = PrefixStore("megatron-ray", connect_store(order))
    data = _share_prepared(spec, env, store)
    found = list_checkpoints(spec.storage.path)
    newest = latest_committed(spec.storage.path) if resume else None
    attempt = 1 + max((info.attempt for info in found), default=0)
    order = replace(
        order,
        data=data.model_dump(mode="json"),
        attempt=attempt,
        resume_from=newest.path if newest else None,
    )
    return _train(order, spec, store, reports)


def _train(
    order: StartOrder, spec: JobSpec, store: Store, reports: Path | None
) -> str | None:
    env = order.env
    spool = (
        Spool(reports, order.attempt, segment_bytes=None)
        if reports and env.rank == 0
        else None
    )
    committer = StoreCommitter(spec, order, store)

    def report(item: Report) -> None:
        if spool is not None:
            spool.append(item.kind, vars(item))
        committer.report(item)

    # torchrun's own store is shared by every group of the process: each attempt has its
    # own prefix in it.
    try:
        outcome: Outcome = train(order, report, lambda: Command.CONTINUE)
    except ConfigError as problem:
        raise UserError(
            str(problem) if env.rank == 0 else ""
        ) from problem  # every rank has found the same
    finally:
        committer.close()
        if spool is not None:
            spool.close()
    if committer.problem is not None:
        raise committer.problem
    return (
        f"{outcome}; newest checkpoint: {committer.committed or 'none'}"
        if env.rank == 0
        else None
    )


def read_spec(job: Path, overrides: Sequence[str], world_size: int) -> JobSpec:
    """The resolved spec for a world.

    Raises UserError with every problem, one a line.
    """
    try:
        spec = JobSpec.from_mapping(apply_overrides(read_mapping(job), overrides))
    except OSError as error:
        raise UserError(f"cannot read {job}: {error.strerror}") from error
    except ValidationError as error:
        lines = [
            f"/{'/'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        ]
        raise UserError(f"{job} is not a job spec:\n  " + "\n  ".join(lines)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    problems = check.find_problems(spec, world_size)
    if problems:
        raise UserError(
            "\n  ".join(
                [
                    f"{job} cannot run:",
                    *(f"{problem.pointer}: {problem.detail}" for problem in problems),
                ]
            )
        )
    resolved = resolution.resolve(spec, world_size)
    needed = resolution.world_size(resolved)
    if needed != world_size:
        text = (
            f"the layout makes up {needed} ranks, torchrun started {world_size}; use "
            f"--nproc-per-node {needed}, or change parallel"
        )
        raise UserError(text)
    storage = resolved.storage or StorageConfig(
        path=str(Path("runs", spec.name).absolute())
    )
    return JobSpec.from_mapping(
        {**resolved.model_dump(mode="json"), "storage": storage.model_dump()}
    )


def _device(spec: JobSpec) -> str:
    wanted = spec.resources.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "resources.accelerator is gpu, but this machine has no usable GPU; set it to "
            "auto or cpu"
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _share_prepared(spec: JobSpec, env: RankEnv, store: Store) -> PreparedData:
    """Rank 0 prepares, the others wait for its word.

    Raises UserError everywhere when the data are not usable.
    """
    if env.rank == 0:
        try:
            data = prepare_data(spec)
        except UnusableDataError as problem:
            store.set("data", _PROBLEM)
            lines = [f"{item.pointer}: {item.detail}" for item in problem.problems]
            raise UserError("\n  ".join(["the job cannot begin:", *lines])) from problem
        store.set("data", _PREPARED + data.model_dump_json())
        return data
    store.wait(["data"], _PREPARE_TIMEOUT)
    word = store.get("data").decode()
    if word.startswith(_PROBLEM):
        raise UserError("")
    return PreparedData.model_validate_json(word[len(_PREPARED) :])


class StoreCommitter:
    """Commits on rank 0 what all ranks have counted in the store; on other ranks it
    only counts.
    """

    def __init__(self, spec: JobSpec, order: StartOrder, store: Store) -> None:
        assert spec.storage is not None
        self._spec = spec
        self._order = order
        self._store = store
        self._path = spec.storage.path
        self._world_size = order.env.world_size
        self._ledger = CheckpointLedger(1, order.attempt)
        self._items: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self.committed: str | None = None
        self.problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def report(self, item: Report) -> None:
        """Takes a report of this rank; never blocks."""
        if not isinstance(item, PhaseReport):
            self._items.put(item)

    def close(self) -> None:
        """Waits until everything reported so far is committed."""
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self._take(item)
            except Exception as error:  # noqa: BLE001 - raised again by the main thread, which must not miss it
                self.problem = self.problem or error

    def _take(self, item: Report) -> None:
        rank = self._order.env.rank
        if isinstance(item, CheckpointReport):
            key = f"written/{self._order.attempt}/{item.step}"
            self._store.add(f"{key}/bytes", item.bytes_written)
            self._store.add(key, 1)
            if rank == 0:
                self._await_all(key)
                self._ledger.written(
                    0, item.step, item.path, self._store.add(f"{key}/bytes", 0)
                )
        elif rank == 0 and isinstance(item, StepReport | EvalReport):
            self._ledger.reported(
                {"kind": item.kind, "attempt": self._order.attempt, "data": {**vars(item)}}
            )
        while rank == 0 and (whole := self._ledger.take_whole()):
            manifest = {"world_size": self._world_size, "spec": self._order.spec}
            commit_whole(whole, self._path, self._spec.checkpoint.keep_last, manifest)
            self.committed = whole.path

    def _await_all(self, key: str) -> None:
        deadline = time.monotonic() + self._order.timeout_s
        while self._store.add(key, 0) < self._world_size:
            if time.monotonic() > deadline:
                limit = self._order.timeout_s
                raise TimeoutError(
                    f"not every rank wrote its part of the checkpoint within {limit:g} s; "
                    "it stays uncommitted"
                )
            time.sleep(0.02)

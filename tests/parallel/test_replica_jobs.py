"""Replica groups that are jobs of their own are what they are in one job, bit for bit; when
one is killed the others go on, and it comes back with their state.
"""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import ReplicaGroupsReport, Report, StepReport
from megatron_ray.training.replica_jobs.heartbeats import file_of
from megatron_ray.training.replica_jobs.peers import Place, joined_jobs
from megatron_ray.training.session import TrainingSession
from tests.parallel.test_checkpoint_training import MODEL
from tests.support.corpus_files import prepare_squares
from tests.support.parity import boxes
from tests.support.ranks import RankFailedError, run_ranks

pytestmark = pytest.mark.parallel
LOST_AFTER_S = 60.0
"""So long that a test which waits for it fails."""
TIMEOUT_S = 240.0


@dataclass
class Trained:
    """What one rank brings home."""

    losses: dict[int, float]
    at: dict[int, float]
    """When each step was reported, by the machine's clock."""
    state: dict[str, np.ndarray]
    """Its boxes of weights and moments, by name and offset."""
    meetings: list[ReplicaGroupsReport]
    """Each time that other jobs than before were there."""


def config(
    folder: Path, local_sgd: dict[str, Any], *, steps: int, batch: int, **parallel: Any
) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": MODEL,
            "parallel": {"local_sgd": local_sgd, **parallel},
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(folder / "cache"),
            },
            "training": {
                "seq_length": 32,
                "micro_batch_size": 2,
                "global_batch_size": batch,
                "steps": steps,
            },
            "optimizer": {"lr": 0.01},
            "storage": {"path": str(folder / "out")},
        }
    )


def job_of(
    folder: Path,
    group: int,
    local_sgd: dict[str, Any],
    lost_after_s: float = LOST_AFTER_S,
    **fields: Any,
) -> TrainConfig:
    """The config of one of the jobs, with storage of its own."""
    meeting = {
        "path": str(folder / "meeting"),
        "group": group,
        "lost_after_s": lost_after_s,
        "start_timeout_s": 120,
    }
    settings = config(folder, {**local_sgd, "rendezvous": meeting}, **fields)
    storage = {"path": str(folder / f"out-{group}")}
    return TrainConfig.from_mapping(
        settings.model_dump(exclude_unset=True) | {"storage": storage}
    )


def train(
    rank: int,
    world_size: int,
    settings: TrainConfig,
    data: PreparedData,
    act: Callable[[int], None] | None = None,
    stop_after: int | None = None,
) -> Trained:
    """Trains one job's rank; `act` is called with the number of each step."""
    dims = ParallelDims.of(settings.parallel)
    mesh = ParallelMesh.create(dims, World(rank, world_size, rank, "cpu"))
    losses: dict[int, float] = {}
    times: dict[int, float] = {}
    meetings: list[ReplicaGroupsReport] = []

    def note(report: Report) -> None:
        if isinstance(report, StepReport):
            losses[report.step] = report.loss
            times[report.step] = time.time()
            if act is not None:
                act(report.step)
        if isinstance(report, ReplicaGroupsReport):
            meetings.append(report)

    def poll() -> Command:
        if stop_after is not None and max(losses, default=0) >= stop_after:
            return Command.CHECKPOINT_AND_STOP
        return Command.CONTINUE

    with joined_jobs(settings, Place(mesh, lambda: "127.0.0.1", note, poll)) as peers:
        session = TrainingSession(settings, mesh, data, report=note, poll=poll, peers=peers)
        session.run()
    state = session.optimizer.sharded_state()
    arrays = {}
    for prefix in ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/"):
        for name, offset, values in boxes(state, prefix):
            arrays[f"{prefix}{name}@{offset}"] = values
    return Trained(losses, times, arrays, meetings)


def die(step: int) -> None:
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def freeze(step: int) -> None:
    if step == 5:
        os.kill(os.getpid(), signal.SIGSTOP)


def linger(step: int) -> None:
    time.sleep(0.15)


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedData:
    plain = config(tmp_path, {"groups": 2, "sync_every": 1}, steps=8, batch=8, dp=2)
    return prepare_squares(plain.data)


def start(
    pool: ThreadPoolExecutor, settings: TrainConfig, data: PreparedData, *rest: Any
) -> Future[list[Trained]]:
    """Starts the ranks of a job; several jobs train at once."""
    world = ParallelDims.of(settings.parallel).world_size
    return pool.submit(run_ranks, train, world, settings, data, *rest, timeout_s=TIMEOUT_S)


METHODS: dict[str, dict[str, Any]] = {
    "local_sgd": {"sync_every": 3},
    "des_loc": {"sync_every": 2, "sync_moments_every": {"exp_avg": 3, "exp_avg_sq": 4}},
    "diloco": {"sync_every": 3, "outer_optimizer": {}, "fragments": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_jobs_are_groups_of_one_job_bit_for_bit(
    tmp_path: Path, corpus: PreparedData, method: str
) -> None:
    local_sgd = {"groups": 2, **METHODS[method]}
    together = config(tmp_path, local_sgd, steps=7, batch=8, dp=2)
    with ThreadPoolExecutor(2) as pool:
        running = [
            start(pool, job_of(tmp_path, group, local_sgd, steps=7, batch=4, dp=1), corpus)
            for group in range(2)
        ]
        jobs = [job.result()[0] for job in running]
    groups = run_ranks(train, 2, together, corpus, timeout_s=TIMEOUT_S)
    for job, group in zip(jobs, groups, strict=True):
        assert job.state.keys() == group.state.keys()
        for name, values in group.state.items():
            np.testing.assert_array_equal(job.state[name], values, err_msg=name)
    mean = {step: (jobs[0].losses[step] + jobs[1].losses[step]) / 2 for step in range(1, 8)}
    assert mean == pytest.approx(groups[0].losses, rel=1e-6)


@pytest.mark.parametrize("layout", [{"dp": 2}, {"dp": 1, "tp": 2}])
def test_a_job_of_several_ranks_is_a_group_of_them(
    tmp_path: Path, corpus: PreparedData, layout: dict[str, int]
) -> None:
    local_sgd = {"groups": 2, "sync_every": 2, "sync_moments_every": {"exp_avg": 3}}
    together = config(
        tmp_path, local_sgd, steps=5, batch=8, **layout | {"dp": 2 * layout["dp"]}
    )
    with ThreadPoolExecutor(2) as pool:
        running = [
            start(
                pool, job_of(tmp_path, group, local_sgd, steps=5, batch=4, **layout), corpus
            )
            for group in range(2)
        ]
        jobs = [rank for job in running for rank in job.result()]
    # Ranks of a group are neighbours along dp, which is the last axis but pp.
    groups = run_ranks(train, 4, together, corpus, timeout_s=TIMEOUT_S)
    for job, group in zip(jobs, groups, strict=True):
        for name, values in group.state.items():
            np.testing.assert_array_equal(job.state[name], values, err_msg=name)


def test_the_others_go_on_when_a_job_is_killed_and_it_comes_back(
    tmp_path: Path, corpus: PreparedData
) -> None:
    local_sgd = {"groups": 3, "sync_every": 4, "outer_optimizer": {}}
    fields = {"steps": 60, "batch": 4, "dp": 1}
    jobs = [job_of(tmp_path, group, local_sgd, **fields) for group in range(3)]
    with ThreadPoolExecutor(4) as pool:
        running = [start(pool, jobs[group], corpus, linger) for group in (1, 2)]
        killed = start(pool, jobs[0], corpus, die)
        with suppress(RankFailedError, OSError, EOFError, RuntimeError):
            killed.result()
        died = time.time()
        back = start(pool, jobs[0], corpus, linger)
        others = [job.result()[0] for job in running]
        returned = back.result()[0]
    for other in others:
        assert list(other.losses) == list(range(1, 61)), "no step is missed or repeated"
        gaps = np.diff([at for at in other.at.values() if at > died - 1])
        assert gaps.max() < LOST_AFTER_S, "nobody waits for the time of a silent job"
        together, *_, again = other.meetings
        assert (together.groups, together.lost) == ((0, 1, 2), ())
        # It may be back before the others meet.
        assert (again.groups, again.joined) == ((0, 1, 2), (0,))
    first = min(returned.losses)
    assert 5 < first < 60, "it goes on where the others are"
    assert first % 4 == 1
    assert list(returned.losses) == list(range(first, 61))
    for name, values in others[0].state.items():
        if name.startswith("model/"):
            np.testing.assert_array_equal(returned.state[name], values, err_msg=name)
            np.testing.assert_array_equal(others[1].state[name], values, err_msg=name)


def test_a_silent_job_is_left_behind_after_its_time(
    tmp_path: Path, corpus: PreparedData
) -> None:
    local_sgd = {"groups": 2, "sync_every": 4}
    jobs = [
        job_of(tmp_path, group, local_sgd, 4.0, steps=12, batch=4, dp=1)
        for group in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        # The ranks of a job are killed at their timeout.
        silent = pool.submit(run_ranks, train, 1, jobs[0], corpus, freeze, timeout_s=90.0)
        other = start(pool, jobs[1], corpus).result()[0]
        assert not silent.done()
        with suppress(TimeoutError):
            silent.result()
    assert list(other.losses) == list(range(1, 13))


def test_a_job_that_stops_leaves_at_once(tmp_path: Path, corpus: PreparedData) -> None:
    local_sgd = {"groups": 2, "sync_every": 2}
    jobs = [
        job_of(tmp_path, group, local_sgd, steps=9, batch=4, dp=1) for group in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        stopping = start(pool, jobs[0], corpus, None, 3)
        other = start(pool, jobs[1], corpus).result()[0]
        stopped = stopping.result()[0]
    assert max(stopped.losses) < 9
    assert list(other.losses) == list(range(1, 10))
    assert max(np.diff(list(other.at.values()))) < LOST_AFTER_S
    assert [(each.groups, each.lost) for each in other.meetings] == [
        ((0, 1), ()),
        ((1,), (0,)),
    ]
    assert not list((tmp_path / "meeting").glob(file_of(0)))


def test_jobs_of_different_layouts_are_refused(
    tmp_path: Path, corpus: PreparedData
) -> None:
    local_sgd = {"groups": 2, "sync_every": 2}
    fields = {"steps": 4, "batch": 4, "dp": 1}
    with ThreadPoolExecutor(2) as pool:
        one = start(pool, job_of(tmp_path, 0, local_sgd, **fields), corpus)
        other = start(pool, job_of(tmp_path, 1, local_sgd, tp=2, **fields), corpus)
        with pytest.raises(Exception, match="group 1 has another layout than group 0"):
            other.result()
        assert len(one.result()[0].losses) == 4

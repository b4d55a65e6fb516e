"""The library over a file system that fails: nothing is taken for missing or whole that
cannot be read, and nothing dies of it.
"""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_ray.checkpoint.directory import (
    latest_committed,
    list_checkpoints,
)
from megatron_ray.checkpoint.resume_point import choose_resume_point
from megatron_ray.data.index_cache import load_or_build
from megatron_ray.data.indexed import IndexedDataset, IndexedDatasetBuilder
from megatron_ray.storage.errors import DiskFullError, StorageError
from megatron_ray.storage.storage import open_storage
from tests.support.chaos.schedule import OF_STORAGE, FaultKind, make_schedule
from tests.support.checkpoint_folders import write_checkpoint
from tests.support.faulty_storage.mounted import FaultyStorage, faulty_storage, why_not
from tests.support.service_process import SPEC, ServiceProcess
from workers.driver.logs import JobLogs


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyStorage]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with faulty_storage(tmp_path_factory.mktemp("faulty")) as storage:
        yield storage


@pytest.fixture
def storage(mounted: FaultyStorage) -> Iterator[FaultyStorage]:
    yield mounted
    mounted.heal()


FACTS = {"step": 2, "attempt": 1, "loss": 1.0}


def test_a_storage_that_cannot_be_read_is_no_empty_one(storage: FaultyStorage) -> None:
    root = storage.path / "job"
    write_checkpoint(root, 2, 1, FACTS)
    storage.fail(60.0)
    with pytest.raises(StorageError, match="Input/output error"):
        list_checkpoints(str(root))
    with pytest.raises(StorageError, match="Input/output error"):
        choose_resume_point(str(root))
    with pytest.raises(StorageError, match="Input/output error"):
        open_storage(str(root)).exists("not looked for before")
    logs = JobLogs(open_storage(str(root)))
    assert logs.size(1, 0) == 0
    assert "Input/output error" in str(logs.problem)
    storage.heal()
    point = choose_resume_point(str(root))
    assert point.checkpoint is not None
    assert point.checkpoint.step == 2


def test_a_commit_that_fails_counts_only_once_it_is_repeated(
    storage: FaultyStorage,
) -> None:
    root = storage.path / "half"
    write_checkpoint(root, 2, 1, FACTS)
    storage.fill(60.0)
    with pytest.raises(DiskFullError, match=f"{root}.*No space left on device; free some"):
        write_checkpoint(root, 4, 1, FACTS)
    newest = latest_committed(str(root))
    assert newest is not None
    assert newest.step == 2
    storage.heal()
    write_checkpoint(root, 4, 1, FACTS)
    newest = latest_committed(str(root))
    assert newest is not None
    assert newest.step == 4


def test_a_corpus_that_cannot_be_read_raises_and_ends_no_process(
    storage: FaultyStorage,
) -> None:
    prefix = storage.path / "corpus"
    builder = IndexedDatasetBuilder(prefix, np.dtype(np.uint16))
    builder.add([1, 2, 3])
    builder.end_document()
    builder.close()
    storage.fail_reads(60.0)
    with pytest.raises(StorageError, match="Input/output error"):
        IndexedDataset(str(prefix))
    storage.heal()
    assert IndexedDataset(str(prefix)).get(0).tolist() == [1, 2, 3]


def test_arrays_stay_in_memory_where_their_cache_cannot_be_written(
    storage: FaultyStorage,
) -> None:
    storage.fill(60.0)
    cache = str(storage.path / "cache")
    arrays = load_or_build(cache, "key", lambda: {"order": np.arange(3)})
    assert arrays["order"].tolist() == [0, 1, 2]


def test_a_stall_ends_by_itself_and_loses_nothing(storage: FaultyStorage) -> None:
    storage.stall(0.3)
    path = storage.path / "late"
    path.write_text("written")
    assert (storage.backing / "late").read_text() == "written"


def test_the_service_answers_when_its_own_disk_is_full_and_loses_nothing(
    storage: FaultyStorage, tmp_path: Path
) -> None:
    service = ServiceProcess(storage.path)
    service.log = tmp_path / "service.log"
    service.start()
    try:
        with service.client(service.user_token) as client:
            assert client.post("/v1/jobs", json=SPEC).status_code == 201
            for make in (storage.fill, storage.fail_writes):
                make(60.0)
                refused = client.post("/v1/jobs", json=SPEC)
                assert refused.status_code == 503
                assert refused.headers["Retry-After"] == "2"
                assert len(client.get("/v1/jobs").json()["data"]) == 1
            storage.heal()
            assert client.post("/v1/jobs", json=SPEC).status_code == 201
            assert len(client.get("/v1/jobs").json()["data"]) == 2
    finally:
        service.kill()


def test_the_schedule_of_a_seed_is_always_the_same() -> None:
    def schedule() -> list[str]:
        strikes = make_schedule(
            random.Random(17),
            tuple(FaultKind),
            num_jobs=10,
            per_job=3,
            num_double=7,
            num_steps=300,
        )
        kinds = [fault.kind for strike in strikes for fault in strike.faults]
        assert set(kinds) == set(FaultKind)
        double = [strike.faults for strike in strikes if len(strike.faults) == 2]
        assert len(double) == 7
        for first, second in double:
            assert not (first.kind in OF_STORAGE and second.kind in OF_STORAGE)
        for earlier, later in pairwise(strikes):
            assert earlier.job < later.job or earlier.step <= later.step
        return [str(strike) for strike in strikes]

    assert len(schedule()) == 30
    assert schedule() == schedule()

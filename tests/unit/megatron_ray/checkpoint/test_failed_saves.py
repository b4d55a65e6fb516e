"""Saves that the storage refuses: reported, tried again, and the end of a run at last."""

from pathlib import Path

import pytest
import torch

from megatron_ray.checkpoint.writer import CheckpointWriter
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import CheckpointFailedReport, CheckpointReport
from megatron_ray.sharding.sharded_state import ShardedState, whole_tensor
from megatron_ray.storage import outages
from megatron_ray.storage.errors import DiskFullError, StorageError
from megatron_ray.storage.outages import FailedSaves
from megatron_ray.storage.storage import LocalStorage

Reports = list[CheckpointReport | CheckpointFailedReport]


class Outage:
    """Lets so many writes fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_left = 0
        write = LocalStorage.write_bytes_atomic

        def write_or_fail(storage: LocalStorage, name: str, data: bytes) -> None:
            if self.num_left:
                self.num_left -= 1
                raise DiskFullError("write", storage.uri(name), "No space left on device")
            write(storage, name, data)

        monkeypatch.setattr(LocalStorage, "write_bytes_atomic", write_or_fail)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    monkeypatch.setattr("megatron_ray.checkpoint.writer.RETRY_S", (0.0, 0.0, 0.0))
    return Outage(monkeypatch)


def state() -> ShardedState:
    return {"model/x": whole_tensor(torch.ones(3))}


def writer_to(reports: Reports) -> CheckpointWriter:
    return CheckpointWriter(ParallelMesh.single(), "async", reports.append, reports.append)


def test_a_refused_save_is_reported_with_its_cause_and_the_next_one_is_written(
    tmp_path: Path, outage: Outage
) -> None:
    reports: Reports = []
    writer = writer_to(reports)
    outage.num_left = 1
    writer.save(1, str(tmp_path / "1"), state(), {})
    writer.save(2, str(tmp_path / "2"), state(), {})
    writer.close()
    failed, written = reports
    assert isinstance(failed, CheckpointFailedReport)
    assert (failed.step, failed.path) == (1, str(tmp_path / "1"))
    assert str(tmp_path / "1") in failed.cause
    assert "No space left on device; free some space there, or lower" in failed.cause
    assert isinstance(written, CheckpointReport)
    assert written.step == 2


def test_the_last_save_is_tried_again_until_it_is_written(
    tmp_path: Path, outage: Outage
) -> None:
    reports: Reports = []
    writer = writer_to(reports)
    outage.num_left = 3
    writer.save(1, str(tmp_path / "1"), state(), {})
    writer.close()
    assert [report.kind for report in reports] == [
        "checkpoint_failed",
        "checkpoint_written",
    ]
    assert outage.num_left == 0


def test_a_last_save_that_is_never_written_raises_its_error(
    tmp_path: Path, outage: Outage
) -> None:
    writer = writer_to([])
    outage.num_left = 100
    writer.save(1, str(tmp_path / "1"), state(), {})
    with pytest.raises(StorageError, match="No space left"):
        writer.wait()
    # Once, as every error.
    writer.wait()


def test_a_run_does_not_train_on_for_ever_without_checkpoints(
    tmp_path: Path, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "MAX_FAILING_S", -1.0)
    reports: Reports = []
    writer = writer_to(reports)
    outage.num_left = 100
    for step in (1, 2, 3):
        writer.save(step, str(tmp_path / str(step)), state(), {})
    with pytest.raises(DiskFullError, match="free some space there"):
        writer.save(4, str(tmp_path / "4"), state(), {})
    assert [report.step for report in reports] == [1, 2]


def test_both_the_number_and_the_time_of_failed_saves_count() -> None:
    failed = FailedSaves().with_another(100.0)
    assert not failed.ends_run(1e6)
    failed = failed.with_another(101.0).with_another(102.0)
    assert failed == FailedSaves(3, 100.0)
    assert not failed.ends_run(100.0 + outages.MAX_FAILING_S)
    assert failed.ends_run(101.0 + outages.MAX_FAILING_S)

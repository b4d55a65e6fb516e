"""The short form of tests/integration/test_chaos.py: a job whose storage fails and fills up,
and which loses a rank and its driver meanwhile.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos.schedule import Fault, FaultKind, Strike
from tests.support.chaos.striker import Striker
from tests.support.fault_injection import (
    RankFile,
    assert_as_undisturbed,
    assert_nothing_left,
    history,
    observed,
)
from tests.support.faulty_storage.mounted import FaultyStorage, faulty_storage, why_not
from tests.support.running_stack import Road

pytestmark = pytest.mark.ray

STEPS = 200
EVERY_STEPS = 10
STRIKES = (
    Strike(0, 30, 0.0, (Fault(FaultKind.WRITES_FAIL, 0.0, 0, 6.0),)),
    Strike(
        0,
        100,
        0.0,
        (Fault(FaultKind.DISK_FULL, 0.0, 0, 3.0), Fault(FaultKind.RANK, 0.2, 1)),
    ),
    Strike(0, 130, 0.0, (Fault(FaultKind.DRIVER, 0.0, 0),)),
)

STORAGE_EVENTS = ("rank.checkpoint_failed", "checkpoint.delayed")


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FaultyStorage]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with faulty_storage(tmp_path) as mounted:
        yield mounted


def spec(road: Road, folder: Path) -> dict[str, Any]:
    return road.spec(
        storage={"path": str(folder)},
        training={"steps": STEPS, "global_batch_size": 4},
        checkpoint={"every_steps": EVERY_STEPS},
        restart={"backoff_s": 0.2},
    )


def test_a_job_survives_a_failing_and_a_full_storage_with_a_rank_and_a_driver_dying(
    road: Road, storage: FaultyStorage
) -> None:
    undisturbed = str(road.client.submit(spec(road, storage.path / "plain"))["id"])
    assert road.finish(undisturbed)["status"] == "succeeded"
    with observed(road) as observer:
        striker = Striker(road, observer, storage, None)
        job_id = str(road.client.submit(spec(road, storage.path / "struck"))["id"])
        with RankFile(road, job_id) as file:
            for strike in STRIKES:
                file.reached(strike.step)
                striker.strike(strike, job_id)
            job = road.finish(job_id, 300)
        assert_as_undisturbed(road, job, road.rows(undisturbed))
        assert_nothing_left(road, observer, [undisturbed, job_id], 40)
    # Training went on while the storage refused its checkpoints.
    assert job["attempt"] >= 2
    assert job["failures"] == 1
    rows = [row for row in history(road, job_id) if row["type"] in STORAGE_EVENTS]
    assert rows
    assert all(str(storage.path) in row["message"] for row in rows)

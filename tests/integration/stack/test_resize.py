"""A running job is resized by hand; its losses are those of a job that was left alone."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from tests.support.running_stack import Road, WholeJob

pytestmark = pytest.mark.ray

STEPS = 60


def four_replicas(road: Road) -> dict[str, Any]:
    return road.spec(
        parallel={"tp": 1, "dp": 4, "sequence_parallel": False},
        training={"micro_batch_size": 2, "global_batch_size": 8, "steps": STEPS},
        resources={"cpus_per_rank": 0.5},
        restart={"standby": False},
        elastic={"min_dp": 1, "max_dp": 4},
    )


def losses(road: Road, job_id: str) -> list[float]:
    rows = road.rows(job_id)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def worlds(road: Road, job_id: str) -> list[int]:
    attempts = road.client.attempts(job_id)["data"]
    return [
        attempt["world_size"] for attempt in sorted(attempts, key=lambda a: a["attempt"])
    ]


def test_a_job_is_resized_from_four_replicas_to_two_and_back(
    road: Road, whole_job: WholeJob
) -> None:
    job_id = road.client.submit(four_replicas(road))["id"]
    road.step(job_id, 5)
    options = ["--url", road.record.url, "--token", road.record.token, "--json"]
    result = CliRunner().invoke(app, ["resize", job_id, "--dp", "2", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["resolved_spec"]["parallel"]["dp"] == 2
    road.wait(job_id, lambda job: job["attempt"] == 2 and job["status"] == "running")
    road.client.resize(job_id, 4)
    job = road.finish(job_id)
    assert job["status"] == "succeeded", job
    assert worlds(road, job_id) == [4, 2, 4]
    # No step was done twice, and none differs by more than the order of its sums.
    # Those of two tensor-parallel ranks, which train on the same batches.
    undisturbed = [row["loss"] for row in whole_job.rows]
    assert losses(road, job_id) == pytest.approx(undisturbed, rel=1e-5)
    assert job["failures"] == 0

"""A real job measures its node before it trains, and `cluster check` without training."""

import json

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from tests.support.running_stack import Road

pytestmark = pytest.mark.ray

LOOSE = 0.01
"""Ranks of a busy machine differ by a factor, but not by a hundred."""


def test_a_job_measures_and_then_trains(road: Road) -> None:
    spec = road.spec(
        parallel={"dp": 1},
        training={"steps": 2, "eval_samples": 1},
        preflight={"mode": "before_training", "min_ratio": LOOSE},
        resources={"cpus_per_rank": 0.5},
        restart={"standby": False},
    )
    job_id = road.client.submit(spec)["id"]
    assert road.finish(job_id)["status"] == "succeeded"
    assert [row["step"] for row in road.rows(job_id)] == [1, 2]
    (event,) = road.client.events(job_id, types="preflight.passed")["data"]
    (node,) = event["data"]["nodes"]
    assert node["num_ranks"] == 2
    assert node["flops"] > 0
    assert node["all_reduce_bytes_per_s"] > 0
    parts = road.client.events(job_id, types="rank.speed")["data"]
    assert [part["data"]["part"] for part in parts] == ["device", "node"]


def test_the_command_measures_what_is_free(road: Road) -> None:
    options = ["--url", road.record.url, "--token", road.record.token, "--json"]
    command = ["cluster", "check", "--min-ratio", str(LOOSE), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    body = json.loads(result.output)
    assert body["num_nodes"] == 1
    assert body["bad"] == []
    job = road.client.show(body["job_id"])
    assert (job["name"], job["status"]) == ("cluster-check", "succeeded")
    assert road.rows(body["job_id"]) == []
    # Nothing of it was prepared.
    (prepared,) = road.client.events(body["job_id"], types="job.prepared")["data"]
    assert prepared["message"] == "no data are needed"

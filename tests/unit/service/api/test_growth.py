"""A cluster that an autoscaler may give nodes to: plans, the queue, what is shown."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.jobs import queue
from tests.support.service_tokens import USER_TOKEN

Json = dict[str, Any]
GROUP = {"name": "gpu-2", "max_nodes": 3, "cpus": 4, "gpus": 2}


@pytest.fixture
def head(make_node: Callable[..., Json]) -> Json:
    return make_node("head", cpus=0)


def gpu_node(make_node: Callable[..., Json], name: str) -> Json:
    return make_node(name, cpus=4, gpus=2, labels={"ray.io/node-group": "gpu-2"})


def four_ranks(spec: Json) -> Json:
    return {**spec, "parallel": {"tp": 2, "dp": 2, "sequence_parallel": True}}


def queued(service: Any, spec: Json) -> tuple[str, Any]:
    job_id = service.submit(spec)["id"]
    driver = service.driver(job_id)
    driver.send(("prepared", {"manifest": {}}))
    return job_id, driver


def events(service: Any, job_id: str, kind: str) -> list[Json]:
    return [event for event in service.events(job_id) if event["type"] == kind]


def test_a_plan_names_the_nodes_that_must_come(
    service: Any, spec: Json, head: Json, make_node: Callable[..., Json], tmp_path: Path
) -> None:
    service.agent.report(head)
    refused = service.user.post("/v1/plans", json=four_ranks(spec)).json()
    assert (refused["fits"], refused["new_nodes"]) == (False, {})
    service.agent.report(head, node_groups=[GROUP])
    plan = service.user.post("/v1/plans", json=four_ranks(spec)).json()
    assert (plan["fits"], plan["problems"]) == (True, [])
    assert (plan["room"], plan["new_nodes"]) == (0, {"gpu-2": 2})
    assert plan["resolved_spec"]["resources"]["accelerator"] == "gpu"
    assert plan["notes"][0] == (
        "fits when 2 more nodes of group gpu-2 are there; the job waits for them up to "
        "resources.placement_timeout_s=300 s at a time"
    )
    service.agent.report(head, gpu_node(make_node, "n1"), node_groups=[GROUP])
    plan = service.user.post("/v1/plans", json=four_ranks(spec)).json()
    assert plan["notes"][0].startswith("fits when 1 more node of group gpu-2 is there; ")
    path = tmp_path / "job.json"
    path.write_text(json.dumps(four_ranks(spec)))
    options = ["plan", str(path), "--url", service.url, "--token", USER_TOKEN]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0
    assert "today's nodes fit 2 such ranks" in result.output
    eight = {**spec, "parallel": {"tp": 2, "dp": 4, "sequence_parallel": True}}
    (problem,) = service.user.post("/v1/plans", json=eight).json()["problems"]
    assert "8 ranks, but there is room for 6" in problem["detail"]


def test_dp_auto_uses_what_is_there_and_grows_only_to_run_at_all(
    service: Any, spec: Json, head: Json, make_node: Callable[..., Json]
) -> None:
    spec["parallel"] = {"tp": 2, "dp": "auto", "sequence_parallel": True}
    service.agent.report(head, node_groups=[GROUP])
    plan = service.user.post("/v1/plans", json=spec).json()
    assert (plan["world_size"], plan["new_nodes"]) == (2, {"gpu-2": 1})
    nodes = [gpu_node(make_node, name) for name in ("n1", "n2")]
    service.agent.report(head, *nodes, node_groups=[GROUP])
    plan = service.user.post("/v1/plans", json=spec).json()
    assert (plan["world_size"], plan["new_nodes"]) == (4, {})


def test_a_job_shows_which_nodes_it_waits_for_until_they_are_there(
    service: Any, spec: Json, head: Json, make_node: Callable[..., Json]
) -> None:
    service.agent.report(head, node_groups=[GROUP])
    job_id, driver = queued(service, four_ranks(spec))
    assert driver.desired()["desired"] == "run"
    assert driver.desired()["node_groups"][0]["name"] == "gpu-2"
    (admitted,) = events(service, job_id, "job.admitted")
    assert admitted["message"] == "scheduled: 4 GPU ranks, on 2 new nodes of gpu-2"
    driver.states("scheduling")
    for _ in range(2):
        service.agent.report(head, node_groups=[GROUP])
    job = service.job(job_id)
    assert (job["status"], job["status_reason"]) == ("scheduling", "waiting_nodes")
    assert job["message"].startswith("waiting for 2 nodes of gpu-2, ")
    (awaited,) = events(service, job_id, "nodes.awaited")
    assert awaited["data"] == {"new_nodes": {"gpu-2": 2}}
    # One came: the other one is waited for.
    nodes = [gpu_node(make_node, name) for name in ("n1", "n2")]
    service.agent.report(head, nodes[0], node_groups=[GROUP])
    assert service.job(job_id)["message"].startswith("waiting for 1 node of gpu-2, ")
    service.agent.report(head, *nodes, node_groups=[GROUP])
    job = service.job(job_id)
    assert (job["status_reason"], job["message"]) == (None, "")
    assert len(events(service, job_id, "nodes.awaited")) == 1


def test_nodes_that_do_not_come_end_the_wait_and_let_smaller_jobs_pass(
    service: Any,
    spec: Json,
    head: Json,
    make_node: Callable[..., Json],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [head, gpu_node(make_node, "n1")]
    service.agent.report(*nodes, node_groups=[{**GROUP, "max_nodes": 2}])
    large, driver = queued(service, four_ranks(spec))
    driver.states("scheduling")
    small, other = queued(service, {**spec, "parallel": {"dp": 1}})
    groups = [{**GROUP, "max_nodes": 2}]
    service.agent.report(*nodes, node_groups=groups)
    # All that there may be is reserved for the first job.
    assert service.job(small)["message"] == "needs 1 GPU rank; room for 0 now"
    message = "not placed within 300 s: ..."
    reply = driver.states("queued", reason="waiting_gang", message=message)
    assert reply["desired"]["desired"] == "prepare"
    (missing,) = events(service, large, "nodes.missing")
    assert missing["level"] == "warn"
    assert re.fullmatch(
        r"new nodes did not come within resources\.placement_timeout_s \(waiting for 1 node of "
        r"gpu-2, \d+ s\); other jobs go first for 60 s",
        missing["message"],
    )
    job = service.job(large)
    assert (job["status"], job["status_reason"]) == ("queued", "waiting_nodes")
    assert "new nodes did not come in time; they are requested again in" in job["message"]
    assert other.desired()["desired"] == "run"
    # Then the nodes are requested once more, beside those of the small job.
    other.states("scheduling", "starting", "running", attempt=1)
    other.states("succeeded", attempt=1)
    service.agent.report(*nodes, node_groups=groups)
    assert driver.desired()["desired"] == "prepare"
    monkeypatch.setattr(queue, "RETRY_NODES_S", 0.0)
    service.agent.report(*nodes, node_groups=groups)
    assert driver.desired()["desired"] == "run"


def test_a_cluster_lists_what_it_may_grow_to(
    service: Any, head: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.agent.report(head)
    (cluster,) = service.user.get("/v1/cluster").json()["data"]
    assert cluster["node_groups"] == []
    service.agent.report(head, node_groups=[{**GROUP, "accelerator_type": "H100"}])
    (cluster,) = service.user.get("/v1/cluster").json()["data"]
    assert cluster["node_groups"] == [{**GROUP, "accelerator_type": "H100", "labels": {}}]
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(
        app, ["cluster", "--url", service.url, "--token", USER_TOKEN]
    )
    assert "may grow to 3 nodes of gpu-2 (4 CPUs, 2 H100 each)" in result.output

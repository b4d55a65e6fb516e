"""`megatron-ray cluster check`: which nodes it measures, and what it prints."""

import json
from typing import Any

import pytest

from service.cli.commands.clusters.free_nodes import check_spec, choose_nodes
from tests.support.fake_rest_service import FakeService, Run
from workers.decisions.preflight.verdict import (
    BlamedNode,
    LinkSpeed,
    NodeSpeed,
    Verdict,
)
from workers.protocol.job import JobSpec

REASON = "GPU 3: matmul 212 TFLOP/s, median of its peers 610 TFLOP/s"
BAD = BlamedNode("b" * 40, "192.0.2.2", REASON)


def node(letter: str, number: int, **fields: Any) -> dict[str, Any]:
    return {
        "node_id": letter * 40,
        "address": f"192.0.2.{number}",
        "alive": True,
        "cpus": 64.0,
        "gpus": 8.0,
        "storage_ok": True,
        "draining": False,
        "excluded": None,
        **fields,
    }


def cluster(*nodes: dict[str, Any]) -> dict[str, Any]:
    return {"name": "default", "nodes": list(nodes)}


def verdict(*bad: BlamedNode) -> Verdict:
    rows = []
    for letter, number, flops in (("a", 1, 6.1e14), ("b", 2, 2.12e14)):
        rows.append(
            NodeSpeed(
                letter * 40, f"192.0.2.{number}", 8, "NVIDIA H100", flops, 2.9e12, 4.2e11
            )
        )
    link = LinkSpeed(
        ("a" * 40, "b" * 40), ("192.0.2.1", "192.0.2.2"), 4.8e10, is_slow=False
    )
    return Verdict(tuple(rows), (link,), 4.5e10, tuple(bad))


def test_every_free_gpu_gets_a_rank() -> None:
    nodes = cluster(
        node("a", 1),
        node("b", 2),
        node("c", 3, excluded="slow"),
        node("d", 4, draining=True),
        node("e", 5, storage_ok=False),
        node("f", 6, alive=False),
        node("g", 7, gpus=0.0),
    )
    choice = choose_nodes(nodes, {"b" * 40: (5.0, 5)})
    assert [(free.address, free.gpus) for free in choice.nodes] == [
        ("192.0.2.1", 8),
        ("192.0.2.2", 3),
    ]
    assert choice.left_out == (
        ("192.0.2.3", "excluded"),
        ("192.0.2.4", "draining"),
        ("192.0.2.5", "cannot read the storage"),
    )
    spec = JobSpec.from_mapping(check_spec(choice, "default", 0.7))
    assert spec.parallel.dp == 11
    assert spec.resources.accelerator == "gpu"
    assert spec.resources.nodes.only == ("a" * 40, "b" * 40)
    assert (spec.preflight.mode, spec.preflight.min_ratio) == ("only", 0.7)
    assert spec.training.precision == "bf16"


def test_on_cpu_all_ranks_have_equally_many_cores() -> None:
    nodes = cluster(
        node("a", 1, gpus=0.0, cpus=4.0),
        node("b", 2, gpus=0.0, cpus=9.0),
        node("c", 3, gpus=0.0, cpus=4.0),
        node("d", 4, gpus=0.0, cpus=0.0),
    )
    choice = choose_nodes(nodes, {"c" * 40: (3.5, 0)})
    assert choice.left_out == (("192.0.2.3", "in use"),)
    spec = JobSpec.from_mapping(check_spec(choice, "default", 0.8))
    assert (spec.resources.cpus_per_rank, spec.parallel.dp) == (4.0, 3)


def test_named_nodes_are_measured_alone() -> None:
    nodes = cluster(node("a", 1), node("b", 2), node("c", 3))
    choice = choose_nodes(nodes, {}, ["192.0.2.1", "cccccc"])
    assert [free.address for free in choice.nodes] == ["192.0.2.1", "192.0.2.3"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.commands.clusters.check._POLL_S", 0.01)


def serve(service: FakeService, result: Verdict | None, *statuses: str) -> None:
    """Serves a cluster of two free nodes and a check that ends with the verdict."""
    page = {"object": "list", "has_more": False}
    clusters = [cluster(node("a", 1), node("b", 2))]
    service.routes["GET /v1/cluster"] = (200, {**page, "data": clusters})
    service.routes["GET /v1/jobs"] = (200, {**page, "data": [{"id": "job-other"}]})
    other = {"resolved_spec": {"cluster": "default", "resources": {"cpus_per_rank": 1.0}}}
    service.routes["GET /v1/jobs/job-other"] = (200, other)
    ranks = [{"node_id": "a" * 40, "gpu": 0}]
    service.routes["GET /v1/jobs/job-other/ranks"] = (200, {**page, "data": ranks})
    service.routes["POST /v1/jobs"] = (201, {"id": "job-check"})
    bodies = [{"id": "job-check", "status": status} for status in statuses]
    service.routes["GET /v1/jobs/job-check"] = (200, bodies)
    events = []
    if result is not None:
        events = [{"type": "preflight.failed", "data": result.to_data()}]
    service.routes["GET /v1/jobs/job-check/events"] = (200, {**page, "data": events})
    service.routes["POST /v1/cluster/default/exclusions"] = (200, clusters[0])
    service.routes["POST /v1/jobs/job-check/cancel"] = (202, bodies[0])


def sent(service: FakeService, request: str) -> list[Any]:
    return [body for name, body in service.requests if name == request]


def test_good_nodes_are_listed_and_the_exit_code_is_zero(
    run: Run, service: FakeService, quick: None
) -> None:
    serve(service, verdict(), "queued", "running", "succeeded")
    code, out, _ = run("cluster", "check", "--url", service.url)
    assert code == 0
    (spec,) = sent(service, "POST /v1/jobs")
    # One GPU is in use by another job.
    assert spec["parallel"]["dp"] == 15
    assert "measuring 2 nodes in job-check" in out
    lines = out.splitlines()
    (row,) = [line for line in lines if line.startswith("192.0.2.1  ")]
    for figure in ("610 TFLOP/s", "2,900 GB/s", "420 GB/s", "ok"):
        assert figure in row
    assert "192.0.2.1 - 192.0.2.2  48.0 GB/s  ok" in out
    assert "all-reduce of all ranks: 45.0 GB/s per rank" in out


def test_bad_nodes_are_named_and_excluded_only_on_request(
    run: Run, service: FakeService, quick: None
) -> None:
    serve(service, verdict(BAD), "failed")
    code, out, _ = run("cluster", "check", "--url", service.url)
    assert code == 1
    assert f"bad 192.0.2.2: {REASON}" in out
    assert "megatron-ray cluster exclude NODE" in out
    assert sent(service, "POST /v1/cluster/default/exclusions") == []
    code, out, _ = run("cluster", "check", "--exclude-bad", "--url", service.url)
    assert code == 1
    assert sent(service, "POST /v1/cluster/default/exclusions") == [
        {"node": "b" * 40, "reason": f"cluster check: {REASON}"}
    ]
    assert "excluded; `megatron-ray cluster include NODE`" in out


def test_json_has_all_figures(run: Run, service: FakeService, quick: None) -> None:
    serve(service, verdict(BAD), "failed")
    code, out, _ = run("cluster", "check", "--json", "--url", service.url)
    assert code == 1
    body = json.loads(out)
    assert body["job_id"] == "job-check"
    assert body["bad"][0]["node_id"] == "b" * 40
    assert body["nodes"][0]["flops"] == 2.12e14
    assert body["not_measured"] == []


def test_a_check_that_does_not_start_is_cancelled(
    run: Run, service: FakeService, quick: None
) -> None:
    serve(service, None, "queued")
    code, _, err = run("cluster", "check", "--timeout", "1", "--url", service.url)
    assert code == 1
    assert "has not started within 1 s, and is cancelled" in err
    assert len(sent(service, "POST /v1/jobs/job-check/cancel")) == 1


def test_a_check_without_a_verdict_shows_why_its_job_failed(
    run: Run, service: FakeService, quick: None
) -> None:
    serve(service, None, "failed")
    problem = {"detail": "rank 1: CUDA error: device lost"}
    ended = {"id": "job-check", "status": "failed", "problem": problem}
    service.routes["GET /v1/jobs/job-check"] = (200, ended)
    code, _, err = run("cluster", "check", "--url", service.url)
    assert code == 1
    assert "has measured nothing: rank 1: CUDA error: device lost" in err


def test_an_unknown_node_and_a_full_cluster_are_refused(
    run: Run, service: FakeService, quick: None
) -> None:
    serve(service, None, "queued")
    code, _, err = run("cluster", "check", "192.0.2.9", "--url", service.url)
    assert code == 2
    assert "no living node 192.0.2.9" in err
    code, _, err = run("cluster", "check", "--cluster", "x", "--url", service.url)
    assert code == 2
    assert "no cluster x" in err
    clusters = [cluster(node("a", 1, gpus=1.0))]
    service.routes["GET /v1/cluster"] = (200, {"data": clusters})
    code, _, err = run("cluster", "check", "--url", service.url)
    assert code == 1
    assert "no node can be measured: 192.0.2.1 (in use)" in err
    assert sent(service, "POST /v1/jobs") == []

"""Nodes on which no rank may start: added by hand or by a job's failure, shown, removed."""

from typing import Any

import pytest

EXCLUSIONS = "/v1/cluster/default/exclusions"


def cluster(service: Any) -> Any:
    return service.user.get("/v1/cluster").json()["data"][0]


def excluded(service: Any) -> list[tuple[str, str, str]]:
    entries = cluster(service)["excluded_nodes"]
    return [(entry["node_id"], entry["reason"], entry["by"]) for entry in entries]


def ranks(job: Any) -> int:
    dp: int = job["resolved_spec"]["parallel"]["dp"]
    return dp


def test_an_excluded_node_is_shown_and_used_by_no_job_until_it_is_included(
    service: Any, make_node: Any
) -> None:
    service.agent.report(make_node("n1", cpus=2), make_node("n2", cpus=2))
    body = {"node": "10.0.0.2", "reason": "a fan is broken"}
    answer = service.user.post(EXCLUSIONS, json=body)
    assert answer.status_code == 200
    assert answer.json()["excluded_nodes"][0]["since"]
    assert excluded(service) == [("n2", "a fan is broken", "admin")]
    assert [node["excluded"] for node in cluster(service)["nodes"]] == [
        None,
        "a fan is broken",
    ]
    # The next report does not know of it and changes nothing.
    service.agent.report(make_node("n1", cpus=2), make_node("n2", cpus=2))
    assert excluded(service) == [("n2", "a fan is broken", "admin")]
    # `dp: auto` counts the nodes that are left.
    assert ranks(service.submit()) == 2
    assert service.user.delete(f"{EXCLUSIONS}/10.0.0.2").status_code == 200
    assert excluded(service) == []
    assert ranks(service.submit()) == 4


def test_a_queued_job_starts_once_its_node_is_included(
    service: Any, make_node: Any
) -> None:
    service.agent.report(make_node("n1", cpus=4))
    job_id = service.submit()["id"]
    service.user.post(EXCLUSIONS, json={"node": "n1"})
    driver = service.driver(job_id)
    reply = driver.send(("prepared", {"manifest": {}, "unigram_nats": 5.5}))
    assert reply["desired"]["desired"] == "prepare"
    assert reply["desired"]["avoid_nodes"] == {"n1": "excluded by hand"}
    service.user.delete(f"{EXCLUSIONS}/n1")
    (desired,) = service.agent.desired().jobs
    assert desired.desired == "run"
    assert desired.avoid_nodes == {}


def test_a_jobs_failure_excludes_its_node_until_it_is_gone(
    service: Any, make_node: Any
) -> None:
    job_id, driver = service.running_job()
    reason = "rank 0: RuntimeError: CUDA error: uncorrectable ECC error encountered"
    data = {"node_id": "n1", "address": "10.0.0.1", "reason": reason}
    event = {"type": "node.excluded", "level": "warn", "message": "m", "data": data}
    revision = service.agent.desired().revision
    driver.send(("event", event), attempt=1)
    assert excluded(service) == [("n1", reason, job_id)]
    reply = service.agent.desired(after=revision)
    assert reply.revision > revision, "the agent tells the other drivers"
    assert reply.jobs[0].avoid_nodes == {"n1": reason}
    # A second failure there keeps the first reason; a user's reason replaces it.
    again = {**event, "data": {**data, "reason": "another"}}
    lost = {**event, "data": {**data, "node_id": "n9"}}
    driver.send(("event", again), ("event", lost), attempt=1)
    assert excluded(service) == [("n1", reason, job_id)]
    service.user.post(EXCLUSIONS, json={"node": "n1", "reason": "to be replaced"})
    assert excluded(service) == [("n1", "to be replaced", "admin")]
    # A node that comes back has another id.
    service.agent.report(make_node("n1", alive=False), make_node("n3"))
    assert excluded(service) == []


def test_a_restart_keeps_the_list(service: Any, make_node: Any) -> None:
    service.agent.report(make_node("n1"))
    service.user.post(EXCLUSIONS, json={"node": "n1", "reason": "r"})
    service.restart()
    assert excluded(service) == [("n1", "r", "admin")]


@pytest.mark.parametrize(
    ("node", "detail"),
    [
        ("10.0.0.9", "no living node has the id or address '10.0.0.9'; there are 10.0.0.1"),
        ("n3", "no living node has the id or address 'n3'"),
        ("abcdef", "2 nodes are named 'abcdef'; name one by its id: abcdef1, abcdef2"),
        ("10.0.0.1", ""),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(
    service: Any, make_node: Any, node: str, detail: str
) -> None:
    nodes = [make_node("abcdef1"), make_node("abcdef2"), make_node("n3", alive=False)]
    service.agent.report(*nodes)
    answer = service.user.post(EXCLUSIONS, json={"node": node})
    if not detail:
        assert answer.status_code == 200
        return
    assert answer.status_code == 422
    assert detail in answer.json()["detail"]
    assert answer.json()["errors"][0]["pointer"] == "/node"


def test_what_is_not_there_is_not_found(service: Any, make_node: Any) -> None:
    service.agent.report(make_node("n1"))
    answer = service.user.post("/v1/cluster/other/exclusions", json={"node": "n1"})
    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "no cluster 'other'; known: default",
    )
    answer = service.user.delete(f"{EXCLUSIONS}/n1")
    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "node 'n1' is not excluded",
    )


def test_a_node_that_drains_is_shown_and_holds_no_new_job(
    service: Any, make_node: Any
) -> None:
    draining = {"draining": True, "drain_deadline": 1.8e9}
    service.agent.report(make_node("n1", cpus=2), make_node("n2", cpus=2, **draining))
    node = cluster(service)["nodes"][1]
    assert (node["draining"], node["drain_deadline"]) == (True, "2027-01-15T08:00:00Z")
    assert ranks(service.submit()) == 2

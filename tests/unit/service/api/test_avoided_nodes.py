"""Drivers learn which living nodes no job may use, and why."""

from typing import Any

Json = dict[str, Any]


def test_a_node_that_cannot_read_the_storage_is_named_to_drivers(
    service: Any, spec: Json, make_node: Any
) -> None:
    service.agent.report(make_node("n1"), make_node("n2"))
    job_id = service.submit(spec)["id"]
    before = service.agent.desired()
    assert before.jobs[0].avoid_nodes == {}
    dead = make_node("n3", alive=False, storage_ok=False)
    service.agent.report(make_node("n1", storage_ok=False), make_node("n2"), dead)
    # The agent's long poll ends at once, and the agent passes it on.
    reply = service.agent.desired(before.revision, wait_s=5)
    assert reply.revision > before.revision
    expected = {"n1": "it cannot read the job storage"}
    assert reply.jobs[0].avoid_nodes == expected
    # So do replies to the driver itself.
    assert service.driver(job_id).desired()["avoid_nodes"] == expected

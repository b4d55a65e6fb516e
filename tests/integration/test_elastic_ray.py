"""An elastic job on nodes that die: driver, workers and placement group are real; only the
training loop is ten lines.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_driver_ray import Submit, assert_nothing_left, spec
from tests.support.fake_service import NAMESPACE, FakeService
from tests.support.local_cluster import local_cluster

pytestmark = pytest.mark.ray

NOTICED_S = 20.0
"""Without shrinking, the job would wait for Ray, which needs a minute."""


class Nodes:
    """Nodes of a cluster that are killed."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._nodes: dict[str, Any] = {}

    def add(self) -> None:
        node = self._cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
        self._nodes[node.node_id] = node

    def kill(self, node_id: str) -> None:
        """SIGKILLs the node's Ray, and so the workers on it."""
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import ray

    with local_cluster() as cluster:
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield Nodes(cluster)


@pytest.fixture
def submit(fake_service: FakeService, nodes: Nodes, tmp_path: Path) -> Submit:
    return Submit(fake_service, tmp_path)


def elastic(steps: int, step_s: float) -> dict[str, Any]:
    """Two replicas of two ranks, each of which fills a node."""
    body = spec(steps=steps, ranks=2, step_s=str(step_s))
    body["parallel"] = {"tp": 2, "dp": 2}
    body["elastic"] = {"min_dp": 1, "max_dp": 2}
    return body


def rank_map(service: FakeService, job_id: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = service.stored(job_id, kind="ranks")[-1]["data"]["ranks"]
    return rows


def running(service: FakeService, job_id: str) -> list[int]:
    """Ranks of each attempt that ran."""
    worlds = []
    for record in service.stored(job_id, kind="attempt"):
        if record["data"]["state"] == "running":
            worlds.append(record["data"]["world_size"])
    return worlds


def driver_node(job_id: str) -> str:
    """Returns the id of the node that the job's driver runs on."""
    import ray
    from ray._private.state import actors

    driver: Any = ray.get_actor(f"{job_id}/driver")
    row: dict[str, Any] = actors(driver._actor_id.hex())
    node_id: str = row["Address"]["NodeID"]
    return node_id


def lose_a_node(
    submit: Submit, service: FakeService, nodes: Nodes, body: dict[str, Any]
) -> tuple[str, float]:
    """Returns the job, and the seconds until it trained again."""
    job_id = submit(body)
    service.wait("steps", lambda: len(service.steps(job_id, 1)) >= 8)
    node_ids = {row["node_id"] for row in rank_map(service, job_id)}
    assert len(node_ids) == 2
    # The driver may be on one of them, and would itself wait for Ray.
    node_ids.discard(driver_node(job_id))
    began = time.monotonic()
    nodes.kill(min(node_ids))
    service.wait("the smaller world", lambda: service.steps(job_id, 2))
    return job_id, time.monotonic() - began


def test_a_job_goes_on_without_a_node_before_ray_has_noticed_its_death(
    submit: Submit, fake_service: FakeService, nodes: Nodes
) -> None:
    nodes.add()
    nodes.add()
    job_id, seconds = lose_a_node(submit, fake_service, nodes, elastic(60, 0.1))
    assert seconds < NOTICED_S
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id), 90)
    assert running(fake_service, job_id) == [4, 2]
    (event,) = fake_service.events(job_id, "job.shrunk")
    assert event["message"] == "goes on with dp=1 instead of 2, without the lost nodes"
    pids = [row["pid"] for row in rank_map(fake_service, job_id)]
    assert_nothing_left(fake_service, job_id, pids)


@pytest.mark.chaos
def test_a_job_grows_back_when_another_node_has_come(
    submit: Submit, fake_service: FakeService, nodes: Nodes
) -> None:
    nodes.add()
    job_id, _ = lose_a_node(submit, fake_service, nodes, elastic(600, 0.5))
    nodes.add()
    fake_service.wait("the full world", lambda: fake_service.steps(job_id, 3), 180)
    assert running(fake_service, job_id) == [4, 2, 4]
    (event,) = fake_service.events(job_id, "job.grown")
    assert event["message"] == "back from dp=1 to dp=2"
    fake_service.want(job_id, desired="cancel", final_checkpoint=False)
    fake_service.wait("the end", lambda: "cancelled" in fake_service.states(job_id), 60)

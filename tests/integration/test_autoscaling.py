"""A job's pending placement group makes Ray's autoscaler start nodes; afterwards they go."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.support.autoscaling_cluster import autoscaling_cluster
from tests.support.fake_service import NAMESPACE
from tests.support.service_tokens import AGENT_TOKEN, tokens_file
from tests.unit.service.conftest import Running
from workers.decisions.cluster_growth import NODE_GROUP_LABEL, group_of, nodes_to_come
from workers.decisions.placement import plan_placement
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeGroup, NodeInfo
from workers.ray.nodes import read_nodes
from workers.ray.worker_group import WorkerGroup

pytestmark = pytest.mark.ray

GROUP = NodeGroup(name="cpu-2", max_nodes=3, cpus=2)
LONG_S = 300.0
"""Far more than needed: other tests may keep the machine busy."""
SPEC: dict[str, Any] = {
    "model": {"preset": "gpt-tiny"},
    "parallel": {"tp": 2, "dp": 2, "sequence_parallel": True},
    "data": {"train": [{"path": "builtin://python-stdlib"}]},
    "training": {"seq_length": 32, "global_batch_size": 4, "steps": 4},
    "optimizer": {"lr": 0.001},
    "checkpoint": {"every_steps": 2},
    "resources": {"accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A cluster that has a head only, and may grow by three nodes with two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with autoscaling_cluster(GROUP, NAMESPACE) as address:
            yield address


def await_that(condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {timeout_s:g} s")


def grown() -> list[NodeInfo]:
    return [node for node in read_nodes() if node.alive and group_of(node) == GROUP.name]


def test_a_pending_placement_group_gets_nodes_that_go_with_it(ray_address: str) -> None:
    plan = plan_placement(JobSpec.from_mapping(SPEC), read_nodes())
    assert not plan.is_feasible
    assert len(nodes_to_come(read_nodes(), [GROUP])) == 3
    group = WorkerGroup("job-growth", NAMESPACE, type("Worker", (), {}))
    pending = group.placement_group(plan)
    assert await_that(lambda: pending.wait(0.2))
    # Two of three: not more than the job needs.
    assert {node.labels[NODE_GROUP_LABEL] for node in grown()} == {"cpu-2"}
    assert len(grown()) == 2
    assert len(nodes_to_come(read_nodes(), [GROUP])) == 1
    group.remove_placement_group()
    await_that(lambda: not grown())
    assert len(nodes_to_come(read_nodes(), [GROUP])) == 3


@pytest.fixture
def service(ray_address: str, tmp_path: Path) -> Iterator[Running]:
    """A service, and an agent that connects the cluster to it."""
    settings = Settings(
        data_dir=tmp_path / "data", tokens_file=tokens_file(tmp_path), single_user=True
    )
    running = Running(settings)
    token = tmp_path / "token"
    token.write_text(AGENT_TOKEN)
    groups = tmp_path / "groups.yaml"
    groups.write_text("- {name: cpu-2, max_nodes: 3, cpus: 2}\n")
    command = [sys.executable, "-m", "workers.agent", f"--service={running.url}"]
    command += [f"--address={ray_address}", f"--token-file={token}"]
    with open(tmp_path / "agent.log", "wb") as log:
        agent = subprocess.Popen(
            [*command, f"--node-groups={groups}"], stdout=log, stderr=log
        )
    try:
        yield running
    finally:
        agent.kill()
        agent.wait()
        running.stop()


@pytest.mark.chaos
def test_a_job_starts_at_zero_nodes_and_leaves_none(service: Running) -> None:
    """Also: the driver of a paused job, and repeated storage checks, keep no node."""
    await_that(lambda: service.user.get("/v1/cluster").json()["data"][0]["nodes"])
    plan = service.user.post("/v1/plans", json=SPEC).json()
    assert (plan["fits"], plan["room"], plan["new_nodes"]) == (True, 0, {"cpu-2": 2})
    job_id = service.submit(SPEC)["id"]
    message = await_that(
        lambda: (
            service.job(job_id)["status_reason"] == "waiting_nodes"
            and service.job(job_id)["message"]
        ),
        LONG_S,
    )
    assert message.startswith("waiting for 2 nodes of cpu-2, ")
    await_that(lambda: service.job(job_id)["status"] == "succeeded", LONG_S)
    await_that(lambda: not grown(), LONG_S)
    long = {**SPEC, "training": {**SPEC["training"], "steps": 100_000}}
    paused = service.submit(long)["id"]
    await_that(lambda: service.job(paused)["status"] == "running", LONG_S)
    service.user.post(f"/v1/jobs/{paused}/pause")
    await_that(lambda: service.job(paused)["status"] == "paused", LONG_S)
    await_that(lambda: not grown(), LONG_S)
    service.user.post(f"/v1/jobs/{paused}/cancel")
    await_that(lambda: service.job(paused)["status"] == "cancelled", LONG_S)

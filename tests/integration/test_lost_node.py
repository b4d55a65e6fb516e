"""A node of a real Ray cluster is lost with its rank: the job continues from the copies in
the other node's memory, bit for bit, while its checkpoints cannot be read.
"""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_service import NAMESPACE, FakeService
from workers.driver.driver import JobDriver

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

STEPS = 600
SAVE_EVERY = 200
COPY_EVERY = 5


class Nodes:
    """A head without CPUs, and nodes with one, which are killed."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "temp_dir": folder,
            "object_store_memory": 80 << 20,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self._nodes: dict[str, Any] = {}

    def add(self) -> None:
        node = self._cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        self._nodes[node.node_id] = node

    def kill(self, node_id: str) -> None:
        """SIGKILLs the node's Ray, and so the workers on it."""
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        import ray

        folder = tempfile.mkdtemp(prefix="mr-", dir="/tmp")
        started = Nodes(folder)
        try:
            ray.init(address=started.address, namespace=NAMESPACE, log_to_driver=False)
            yield started
        finally:
            ray.shutdown()
            started.close()
            shutil.rmtree(folder, ignore_errors=True)


class Job:
    """One job on two nodes, without an agent's process."""

    def __init__(self, service: FakeService, folder: Path, **checkpoint: Any) -> None:
        from workers.agent.driver_registry import DriverRegistry

        self.id = f"job-{uuid.uuid4().hex[:12]}"
        self.folder = folder / self.id
        self._service = service
        self._registry = DriverRegistry(service.url, NAMESPACE, JobDriver)
        text = folder / "corpus.txt"
        text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
        self._spec = {
            "name": "two-nodes",
            "model": {
                "preset": "gpt-tiny",
                "num_layers": 1,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "ffn_hidden_size": 32,
            },
            "parallel": {"dp": 2},
            "data": {"train": [{"path": str(text)}], "tokenizer": {"kind": "bytes"}},
            "training": {
                "seq_length": 16,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "steps": STEPS,
            },
            "optimizer": {"lr": 0.001},
            "checkpoint": {"every_steps": SAVE_EVERY, **checkpoint},
            "resources": {"accelerator": "cpu"},
            "restart": {"standby": False},
            "storage": {"path": str(self.folder)},
        }

    def run(self) -> None:
        self._want("prepare")
        self.wait("prepared data", lambda: self._service.stored(self.id, kind="prepared"))
        self._want("run")

    def _want(self, desired: str) -> None:
        self._service.want(
            self.id, desired=desired, spec=self._spec, job_dir=str(self.folder)
        )
        self._reconcile()

    def _reconcile(self) -> bool:
        """Restarts a driver that was lost with its node."""
        from workers.protocol.wire import DesiredReply

        jobs = [self._service.jobs[self.id]]
        self._registry.set_desired(
            DesiredReply.model_validate({"revision": 1, "jobs": jobs, "terminal": []})
        )
        self._registry.reconcile()
        return True

    def wait(self, what: str, condition: Any) -> None:
        self._service.wait(what, lambda: condition() or not self._reconcile(), 120)

    def finish(self) -> None:
        self.wait("success", lambda: "succeeded" in self._service.states(self.id))

    @property
    def ranks(self) -> list[dict[str, Any]]:
        rows = self._service.stored(self.id, kind="ranks")
        return list(rows[-1]["data"]["ranks"])

    @property
    def losses(self) -> dict[int, tuple[float, float]]:
        """Loss and norm of each step in its last attempt."""
        values = {}
        for attempt in (1, 2):
            for record in self._service.records.get((self.id, f"a{attempt}/r0"), []):
                if record["kind"] == "step":
                    data = record["data"]
                    values[data["step"]] = (data["loss"], data["grad_norm"])
        return values


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_node_costs_the_steps_since_the_copy(
    fake_service: FakeService, nodes: Nodes, tmp_path: Path, lost: int
) -> None:
    """Rank 0's node has the store, its reports and perhaps the driver."""
    while len(nodes._nodes) < 2:
        nodes.add()
    undisturbed = Job(fake_service, tmp_path)
    undisturbed.run()
    undisturbed.finish()
    job = Job(fake_service, tmp_path, peer_every_steps=COPY_EVERY)
    job.run()
    job.wait("steps", lambda: len(fake_service.steps(job.id, 1)) > SAVE_EVERY + COPY_EVERY)
    hidden = job.folder / "hidden"
    (job.folder / "checkpoints").rename(hidden)
    nodes.add()
    nodes.kill(job.ranks[lost]["node_id"])
    job.wait("a step of attempt 2", lambda: fake_service.steps(job.id, 2))
    hidden.rename(job.folder / "checkpoints")
    job.finish()
    first = fake_service.steps(job.id, 2)[0]
    last = fake_service.steps(job.id, 1)[-1]
    assert last - (first - 1) <= COPY_EVERY
    attempts = fake_service.stored(job.id, kind="attempt")
    messages = [row["data"]["message"] for row in attempts]
    assert f"from peer copies of step {first - 1}" in messages
    assert sorted(job.losses) == list(range(1, STEPS + 1))
    assert job.losses == undisturbed.losses

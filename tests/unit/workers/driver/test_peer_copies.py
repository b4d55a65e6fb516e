"""A job whose ranks keep copies of their states continues from them after a failure."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ray.checkpoint.directory import list_checkpoints
from megatron_ray.checkpoint.resume_point import choose_resume_point
from tests.support.fake_cluster import (
    JOB_ID,
    DriverDies,
    FakeCluster,
    FakeControlPlane,
    FakeProcess,
    FaultInjector,
    fake_ports,
)
from workers.decisions.journal_entry import JournalEntry
from workers.decisions.peers.copies import CopySet
from workers.decisions.placement import RankPlace
from workers.driver.commit import contained_records
from workers.driver.journal import start_orders
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.wire import Record
from workers.rank.messages import CopySource


class Job:
    """Two ranks on one node, of which the second one dies."""

    def __init__(
        self, folder: Path, *, copy_every: int, save_every: int, dies: tuple[int, int]
    ) -> None:
        self.folder = folder
        spec = {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"tp": 2, "dp": 1},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {"seq_length": 16, "global_batch_size": 2, "steps": 12},
            "checkpoint": {"every_steps": save_every, "peer_every_steps": copy_every},
            "optimizer": {"lr": 0.001},
            "storage": {"path": str(folder)},
            "restart": {"backoff_s": 0},
        }
        self.cluster = FakeCluster(steps=12, save_every=save_every, dies=dies)
        self.control_plane = FakeControlPlane(spec, str(folder))

    def run(self, die_at: int = 0) -> None:
        folder = str(self.folder)
        faults = FaultInjector(die_at)
        ports = fake_ports(self.cluster, self.control_plane, folder, faults)
        JobLifecycle(JOB_ID, folder, ports).run()

    def begins(self) -> list[str]:
        """From where each attempt started."""
        rows = self.control_plane.of_kind("attempt")
        return [row.data["message"] for row in rows if row.data["state"] == "starting"]

    def event(self, code: str) -> dict[str, Any]:
        (event,) = self.control_plane.events(code)
        return event.data


def test_an_attempt_continues_from_the_newest_copies_and_reads_no_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, copy_every=4, save_every=6, dies=(1, 9))

    def only_before_the_first_attempt(*args: Any) -> Any:
        assert job.begins() == []
        return choose_resume_point(*args)

    patched = "workers.driver.scheduling.choose_resume_point"
    monkeypatch.setattr(patched, only_before_the_first_attempt)
    job.run()
    assert job.begins() == ["from step 0", "from peer copies of step 8"]
    steps = job.control_plane.steps
    assert [steps[step] for step in range(7, 13)] == [1, 1, 2, 2, 2, 2]
    decision = job.event("policy.decision")["message"]
    assert decision.startswith("restarting from the newest peer copies, else from step 6")
    assert job.control_plane.state == "succeeded"


def test_a_newer_checkpoint_is_preferred(tmp_path: Path) -> None:
    job = Job(tmp_path, copy_every=5, save_every=4, dies=(1, 9))
    job.run()
    assert job.begins() == ["from step 0", "from checkpoint step 8"]
    assert job.control_plane.events("peer_copies.incomplete") == []


def test_lost_copies_cost_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path, copy_every=4, save_every=6, dies=(1, 9))

    def forget(process: FakeProcess) -> None:
        """The survivor is not the partner of the rank that dies, as it were."""
        process.copies = [copy for copy in process.copies if copy.rank != 1]

    job.cluster.on_step = forget
    job.run()
    assert job.begins() == ["from step 0", "from checkpoint step 6"]
    event = job.event("peer_copies.incomplete")
    assert event["level"] == "warn"
    assert event["message"] == (
        "no step has copies of all ranks in the processes that are left; the next attempt "
        "starts from storage"
    )


def test_reports_that_no_attempt_repeats_are_in_the_next_checkpoint(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, copy_every=4, save_every=6, dies=(1, 9))
    data = {"step": 8, "loss": 0.5}
    record = Record(n=8, at=0.0, kind="step", attempt=1, data=data)
    job.control_plane.unstored["a1/r0"] = [record]
    job.run()
    records = contained_records(str(tmp_path))
    assert [line.n for line in records["a1/r0"]] == [*range(1, 7), 8]
    steps = [line.value()["data"]["step"] for line in records["a2/r0"]]
    assert steps == [9, 10, 11, 12]


def test_reports_that_the_service_lacks_outlive_the_checkpoint_that_has_them(
    tmp_path: Path,
) -> None:
    """Retention deletes it while the service is away, and the driver may die then."""
    job = Job(tmp_path, copy_every=100, save_every=3, dies=(1, 5))
    data = {"step": 2, "loss": 0.5}
    record = Record(n=2, at=0.0, kind="step", attempt=1, data=data)
    job.control_plane.unstored["a1/r0"] = [record]
    job.run()
    assert job.begins() == ["from step 0", "from checkpoint step 3"]
    infos = list_checkpoints(str(tmp_path))
    assert [(info.step, info.attempt) for info in infos] == [(9, 2), (12, 2)]
    assert [line.n for line in contained_records(str(tmp_path))["a1/r0"]] == [2]


def test_a_driver_that_dies_anywhere_asks_the_processes_again(tmp_path: Path) -> None:
    for die_at in range(1, 400, 3):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        job = Job(folder, copy_every=4, save_every=6, dies=(1, 9))
        try:
            job.run(die_at)
        except DriverDies:
            job.run()
            assert sorted(job.control_plane.steps) == list(range(1, 13))
            assert job.control_plane.state == "succeeded"
            continue
        break
    assert die_at > 60


PLACE = RankPlace(
    rank=0,
    slot=7,
    bundle=0,
    node_id="a",
    address="",
    gpu=None,
    pid=1,
    local_rank=0,
    local_world_size=1,
    node_rank=0,
    coordinates={},
)
ENTRY = JournalEntry(
    job_id="j",
    attempt=2,
    spec={"checkpoint": {"peer_every_steps": 5}},
    prepared={},
    ranks=(PLACE, PLACE.model_copy(update={"rank": 1, "slot": 3, "node_id": "b"})),
    store=("h", 1),
    copies=CopySet(attempt=1, step=5, holders=(3, 7)),
)


def test_start_orders_name_partners_and_copies_by_rank() -> None:
    orders = start_orders(ENTRY, "cpu")
    assert [orders[slot].partner for slot in (7, 3)] == [1, 0]
    assert orders[7].copy == CopySource(1, 5, holder=1)
    assert orders[3].copy == CopySource(1, 5, holder=0)


@pytest.mark.parametrize("spec", [{}, {"checkpoint": {"peer_every_steps": None}}])
def test_a_job_without_copies_has_no_partners(spec: dict[str, Any]) -> None:
    entry = ENTRY.model_copy(update={"spec": spec, "copies": None})
    for order in start_orders(entry, "cpu").values():
        assert (order.partner, order.copy) == (None, None)

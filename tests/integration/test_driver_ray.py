"""A job on a real Ray cluster: driver, workers and placement group are real; only the
training loop is ten lines.
"""

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_service import NAMESPACE, FakeService
from tests.support.fault_injection import until
from workers.protocol.job import JobSpec

pytestmark = pytest.mark.ray


class Submit:
    """Does for one job what agent and service do: makes the driver, attaches it, admits
    the job once its data are ready.
    """

    def __init__(self, service: FakeService, folder: Path) -> None:
        from tests.support.fake_job import FakeDriver
        from workers.agent.driver_registry import DriverRegistry

        self._service = service
        self._folder = folder
        self._registry = DriverRegistry(service.url, NAMESPACE, FakeDriver)
        self._corpus = folder / "corpus.txt"
        self._corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 200)

    def __call__(self, body: dict[str, Any], *, start: bool = True) -> str:
        job_id = f"job-{uuid.uuid4().hex[:12]}"
        folder = str(self._folder / job_id)
        body = {
            **body,
            "storage": {"path": folder},
            "data": {**body["data"], "train": [{"path": str(self._corpus)}]},
        }
        self._service.want(job_id, desired="prepare", spec=body, job_dir=folder)
        self.reconcile()
        if start:
            self._service.wait(
                "prepared data", lambda: self._service.stored(job_id, kind="prepared")
            )
            self._service.want(job_id, desired="run")
        return job_id

    def reconcile(self) -> None:
        from workers.protocol.wire import DesiredReply

        jobs = [
            job
            for job in self._service.jobs.values()
            if job["job_id"] not in self._service.terminal
        ]
        self._registry.set_desired(
            DesiredReply.model_validate(
                {"revision": 1, "jobs": jobs, "terminal": sorted(self._service.terminal)}
            )
        )
        self._registry.reconcile()

    def adopted(self, job_id: str) -> list[dict[str, Any]]:
        """Makes the drivers that are missing; returns the events of their adoptions."""
        self.reconcile()
        return self._service.events(job_id, "driver.adopted")


def driver_pid(job_id: str) -> int:
    import ray

    driver: Any = ray.get_actor(f"{job_id}/driver")
    return int(ray.get(driver.pid.remote()))


def spec(steps: int = 20, ranks: int = 2, **metadata: str) -> dict[str, Any]:
    return {
        "name": "fake",
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": ranks, "dp": 1},
        "data": {
            "train": [{"path": "corpus.txt"}],
            "tokenizer": {"kind": "bytes"},
            "validation_fraction": 0.0,
        },
        "training": {"seq_length": 16, "global_batch_size": 2, "steps": steps},
        "optimizer": {"lr": 0.001},
        "checkpoint": {"every_steps": 5, "keep_last": 2},
        "resources": {"accelerator": "cpu", "placement_timeout_s": 20},
        "restart": {"max_failures": 2, "backoff_s": 0.1},
        "metadata": metadata,
        "grace_s": 5,
    }


@pytest.fixture
def submit(fake_service: FakeService, ends_actors: None, tmp_path: Path) -> Submit:
    return Submit(fake_service, tmp_path)


def actors(job_id: str) -> list[str]:
    import ray

    return sorted(name for name in ray.util.list_named_actors() if name.startswith(job_id))


def rank_pids(service: FakeService, job_id: str) -> list[int]:
    return [row["pid"] for row in service.stored(job_id, kind="ranks")[-1]["data"]["ranks"]]


def committed(service: FakeService, job_id: str) -> list[tuple[int, int]]:
    """(attempt, step) of each reported commit."""
    records = service.stored(job_id, kind="checkpoint")
    return [
        (record["attempt"], record["data"]["step"])
        for record in records
        if record["data"]["action"] == "committed"
    ]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_nothing_left(service: FakeService, job_id: str, pids: list[int]) -> None:
    import ray

    service.wait("the driver's end", lambda: actors(job_id) == [], 15)
    service.wait("the processes' end", lambda: not any(alive(pid) for pid in pids), 15)
    with pytest.raises(ValueError, match="placement group"):
        ray.util.get_placement_group(job_id)


def assert_gap_free(service: FakeService, job_id: str) -> None:
    for (job, _), records in service.records.items():
        if job == job_id:
            assert [record["n"] for record in records] == list(range(1, len(records) + 1))


def test_job_runs_to_succeeded(
    submit: Submit, fake_service: FakeService, tmp_path: Path
) -> None:
    job_id = submit(spec())
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    assert fake_service.states(job_id) == [
        "preparing",
        "scheduling",
        "starting",
        "running",
        "succeeded",
    ]
    assert fake_service.steps(job_id, 1) == list(range(1, 21))
    assert_gap_free(fake_service, job_id)
    checkpoints = [
        (r["data"]["action"], r["data"]["step"])
        for r in fake_service.stored(job_id, kind="checkpoint")
    ]
    assert [step for action, step in checkpoints if action == "committed"] == [
        5,
        10,
        15,
        20,
    ]
    assert [step for action, step in checkpoints if action == "deleted"] == [5, 10]
    rows = fake_service.stored(job_id, kind="ranks")[0]["data"]["ranks"]
    assert [(row["rank"], row["coordinates"]["tp"]) for row in rows] == [(0, 0), (1, 1)]
    assert_nothing_left(fake_service, job_id, [row["pid"] for row in rows])
    assert (
        tmp_path / job_id / "checkpoints" / "step-00000020-a0001" / "COMMITTED"
    ).exists()


def test_killed_rank_goes_on_from_the_last_commit(
    submit: Submit, fake_service: FakeService
) -> None:
    job_id = submit(spec(steps=40, step_s="0.05"))
    fake_service.wait("a commit", lambda: fake_service.stored(job_id, kind="checkpoint"))
    before = rank_pids(fake_service, job_id)
    os.kill(before[1], signal.SIGKILL)
    killed = time.monotonic()
    fake_service.wait("a step of attempt 2", lambda: fake_service.steps(job_id, 2))
    assert time.monotonic() - killed < 15
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    after = rank_pids(fake_service, job_id)
    assert after[0] == before[0], "the survivor's process is used again"
    assert after[1] != before[1]
    commits = [step for attempt, step in committed(fake_service, job_id) if attempt == 1]
    assert fake_service.steps(job_id, 2) == list(range(commits[-1] + 1, 41))
    assert fake_service.states(job_id)[-3:] == ["recovering", "running", "succeeded"]
    failed = fake_service.events(job_id, "attempt.failed")[0]
    assert failed["ranks"] == [1]
    assert failed["data"]["kind"] == "process_died"
    assert_gap_free(fake_service, job_id)
    assert_nothing_left(fake_service, job_id, before + after)


def test_a_rank_that_hangs_in_its_own_code_is_named_before_anything_is_killed(
    submit: Submit, fake_service: FakeService
) -> None:
    body = spec(steps=40, step_s="0.05", fail_rank="1", fail_step="30", fail_kind="block")
    body["restart"] = {**body["restart"], "hang_timeout_s": 10}
    job_id = submit(body)
    fake_service.wait("steps", lambda: len(fake_service.steps(job_id, 1)) > 5)
    before = rank_pids(fake_service, job_id)
    # Asked while it is healthy; training goes on.
    fake_service.want(job_id, desired="run", diagnosis_requests=1)
    (asked,) = fake_service.wait(
        "the answer", lambda: fake_service.stored(job_id, kind="diagnosis")
    )
    assert asked["data"]["trigger"] == "request"
    assert asked["data"]["culprits"] == []
    assert [row["answered"] for row in asked["data"]["ranks"]] == [True, True]
    fake_service.wait("the hang", lambda: len(fake_service.steps(job_id, 1)) >= 29)
    stopped = time.monotonic()
    fake_service.wait(
        "its diagnosis", lambda: len(fake_service.stored(job_id, kind="diagnosis")) == 2, 30
    )
    assert time.monotonic() - stopped < 20, "within 10 s of its limit"
    report = fake_service.stored(job_id, kind="diagnosis")[1]["data"]
    assert [culprit["pid"] for culprit in report["culprits"]] == [before[1]]
    assert report["confidence"] == "high"
    assert "rank 1 has not entered all_reduce 30 of default_pg" in report["reason"]
    assert "read_block (support/fake_job.py" in report["reason"]
    failed = fake_service.wait(
        "the failure", lambda: fake_service.events(job_id, "attempt.failed")
    )[0]
    assert failed["ranks"] == [1]
    assert failed["data"]["kind"] == "hang"
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    after = rank_pids(fake_service, job_id)
    assert_gap_free(fake_service, job_id)
    assert_nothing_left(fake_service, job_id, before + after)


def test_killed_driver_adopts_the_same_processes(
    submit: Submit, fake_service: FakeService
) -> None:

    job_id = submit(spec(steps=80, ranks=1, step_s="0.05"))
    fake_service.wait("a commit", lambda: fake_service.stored(job_id, kind="checkpoint"))
    before = rank_pids(fake_service, job_id)
    os.kill(driver_pid(job_id), signal.SIGKILL)
    fake_service.wait("adoption", lambda: submit.adopted(job_id))
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    assert fake_service.events(job_id, "driver.adopted")[0]["data"]["pids"] == before
    assert fake_service.steps(job_id, 1) == list(range(1, 81))
    assert fake_service.steps(job_id, 2) == []
    assert fake_service.epochs[job_id] == 2
    assert_gap_free(fake_service, job_id)
    assert sorted({step for _, step in committed(fake_service, job_id)}) == list(
        range(5, 81, 5)
    )
    assert_nothing_left(fake_service, job_id, before)


def test_service_away_loses_nothing(submit: Submit, fake_service: FakeService) -> None:
    job_id = submit(spec(steps=60, ranks=1, step_s="0.03"))
    fake_service.wait("steps", lambda: len(fake_service.steps(job_id, 1)) > 5)
    fake_service.down()
    seen = len(fake_service.steps(job_id, 1))
    time.sleep(3)
    assert len(fake_service.steps(job_id, 1)) <= seen + 1
    fake_service.up()  # on another port, which the agent passes on
    submit_url(submit, fake_service)
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    assert fake_service.steps(job_id, 1) == list(range(1, 61))
    assert_gap_free(fake_service, job_id)
    assert_nothing_left(fake_service, job_id, rank_pids(fake_service, job_id))


def submit_url(submit: Submit, service: FakeService) -> None:
    from tests.support.fake_job import FakeDriver
    from workers.agent.driver_registry import DriverRegistry
    from workers.protocol.wire import DesiredReply

    registry = DriverRegistry(service.url, NAMESPACE, FakeDriver)
    registry.set_desired(
        DesiredReply.model_validate({"revision": 1, "jobs": list(service.jobs.values())})
    )
    registry.reconcile()


@pytest.mark.parametrize(
    "final_checkpoint", [True, pytest.param(False, marks=pytest.mark.chaos)]
)
def test_cancel_leaves_nothing(
    submit: Submit, fake_service: FakeService, final_checkpoint: bool
) -> None:
    job_id = submit(spec(steps=2000, ranks=1, step_s="0.05"))
    fake_service.wait("steps", lambda: len(fake_service.steps(job_id, 1)) > 2)
    pids = rank_pids(fake_service, job_id)
    commits = len(fake_service.stored(job_id, kind="checkpoint"))
    fake_service.want(job_id, desired="cancel", final_checkpoint=final_checkpoint)
    asked = time.monotonic()
    fake_service.wait("cancelled", lambda: "cancelled" in fake_service.states(job_id), 10)
    assert time.monotonic() - asked < 8
    assert_nothing_left(fake_service, job_id, pids)
    last = fake_service.steps(job_id, 1)[-1]
    records = fake_service.stored(job_id, kind="checkpoint")[commits:]
    assert any(r["data"]["step"] == last for r in records) == (
        final_checkpoint or last % 5 == 0
    )


def test_cancel_while_waiting_for_room(submit: Submit, fake_service: FakeService) -> None:
    body = spec()
    body["resources"] = {
        "accelerator": "cpu",
        "cpus_per_rank": 64,
        "placement_timeout_s": 60,
    }
    job_id = submit(body)
    fake_service.wait(
        "an explanation", lambda: fake_service.events(job_id, "placement.waiting")
    )
    assert "128 CPU" in fake_service.events(job_id, "placement.waiting")[0]["message"]
    fake_service.want(job_id, desired="cancel")
    fake_service.wait("cancelled", lambda: "cancelled" in fake_service.states(job_id), 10)
    assert_nothing_left(fake_service, job_id, [])


def test_the_wait_for_a_placement_group_takes_its_time(ray_cluster: str) -> None:
    """Also for a part of a second: Ray's own wait would return at once."""
    from workers.decisions.placement import plan_placement
    from workers.ray.nodes import read_nodes
    from workers.ray.worker_group import WorkerGroup

    body = spec()
    body["resources"] = {"accelerator": "cpu", "cpus_per_rank": 64}
    group = WorkerGroup("job-wait", NAMESPACE, object)
    pending = group.placement_group(
        plan_placement(JobSpec.from_mapping(body), read_nodes())
    )
    began = time.monotonic()
    assert not pending.wait(0.3)
    assert not pending.wait(0.3)
    assert time.monotonic() - began >= 0.6
    group.remove_placement_group()


def test_no_room_in_time_goes_back_to_the_queue(
    submit: Submit, fake_service: FakeService
) -> None:
    body = spec()
    body["resources"] = {
        "accelerator": "cpu",
        "cpus_per_rank": 64,
        "placement_timeout_s": 1,
    }
    job_id = submit(body)
    fake_service.wait("queued", lambda: "queued" in fake_service.states(job_id))
    state = fake_service.stored(job_id, kind="state")[-1]["data"]
    assert state["reason"] == "waiting_gang"
    assert "not placed within 1 s: asked for 1 x 128 CPU" in state["message"]
    fake_service.want(job_id, desired="run")
    fake_service.wait(
        "a second try", lambda: fake_service.states(job_id).count("scheduling") == 2
    )


def test_failing_rank_is_the_cause_and_its_log_is_there(
    submit: Submit, fake_service: FakeService, tmp_path: Path
) -> None:
    body = spec(fail_rank="1", fail_step="3", fail_attempts="9")
    body["restart"] = {"max_failures": 0}
    job_id = submit(body)
    fake_service.wait("failure", lambda: "failed" in fake_service.states(job_id))
    state = fake_service.stored(job_id, kind="state")[-1]["data"]
    assert state["message"].startswith("rank 1: LookupError: planned accident at step 3")
    failed = fake_service.events(job_id, "attempt.failed")[0]
    assert "planned accident" in failed["data"]["traceback"]
    log = tmp_path / job_id / "logs" / "attempt-0001" / "rank-00001.log"
    assert "LookupError: planned accident at step 3" in log.read_text()
    assert_nothing_left(fake_service, job_id, rank_pids(fake_service, job_id))


def test_native_crash_leaves_its_log_and_is_tried_again(
    submit: Submit, fake_service: FakeService
) -> None:
    job_id = submit(spec(ranks=1, fail_rank="0", fail_step="8", fail_kind="exit"))
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    assert fake_service.steps(job_id, 1) == list(range(1, 8)), (
        "steps that only the dead rank's file had are there too"
    )
    assert fake_service.steps(job_id, 2) == list(range(6, 21))
    assert_gap_free(fake_service, job_id)


@pytest.mark.chaos
def test_crash_loop_ends_with_no_progress(
    submit: Submit, fake_service: FakeService
) -> None:
    body = spec(ranks=1, fail_rank="0", fail_step="3", fail_attempts="9", fail_kind="exit")
    body["restart"] = {"max_failures": 10, "backoff_s": 0.1}
    job_id = submit(body)
    fake_service.wait("failure", lambda: "failed" in fake_service.states(job_id))
    assert fake_service.stored(job_id, kind="state")[-1]["data"]["reason"] == "no_progress"
    assert len(fake_service.events(job_id, "attempt.failed")) == 3


def test_missing_data_is_the_users_problem(
    submit: Submit, fake_service: FakeService
) -> None:
    body = spec()
    body["data"] = {
        **body["data"],
        "tokenizer": {"kind": "file", "path": "/nowhere/tokenizer.json"},
    }
    job_id = submit(body, start=False)
    problems = fake_service.wait(
        "a problem", lambda: fake_service.stored(job_id, kind="problem")
    )
    assert problems[0]["data"]["problems"][0]["pointer"] == "/data/tokenizer/path"
    fake_service.wait("the driver's end", lambda: actors(job_id) == [], 15)
    assert "failed" not in fake_service.states(job_id)


@pytest.mark.chaos
def test_a_frozen_rank_is_given_up(submit: Submit, fake_service: FakeService) -> None:
    """Neither its process nor its node is gone, so only its silence (15 s) shows it."""
    job_id = submit(spec(steps=40, step_s="0.05"))
    fake_service.wait("a commit", lambda: fake_service.stored(job_id, kind="checkpoint"))
    before = rank_pids(fake_service, job_id)
    os.kill(before[1], signal.SIGSTOP)
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id), 90)
    failed = fake_service.events(job_id, "attempt.failed")[0]
    assert (failed["ranks"], failed["data"]["kind"]) == ([1], "silent")
    assert "has not answered for 15 s" in failed["message"]
    assert fake_service.steps(job_id, 2)[-1] == 40
    assert_nothing_left(fake_service, job_id, before)


def test_one_stands_by_and_takes_a_dead_ranks_place(
    submit: Submit, fake_service: FakeService
) -> None:
    import ray

    job_id = submit(spec(steps=100_000, step_s="0.02"))
    fake_service.wait("a spare", lambda: f"{job_id}/w2" in actors(job_id), 40)
    # Its name is there before the process has imported everything.
    spare: Any = ray.get_actor(f"{job_id}/w2")
    ray.get(spare.__ray_ready__.remote(), timeout=40)
    before = rank_pids(fake_service, job_id)
    os.kill(before[1], signal.SIGKILL)
    started = fake_service.wait(
        "a second attempt", lambda: fake_service.events(job_id, "ranks.started")[1:]
    )[0]
    assert started["data"]["promoted"] == [1]
    assert "; rank 1 runs in a spare process (pid " in started["message"]
    fake_service.wait("its steps", lambda: fake_service.steps(job_id, 2))
    after = rank_pids(fake_service, job_id)
    assert after[0] == before[0]
    assert after[1] != before[1]
    os.kill(driver_pid(job_id), signal.SIGKILL)
    fake_service.wait("adoption", lambda: submit.adopted(job_id))
    assert rank_pids(fake_service, job_id) == after
    fake_service.wait("another spare", lambda: f"{job_id}/w1" in actors(job_id), 40)
    fake_service.want(job_id, desired="cancel", final_checkpoint=False)
    fake_service.wait("cancelled", lambda: "cancelled" in fake_service.states(job_id), 20)
    assert_nothing_left(fake_service, job_id, after)


def test_a_wish_for_a_checkpoint_is_granted_once(
    submit: Submit, fake_service: FakeService
) -> None:

    body = spec(steps=2000, ranks=1, step_s="0.02")
    body["checkpoint"] = {"every_steps": 1000, "keep_last": 2}
    job_id = submit(body)
    fake_service.wait("steps", lambda: fake_service.steps(job_id, 1))
    fake_service.want(job_id, checkpoint_requests=1)
    fake_service.wait("the checkpoint", lambda: committed(fake_service, job_id))
    os.kill(driver_pid(job_id), signal.SIGKILL)
    fake_service.wait("adoption", lambda: submit.adopted(job_id))
    fake_service.want(job_id, checkpoint_requests=2)
    fake_service.wait("the second", lambda: len(committed(fake_service, job_id)) > 1)
    fake_service.want(job_id, desired="cancel", final_checkpoint=False)
    fake_service.wait("cancelled", lambda: "cancelled" in fake_service.states(job_id), 10)
    assert len(committed(fake_service, job_id)) == 2


def test_no_node_is_clean_while_a_worker_is_still_starting(ray_cluster: str) -> None:

    from tests.support.fake_job import LateWorker
    from workers.decisions.placement import plan_placement
    from workers.decisions.slot_assignment import assign_slots
    from workers.rank.messages import Fence
    from workers.ray.nodes import job_folder, read_nodes
    from workers.ray.worker_group import WorkerGroup

    group = WorkerGroup("job-late", NAMESPACE, LateWorker)
    fence = Fence(1, 1)
    (node,) = read_nodes()
    folder = job_folder(node.node_id, "job-late")
    plan = plan_placement(JobSpec.from_mapping(spec()), [node], "cpu")
    assert group.placement_group(plan).wait(30)
    try:
        group.create(
            plan, assign_slots(plan, (), (), (), group.nodes(plan)).workers_to_start, 1
        )
        group.probe([0], fence, 60, lambda: None)
        assert folder.exists()
        assert group.retire(fence, 2, 0.5) == ()
        # It may take longer than that to, on a busy machine.
        until("the first one to remove what there was", lambda: not folder.exists(), 10)
        group.probe([1], fence, 60, lambda: None)
        assert group.retire(fence, 2, 5.0) == (node.node_id,)
        assert not folder.exists()
    finally:
        group.remove_all(2)


def num_living_nodes() -> int:
    from workers.ray.nodes import read_nodes

    return len([node for node in read_nodes() if node.alive])


@pytest.mark.chaos
def test_sigterm_to_a_node_saves_and_moves_the_job(
    submit: Submit, fake_service: FakeService, ray_cluster: str
) -> None:
    """As when a pod is deleted: Ray drains its node, and the job leaves in time."""
    from tests.support.joined_node import DRAIN_S, joined_node

    body = spec(steps=2000)
    # Only the joined nodes have room for both ranks.
    body["resources"]["cpus_per_rank"] = 4
    body["resources"]["placement_timeout_s"] = 60
    body["checkpoint"] = {"every_steps": 1000}
    with (
        joined_node(ray_cluster, 8, {}) as first,
        joined_node(ray_cluster, 8, {}) as second,
    ):
        fake_service.wait("three nodes", lambda: num_living_nodes() == 3, 120)
        job_id = submit(body)
        fake_service.wait("steps", lambda: len(fake_service.steps(job_id, 1)) > 5)
        pids = rank_pids(fake_service, job_id)
        victim, other = first, second
        if second.has(pids[0]):
            victim, other = second, first
        victim.terminate()
        fake_service.wait(
            "a checkpoint within the grace",
            lambda: committed(fake_service, job_id),
            DRAIN_S,
        )
        fake_service.wait("the next attempt", lambda: fake_service.steps(job_id, 2))
        ((_, saved),) = committed(fake_service, job_id)
        # No step is done twice, and none is left out.
        assert fake_service.steps(job_id, 1)[-1] == saved
        assert fake_service.steps(job_id, 2)[0] == saved + 1
        assert all(other.has(pid) for pid in rank_pids(fake_service, job_id))
        (event,) = fake_service.events(job_id, "node.draining")
        assert event["ranks"] == [0, 1]
        (decision,) = fake_service.events(job_id, "policy.decision")
        assert decision["data"]["reason"] == "preempted"
        assert decision["data"]["failures"] == 0
        fake_service.want(job_id, desired="cancel")
        submit.reconcile()
        fake_service.wait("the end", lambda: "cancelled" in fake_service.states(job_id))
        # Nothing of the job keeps the node: Ray leaves it before the grace is over.
        victim.await_end(DRAIN_S)

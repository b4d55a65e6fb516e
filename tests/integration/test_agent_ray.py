"""The agent as its own process between a stand-in service and a real cluster."""

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_service import AGENT_TOKEN, NAMESPACE, FakeService

pytestmark = pytest.mark.ray


def start_agent(
    service: FakeService, address: str, folder: Path, *extra: str
) -> "subprocess.Popen[bytes]":
    token = folder / "token"
    token.write_text(AGENT_TOKEN)
    command = [
        sys.executable,
        "-m",
        "workers.agent",
        "--service",
        service.url,
        "--address",
        address,
        "--token-file",
        str(token),
    ]
    with open(folder / "agent.log", "ab") as log:
        return subprocess.Popen([*command, *extra], stdout=log, stderr=log, cwd=folder)


@pytest.fixture
def agent(
    ray_cluster: str, fake_service: FakeService, tmp_path: Path
) -> "Iterator[subprocess.Popen[bytes]]":
    process = start_agent(fake_service, ray_cluster, tmp_path, "--storage", str(tmp_path))
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def placement_groups() -> set[str]:
    """Returns the names of the placement groups that still exist."""
    import ray

    rows = ray.util.placement_group_table().values()
    return {row["name"] for row in rows if row["state"] != "REMOVED"}


def job_message(folder: Path, job_id: str, data: Path, steps: int = 6) -> dict[str, Any]:
    return {
        "spec": {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"tp": 1, "dp": 1},
            "data": {"train": [{"path": str(data)}], "tokenizer": {"kind": "bytes"}},
            "training": {"seq_length": 32, "global_batch_size": 1, "steps": steps},
            "optimizer": {"lr": 0.001},
            "checkpoint": {"every_steps": 3},
            "resources": {"accelerator": "cpu"},
            "storage": {"path": str(folder / job_id)},
        },
        "job_dir": str(folder / job_id),
    }


def corpus(folder: Path) -> Path:
    path = folder / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    return path


def test_a_real_job_through_the_agent(
    agent: "subprocess.Popen[bytes]", fake_service: FakeService, tmp_path: Path
) -> None:
    """Real library, real agent: from the desired state to a committed checkpoint, and
    out on SIGTERM.
    """
    import ray

    report = fake_service.wait(
        "a report", lambda: fake_service.reports and fake_service.reports[-1]
    )
    assert report["namespace"] == NAMESPACE
    assert report["nodes"][0]["cpus"] == 4
    fake_service.wait(
        "the storage check",
        lambda: fake_service.reports[-1]["nodes"][0]["storage_ok"] is True,
    )
    job_id = f"job-{uuid.uuid4().hex[:12]}"
    message = job_message(tmp_path, job_id, corpus(tmp_path))
    fake_service.want(job_id, desired="prepare", **message)
    fake_service.wait("prepared data", lambda: fake_service.stored(job_id, kind="prepared"))
    fake_service.wait(
        "the driver in a report",
        lambda: [row for row in fake_service.reports[-1]["drivers"] if row["alive"]],
    )
    fake_service.want(job_id, desired="run")
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    assert fake_service.steps(job_id, 1) == [1, 2, 3, 4, 5, 6]
    assert (
        tmp_path / job_id / "checkpoints" / "step-00000006-a0001" / "COMMITTED"
    ).exists()
    fake_service.wait("the actors' end", lambda: not ray.util.list_named_actors(), 15)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(10) == 0
    assert AGENT_TOKEN not in (tmp_path / "agent.log").read_text()


def test_checks_orphans_and_reaping(
    agent: "subprocess.Popen[bytes]",
    fake_service: FakeService,
    ends_actors: None,
    tmp_path: Path,
) -> None:
    import ray

    body = job_message(tmp_path, "job-check", tmp_path / "nowhere.txt")
    with fake_service.changed:
        fake_service.checks.append(
            {
                "check_id": "check-1",
                "spec": body["spec"],
                "storage_path": str(tmp_path / "jobs"),
            }
        )
        fake_service.revision += 1
    results = fake_service.wait("a result", lambda: fake_service.check_results)
    (problem,) = results[0]["problems"]
    assert problem["pointer"] == "/data/train/0/path"
    assert "nowhere.txt" in problem["detail"]

    class Left:
        def ping(self) -> None:
            pass

    left: Any = ray.remote(num_cpus=0)(Left)
    ended = f"job-{uuid.uuid4().hex[:12]}"
    unknown = f"job-{uuid.uuid4().hex[:12]}"
    actors = []
    for job_id in (ended, unknown):
        actor = left.options(name=f"{job_id}/w0", lifetime="detached").remote()
        ray.get(actor.ping.remote())
        actors.append(actor)
    group = ray.util.placement_group([{"CPU": 1}], name=ended, lifetime="detached")
    assert group.wait(10)
    fake_service.terminal.add(ended)
    body["job_dir"] = str(tmp_path / "other")
    fake_service.want("job-other", **body, desired="prepare")
    fake_service.wait(
        "the reaper", lambda: f"{ended}/w0" not in ray.util.list_named_actors(), 40
    )
    assert f"{unknown}/w0" in ray.util.list_named_actors(), (
        "what the service never named is only reported"
    )
    assert f"{unknown}/w0" in fake_service.wait(
        "orphans", lambda: fake_service.reports[-1]["orphans"]
    )
    fake_service.wait(
        "the placement group's end", lambda: ended not in placement_groups(), 15
    )


def test_an_agent_outlives_the_service_being_away(
    agent: "subprocess.Popen[bytes]", fake_service: FakeService
) -> None:
    fake_service.wait("a report", lambda: fake_service.reports)
    port = int(fake_service.url.rpartition(":")[2])
    fake_service.down()
    with pytest.raises(subprocess.TimeoutExpired):
        agent.wait(4)
    before = len(fake_service.reports)
    fake_service.up(port)
    fake_service.wait("a report after", lambda: len(fake_service.reports) > before, 20)


@pytest.mark.parametrize(("end", "code"), [("succeeded", 0), ("failed", 1)])
def test_an_agent_of_one_job_ends_with_it(
    ray_cluster: str, fake_service: FakeService, tmp_path: Path, end: str, code: int
) -> None:
    options = ("--storage", str(tmp_path), "--until-idle")
    fake_service.job_states = {"job-old": "failed", "job-own": "running"}
    fake_service.revision += 1
    with start_agent(fake_service, ray_cluster, tmp_path, *options) as process:
        try:
            # Its first report is that of a complete cluster.
            reports = fake_service.wait("a report", lambda: fake_service.reports)
            assert [node["storage_ok"] for node in reports[0]["nodes"]] == [True]
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3)
            with fake_service.changed:
                fake_service.job_states = {"job-old": "failed", "job-own": end}
                fake_service.revision += 1
                fake_service.changed.notify_all()
            assert process.wait(20) == code
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "cannot reach Ray at 127.0.0.1:1: "),
        ("nonsense", "cannot reach Ray at nonsense: --address must be host:port"),
    ],
)
def test_an_agent_without_ray_exits_with_3(
    fake_service: FakeService, tmp_path: Path, address: str, message: str
) -> None:
    with start_agent(fake_service, address, tmp_path) as process:
        assert process.wait(60) == 3
    log = (tmp_path / "agent.log").read_text()
    assert message in log
    assert "Traceback" not in log


def run_agent(service_url: str, token: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "workers.agent"]
    options = ["--service", service_url, "--address", "127.0.0.1:1"]
    return subprocess.run(
        [*command, *options, "--token-file", str(token)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_agent_without_a_token_does_not_start(
    fake_service: FakeService, tmp_path: Path
) -> None:
    done = run_agent(fake_service.url, tmp_path / "none")
    assert done.returncode == 2
    assert "cannot read the agent's token file" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_agent_with_a_wrong_token_does_not_start(
    fake_service: FakeService, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("wrong")
    done = run_agent(fake_service.url, token)
    assert done.returncode == 2
    assert "the service refused (401" in done.stderr
    assert "Traceback" not in done.stderr

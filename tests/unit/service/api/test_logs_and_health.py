"""Logs read back, health, cluster, Prometheus and OpenAPI."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from service.jobs.logs import log_path
from service.settings import Settings
from service.store.schema import JobRow
from workers.driver.logs import log_name


def log_file(service: Any, job_id: str, attempt: int = 1, rank: int = 0) -> Path:
    path = (
        Path(service.job(job_id)["storage_path"])
        / f"logs/attempt-{attempt:04d}/rank-{rank:05d}.log"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read(service: Any, job_id: str, **params: Any) -> dict[str, Any]:
    response = service.user.get(f"/v1/jobs/{job_id}/logs", params=params)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_pieces_make_up_the_whole_and_characters_stay_whole(service: Any) -> None:
    job_id, _ = service.running_job()
    text = "grüße, 世界 🎉\n" * 50
    log_file(service, job_id).write_text(text)
    offset = 0
    pieces = []
    while True:
        answer = read(service, job_id, offset=offset, limit=7)
        if not answer["data"]:
            break
        pieces.append(answer["data"])
        offset = answer["next_offset"]
    assert "".join(pieces) == text
    assert offset == len(text.encode()) == answer["size"]
    assert read(service, job_id, offset=10**9)["data"] == ""


def test_bytes_that_are_no_text_do_not_stop_the_reader(service: Any) -> None:
    job_id, _ = service.running_job()
    raw = b"\x80\x81\x82\x83\xff" * 20 + b"end"
    log_file(service, job_id).write_bytes(raw)
    offset = 0
    while (answer := read(service, job_id, offset=offset, limit=4))["data"]:
        assert answer["next_offset"] > offset
        offset = answer["next_offset"]
    assert offset == len(raw)


def test_log_of_a_rank_that_has_not_written_is_empty(service: Any) -> None:
    job_id, _ = service.running_job()
    assert read(service, job_id, rank=3) == {
        **{
            "object": "log",
            "rank": 3,
            "attempt": 1,
            "offset": 0,
            "next_offset": 0,
            "size": 0,
            "data": "",
        },
    }


def test_unknown_ranks_and_attempts_are_named(service: Any) -> None:
    job_id, _ = service.running_job()
    for params, words in (
        ({"rank": 4}, "no rank 4; attempt 1 has ranks 0 to 3"),
        ({"attempt": 2}, "no attempt 2; the job has 1 attempt; leave attempt out"),
    ):
        response = service.user.get(f"/v1/jobs/{job_id}/logs", params=params)
        assert response.status_code == 404
        assert words in response.json()["detail"]


def test_a_link_out_of_the_job_is_not_followed(service: Any, tmp_path: Path) -> None:
    job_id, _ = service.running_job()
    (tmp_path / "secret").write_text("secret")
    log_file(service, job_id).symlink_to(tmp_path / "secret")
    response = service.user.get(f"/v1/jobs/{job_id}/logs")
    assert response.status_code == 404
    assert "link out of the job's storage" in response.json()["detail"]
    assert "secret" not in response.text


def test_storage_the_service_cannot_reach_is_said_plainly(
    service: Any,
) -> None:
    job_id, _ = service.running_job()
    # As a version may have stored it that took every URI.
    with service.app.state.context.store.write() as session:
        uri = "nosuch://KEY:secret@bucket/x?secret"
        session.execute(sa.update(JobRow).values(job_dir=uri))
    response = service.user.get(f"/v1/jobs/{job_id}/logs")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert "nosuch://" in response.json()["detail"]
    assert "secret" not in response.text


class SilentStorage:
    """An endpoint that accepts connections and never answers."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def silent_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentStorage]:
    storage = SilentStorage()
    # As an operator names the endpoint; pyarrow reads it.
    monkeypatch.setenv("AWS_ENDPOINT_URL", storage.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield storage
    storage.close()


def test_a_storage_that_never_answers_stops_only_its_own_readers(
    settings: Settings, start: Any, spec: dict[str, Any], silent_storage: SilentStorage
) -> None:
    service = start(settings.model_copy(update={"storage_timeout_s": 1.0}))
    silent, _ = service.running_job(spec | {"storage": {"path": "s3://silent/x"}})
    local, _ = service.running_job()
    log_file(service, local).write_text("local")
    answers: list[httpx.Response] = []

    def read() -> None:
        answers.append(service.user.get(f"/v1/jobs/{silent}/logs"))

    readers = [threading.Thread(target=read) for _ in range(45)]
    for reader in readers:
        reader.start()
    time.sleep(0.3)
    seconds = []
    for _ in range(10):
        started = time.monotonic()
        assert service.user.get("/v1/jobs", params={"limit": 1}).status_code == 200
        seconds.append(time.monotonic() - started)
    # Other work of the machine may delay any one of them.
    assert min(seconds) < 0.1
    assert service.user.get(f"/v1/jobs/{local}/logs").json()["data"] == "local"
    for reader in readers:
        reader.join(20)
    assert [answer.status_code for answer in answers] == [503] * 45
    assert {answer.headers["retry-after"] for answer in answers} == {"5"}
    ready = service.user.get("/readyz").json()
    assert (ready["status"], ready["storage"]) == ("degraded", "does not answer")
    silent_storage.close()


def test_workers_and_service_agree_where_logs_lie() -> None:
    assert log_path(12, 345) == log_name(12, 345) == "logs/attempt-0012/rank-00345.log"


def test_ready_tells_database_agent_and_ray(service: Any, make_node: Any) -> None:
    nobody = service.client(None)
    assert nobody.get("/healthz").json() == {"status": "ok"}
    before = nobody.get("/readyz").json()
    assert (before["status"], before["database"]) == ("degraded", "ok")
    assert before["agents"] == [
        {
            "cluster": "default",
            "live": False,
            "seen_s_ago": None,
            "ray_reachable": False,
            "nodes": 0,
        }
    ]
    service.agent.report()
    assert nobody.get("/readyz").json()["status"] == "degraded", (
        "an agent without nodes has no Ray"
    )
    service.agent.report(make_node())
    after = nobody.get("/readyz").json()
    assert after["status"] == "ok"
    assert after["agents"][0]["nodes"] == 1
    assert after["agents"][0]["seen_s_ago"] < 5


def test_a_silent_agent_counts_as_gone(start: Any, settings: Any, make_node: Any) -> None:
    service = start(settings.model_copy(update={"agent_lost_s": 0.01}))
    service.agent.report(make_node())
    assert service.client(None).get("/readyz").json()["agents"][0]["live"] is False
    assert service.submit()["status_reason"] == "waiting_agent"


def test_a_rank_of_a_running_job_has_a_link_to_its_log_in_rays_dashboard(
    service: Any, make_node: Any
) -> None:
    job_id, driver = service.running_job()
    driver.send(("ranks", {"ranks": [{"rank": 3, "node_id": "n1"}]}), attempt=1)
    path = f"/v1/jobs/{job_id}/ranks"
    assert "log_url" not in service.user.get(path).json()["data"][0], "no dashboard"
    service.agent.report(make_node(), dashboard_url="http://d:8265")
    assert service.user.get(path).json()["data"][0]["log_url"] == (
        "http://d:8265/#/logs/viewer?nodeId=n1&fileName=megatron-ray%2F"
        f"{job_id}%2Fattempt-0001%2Frank-00003.log"
    )
    driver.states("failed", attempt=1)
    assert "log_url" not in service.user.get(path).json()["data"][0], "files are deleted"


def test_cluster_shows_the_last_report(service: Any, make_node: Any) -> None:
    assert service.user.get("/v1/cluster").json()["data"][0]["nodes"] == []
    service.agent.report(
        make_node(gpus=2, labels={"rack": "r1"}),
        orphans=["job-x/w0"],
        dashboard_url="http://d",
    )
    cluster = service.user.get("/v1/cluster").json()["data"][0]
    assert cluster["live"]
    assert cluster["nodes"][0]["labels"] == {"rack": "r1"}
    assert cluster["orphans"] == ["job-x/w0"]
    assert cluster["agent_id"] == "agent-1"
    assert cluster["dashboard_url"] == "http://d"
    assert cluster["reported_at"]


def test_prometheus_text_has_bounded_labels(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 3)
    for path in ("/v1/a", "/v1/b", "/v1/jobs/x", "/v1/jobs/y"):
        service.user.get(path)
    text = service.user.get("/metrics").text
    assert 'megatron_ray_jobs{state="running"} 1.0' in text
    assert 'megatron_ray_jobs{state="failed"} 0.0' in text
    assert f'megatron_ray_job_step{{job="{job_id}",name="tiny"}} 3.0' in text
    assert "megatron_ray_job_loss" in text
    assert "megatron_ray_records_received_total 8.0" in text
    assert "megatron_ray_jobs_created_total 1.0" in text
    assert 'route="/v1/jobs/{job_id}"' in text
    assert 'route="unknown"' in text
    assert '"/v1/a' not in text
    assert "/v1/jobs/x" not in text
    assert "agent_silence" in text


def test_openapi_describes_the_public_routes_only(service: Any) -> None:
    document = service.client(None).get("/openapi.json").json()
    paths = set(document["paths"])
    parts = (
        "",
        "/cancel",
        "/pause",
        "/resume",
        "/checkpoint",
        "/resize",
        "/diagnosis",
        "/profiles",
        "/events",
        "/metrics",
        "/logs",
        "/attempts",
        "/ranks",
        "/checkpoints",
        "/stream",
    )
    assert paths == {
        *(
            "/v1/jobs",
            "/v1/jobs:cancel",
            "/v1/plans",
            "/v1/plans/suggest",
            "/v1/cluster",
            "/v1/cluster/{name}/exclusions",
            "/v1/cluster/{name}/exclusions/{node}",
            "/healthz",
            "/readyz",
            "/metrics",
        ),
        *(f"/v1/jobs/{{job_id}}{part}" for part in parts),
    }
    assert "JobSpec" in document["components"]["schemas"]
    assert "internal" not in json.dumps(document["paths"])

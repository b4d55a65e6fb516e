"""No path of a spec reaches out of what the operator allows, on any road: it is refused
with its field, nothing is sent, and nothing secret comes back.
"""

import copy
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.settings import Settings
from service.store.schema import JobRow
from workers.agent.check_tasks import check_task
from workers.job_file import read_spec
from workers.rank.messages import UserError

Json = dict[str, Any]
SECRET = "wJalrXUtnFEMI/K7MDENG"
FIELDS: dict[str, Callable[[Json, str], Any]] = {
    "/storage/path": lambda spec, path: spec.update(storage={"path": path}),
    "/data/cache": lambda spec, path: spec["data"].update(cache=path),
    "/data/train/0/path": lambda spec, path: spec["data"].update(train=[{"path": path}]),
    "/data/validation/0/path": lambda spec, path: spec["data"].update(
        validation=[{"path": path}]
    ),
    "/data/tokenizer/path": lambda spec, path: spec["data"].update(
        tokenizer={"kind": "file", "path": path}
    ),
    "/checkpoint/start_from": lambda spec, path: spec.update(
        checkpoint={"start_from": path}
    ),
}
HOSTILE = {
    "traversal": "/allowed/../etc",
    "traversal in a URI": "file:///allowed/%2e%2e/etc",
    "scheme": "http://127.0.0.1:{port}/x",
    "user info": "s3://KEY:{secret}@bucket/x",
    "query": "s3://bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http&key={secret}",
    "both": "s3://KEY:{secret}@bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http",
    "loopback": "s3://127.0.0.1:{port}/x",
    "link-local": "s3://169.254.169.254/latest",
    "outside": "/etc/passwd",
}
ROUTES = ("/v1/jobs", "/v1/plans", "/v1/plans/suggest")


class Listener:
    """Counts the connections to a port of this machine."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.connections = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    started = Listener()
    yield started
    started.socket.shutdown(socket.SHUT_RDWR)
    started.socket.close()


@pytest.fixture
def service(
    settings: Settings, start: Any, make_node: Any, tmp_path: Path
) -> Iterator[Any]:
    """A service with prefixes, whose agent looks at paths as a cluster's does."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    changes = {
        "single_user": False,
        "data_prefixes": (str(allowed), "/allowed", "s3://bucket"),
        "storage_prefixes": (str(allowed), "/allowed", "s3://bucket"),
        "check_wait_s": 10.0,
    }
    running = start(settings.model_copy(update=changes))
    running.agent.report(make_node())
    stopping = threading.Event()
    answering = threading.Thread(target=answer_checks, args=(running.agent, stopping))
    answering.start()
    yield running
    stopping.set()
    answering.join()


def answer_checks(agent: Any, stopping: threading.Event) -> None:
    after = -1
    while not stopping.is_set():
        reply = agent.desired(after, 0.2)
        after = reply.revision
        for check in (*reply.checks, *reply.resume_checks):
            resumed = check.resumed and check.resumed.model_dump()
            checked = check_task(check.spec, check.storage_path, check.path_rules, resumed)
            body = {"check_id": check.check_id, **checked}
            agent.http.post("/internal/v1/agent/checks", json=body)


def hostile_specs(spec: Json, port: int) -> Iterator[tuple[str, str, Json]]:
    for pointer, change in FIELDS.items():
        for name, path in HOSTILE.items():
            hostile = copy.deepcopy(spec)
            change(hostile, path.format(port=port, secret=SECRET))
            yield pointer, name, hostile


@pytest.fixture
def output(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Everything that comes back; with the log, none of it contains the secret."""
    caplog.set_level("DEBUG")
    texts: list[str] = []
    yield texts
    for text in (*texts, caplog.text):
        assert SECRET not in text
        assert "KEY" not in text


def test_no_hostile_path_passes_a_resume(
    service: Any, spec: Json, listener: Listener, output: list[str]
) -> None:
    job_id = service.submit(spec | {"storage": {"path": "/allowed/job"}})["id"]
    service.user.post(f"/v1/jobs/{job_id}/cancel")
    for pointer, name, hostile in hostile_specs(spec, listener.port):
        section = pointer.split("/")[1]
        changes = {section: hostile[section], "checkpoint": {"resume_changes": ["data"]}}
        if section == "checkpoint":
            changes = {section: hostile[section]}
        response = service.user.post(f"/v1/jobs/{job_id}/resume", json={"changes": changes})
        output.append(response.text)
        assert response.status_code == 422, (pointer, name, response.text)
        # A tokenizer cannot change at all.
        place = pointer.removesuffix("/path")
        errors = response.json()["errors"]
        assert errors
        assert all(error["pointer"].startswith(place) for error in errors), response.text
    assert listener.connections == 0
    output.append(service.user.get(f"/v1/jobs/{job_id}/events").text)


def test_a_secret_that_an_earlier_version_stored_is_not_shown(
    service: Any, spec: Json, output: list[str]
) -> None:
    job_id, driver = service.running_job(spec | {"metadata": {"wiki": "http://w/x?page=1"}})
    uri = f"s3://KEY:{SECRET}@bucket/x?token={SECRET}"
    driver.send(
        ("checkpoint", {"step": 5, "path": uri}),
        ("event", {"type": "a.b", "message": f"see {uri}", "data": {"paths": [uri]}}),
        ("attempt", {"state": "failed", "message": uri}),
        attempt=1,
    )
    driver.states("failed", attempt=1, message=uri)
    with service.app.state.context.store.write() as session:
        job = session.scalars(sa.select(JobRow)).one()
        job.job_dir = uri
        for name in ("spec", "resolved_spec"):
            data = {**getattr(job, name)["data"], "train": [{"path": uri}]}
            setattr(job, name, {**getattr(job, name), "data": data})
    paths = ("", "/events", "/checkpoints", "/attempts", "/stream", "/logs")
    for path in paths:
        output.append(service.user.get(f"/v1/jobs/{job_id}{path}").text)
    output.append(service.user.get("/v1/jobs").text)
    shown = service.job(job_id)
    assert shown["storage_path"] == "s3://..."
    assert shown["resolved_spec"]["data"]["train"][0]["path"] == "s3://..."
    assert shown["spec"]["metadata"] == {"wiki": "http://w/x?page=1"}


def test_no_hostile_path_passes_a_route(
    service: Any, spec: Json, listener: Listener, output: list[str]
) -> None:
    for pointer, name, hostile in hostile_specs(spec, listener.port):
        for route in ROUTES:
            response = service.user.post(route, json=hostile)
            output.append(response.text)
            assert response.status_code == 422, (pointer, name, route)
            errors = response.json()["errors"]
            assert [error["pointer"] for error in errors] == [pointer], (name, route)
    assert listener.connections == 0
    assert service.user.get("/v1/jobs").json()["data"] == []


def test_links_are_refused_by_the_agent(service: Any, spec: Json, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret text")
    (tmp_path / "allowed" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "allowed" / "own").symlink_to(service.settings.data_dir)
    for pointer, change in FIELDS.items():
        for name in ("link.txt", "own/service.db"):
            linked = copy.deepcopy(spec)
            change(linked, str(tmp_path / "allowed" / name))
            response = service.user.post("/v1/jobs", json=linked)
            assert response.status_code == 422, (pointer, name)
            (error,) = response.json()["errors"]
            assert (error["pointer"], error["code"]) == (pointer, "not_allowed")
            plan = service.user.post("/v1/plans", json=linked).json()
            assert [problem["pointer"] for problem in plan["problems"]] == [pointer]


def test_links_inside_a_folder_are_refused_by_the_agent(
    service: Any, spec: Json, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret text")
    inside = tmp_path / "allowed" / "corpus" / "deep"
    inside.mkdir(parents=True)
    (inside / "a.txt").write_text("text " * 1000)
    # Within what is open a link is fine, and one that leads back to its own folder too.
    (inside / "b.txt").symlink_to(inside / "a.txt")
    (inside / "again").symlink_to(inside.parent)
    train = FIELDS["/data/train/0/path"]
    for name in ("corpus", "corpus/*/*.txt", "corpus/deep/"):
        train(spec, str(tmp_path / "allowed" / name))
        plan = service.user.post("/v1/plans", json=spec).json()
        assert plan["problems"] == []
    (inside / "c.txt").symlink_to(outside / "secret.txt")
    for name in ("corpus", "corpus/*/*.txt", "corpus/deep/"):
        train(spec, str(tmp_path / "allowed" / name))
        (problem,) = service.user.post("/v1/plans", json=spec).json()["problems"]
        assert problem["code"] == "not_allowed"
        assert "secret" not in problem["detail"]
    (tmp_path / "allowed" / "prepared.bin").symlink_to(outside / "secret.txt")
    train(spec, str(tmp_path / "allowed" / "prepared"))
    (problem,) = service.user.post("/v1/plans", json=spec).json()["problems"]
    assert problem["code"] == "not_allowed"


def test_values_of_a_wrong_type_are_not_repeated_either(
    service: Any, spec: Json, output: list[str]
) -> None:
    uri = f"s3://KEY:{SECRET}@bucket/x?{SECRET}"
    for change in (
        {"training": uri},
        {"storage": uri},
        {"storage": {"path": [uri]}},
        {"parallel": {"tp": uri}},
        {"cluster": uri},
        {"credentials": [uri]},
        {"image": uri},
        {uri: 1},
    ):
        response = service.user.post("/v1/jobs", json={**spec, **change})
        assert response.status_code == 422
        for error in response.json()["errors"]:
            output.append(error["detail"])
        output.append(response.json()["detail"].partition(": ")[2])


def test_a_deployment_opens_only_its_own_folder_by_default(
    settings: Settings, start: Any, spec: Json
) -> None:
    closed = start(settings.model_copy(update={"single_user": False}))
    for pointer, change in FIELDS.items():
        outside = copy.deepcopy(spec)
        change(outside, "/data/x")
        response = closed.user.post("/v1/plans", json=outside)
        assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
        change(outside, str(settings.jobs_dir / "job-other" / "data" / "x"))
        assert closed.user.post("/v1/plans", json=outside).status_code == 200


def test_torchrun_refuses_the_same_uris(
    spec: Json, listener: Listener, output: list[str], tmp_path: Path
) -> None:
    job = tmp_path / "job.json"
    for pointer, name, hostile in hostile_specs(spec, listener.port):
        # A plain path is the user's own affair on the user's own machine.
        if name in ("traversal", "outside"):
            continue
        job.write_text(json.dumps(hostile))
        with pytest.raises(UserError) as refused:
            read_spec(job, [], 1)
        output.append(str(refused.value))
        assert pointer in str(refused.value)
    assert listener.connections == 0

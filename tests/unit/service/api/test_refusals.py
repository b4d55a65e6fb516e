"""Every refusal: a problem document that names the field and the remedy, and never a
traceback.
"""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.http.errors import PROBLEM_TYPES
from tests.support.service_tokens import tokens_file

Json = dict[str, Any]


def assert_problem(response: httpx.Response, code: str) -> Json:
    body: Json = response.json()
    assert response.headers["content-type"] == "application/problem+json", response.text
    assert (body["code"], body["status"], body["title"]) == (
        code,
        response.status_code,
        PROBLEM_TYPES[code].title,
    ), body
    assert PROBLEM_TYPES[code].status == response.status_code
    assert body["type"] == f"urn:megatron-ray:problem:{code}"
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["instance"] == response.request.url.path
    assert body["detail"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    for error in body["errors"]:
        assert set(error) == {"pointer", "code", "detail"}
        assert error["detail"]
    return body


def change(spec: Json, path: str, value: Any) -> Json:
    node = spec
    *parents, leaf = path.strip("/").split("/")
    for key in parents:
        node = node.setdefault(key, {})
    node[leaf] = value
    return spec


FIELDS = [
    ("/parallell", {}, "/parallell", "unknown field 'parallell'; did you mean 'parallel'?"),
    (
        "/training/stepz",
        3,
        "/training/stepz",
        "unknown field 'stepz'; did you mean 'steps'?",
    ),
    (
        "/data/tokenizer/zzzz",
        3,
        "/data/tokenizer/zzzz",
        "known here: begin_of_document, end_of_document, kind, path, special_tokens_in_text",
    ),
    ("/training/steps", None, "/training/steps", "whole number, got null"),
    ("/training/steps", "many", "/training/steps", "whole number, got 'many'"),
    ("/training/steps", 0, "/training/steps", "must be at least 1, got 0"),
    (
        "/training/recompute",
        {"granularity": "selective", "modules": ["attn"]},
        "/training/recompute/modules/0",
        "'core_attention'",
    ),
    (
        "/training/recompute",
        {"granularity": "full", "method": "block"},
        "/training/recompute/num_layers",
        "granularity=full needs num_layers",
    ),
    (
        "/model",
        {"preset": "gpt-tiny", "hidden_dropout": 1.0},
        "/model/hidden_dropout",
        "must be less than 1, got 1.0",
    ),
    ("/parallel/dp", "lots", "/parallel/dp", "or must be 'auto', got 'lots'"),
    ("/parallel/dp", 0, "/parallel/dp", "must be at least 1, got 0"),
    ("/parallel/tp", 3, "/parallel/tp", "tp=3 does not divide model.num_attention_heads=4"),
    (
        "/parallel/pp",
        3,
        "/parallel/pp",
        "layers do not divide evenly into 3 stages; nearest: num_layers=",
    ),
    ("/training/global_batch_size", 7, "/training/global_batch_size", "make it one"),
    (
        "/model",
        {"preset": "gpt-tniy"},
        "/model/preset",
        "unknown preset 'gpt-tniy'; did you mean 'gpt-tiny'?",
    ),
    ("/model", {"preset": "x{9}"}, "/model/preset", "unknown preset 'x{9}'; known:"),
    ("/model", 7, "/model", "must be a JSON object, got 7"),
    (
        "/model",
        {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1024},
        "/model/num_attention_heads",
        "use fewer heads",
    ),
    (
        "/data/train",
        [{"path": ""}],
        "/data/train/0/path",
        "must have 1 or more characters, got ''",
    ),
    ("/data/train", [], "/data/train", "must have 1 or more items, got a list"),
    ("/data/train", [{"path": "a\0b"}], "/data/train/0/path", "NUL"),
    (
        "/data/tokenizer",
        {"kind": "file"},
        "/data/tokenizer",
        "data.tokenizer.path is needed for kind `file`",
    ),
    ("/optimizer/lr", "NaN", "/optimizer/lr", "finite"),
    (
        "/schedule",
        {"min_lr": 5.0},
        "/schedule/min_lr",
        "above optimizer.lr=0.001; lower it",
    ),
    ("/spec_version", 2, "/spec_version", "must be at most 1, got 2"),
    ("/name", "Not Good", "/name", "lower-case letters, digits and dashes, at most 63"),
    ("/metadata/a~1b", 7, "/metadata/a~01b", "must be a string, got 7"),
    (
        "/cluster",
        "mars",
        "/cluster",
        "cluster 'mars' is not configured here; known: default",
    ),
    (
        "/cluster",
        "defualt",
        "/cluster",
        "cluster 'defualt' is not configured here; did you mean 'default'?",
    ),
    ("/image", "evil", "/image", "image 'evil' is not configured here; known: default"),
    ("/credentials", ["root"], "/credentials/0", "none is configured; leave it out"),
    ("/storage", {"path": "runs/x"}, "/storage/path", "absolute path or a URI"),
    (
        "/checkpoint",
        {"start_from": "models/x"},
        "/checkpoint/start_from",
        "absolute path or a URI",
    ),
    ("/storage", {"path": "/a/../b"}, "/storage/path", "write the path without it"),
    (
        "/resources",
        {"accelerator": "gpu"},
        "/resources/accelerator",
        "no node of cluster 'default' has a GPU",
    ),
    (
        "/resources",
        {"cpus_per_rank": 64},
        "/resources/cpus_per_rank",
        "the largest node has 4 CPUs",
    ),
    (
        "/parallel",
        {"tp": 4, "dp": 2},
        "/parallel",
        "= 8 ranks, but there is room for 4; lower a degree or add nodes",
    ),
    (
        "/parallel",
        {"tp": 4, "dp": 2},
        "/parallel",
        "add nodes; dp=1 would fit",
    ),
    (
        "/resources",
        {"nodes": {"only": ["pool="]}},
        "/resources/nodes/only/0",
        "must be a node's address, or a label such as pool=h100, got 'pool='",
    ),
    (
        "/resources",
        {"custom": {"GPU": 1}},
        "/resources/custom/GPU",
        "is counted by Ray itself; use cpus_per_rank, accelerator or gpu_type for it",
    ),
    ("/resources", {"custom": {"rdma": 0}}, "/resources/custom/rdma", "at least 0.0001"),
    (
        "/resources",
        {"accelerator": "cpu", "gpu_type": "H100"},
        "/resources",
        "resources.gpu_type=H100 contradicts accelerator=cpu; remove one of them",
    ),
    ("/network", {"interface": "eth 0"}, "/network/interface", "must match the pattern"),
    ("/network", {"env": {"NCCL_ALGO": "x"}}, "/network/env", "unknown field"),
    (
        "/resources",
        {"cpus_per_rank": 3, "placement_timeout_s": 0},
        "/resources/placement_timeout_s",
        "must be greater than 0, got 0",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "pointer", "words"),
    FIELDS,
    ids=[f"{field[0]}-{i}" for i, field in enumerate(FIELDS)],
)
def test_wrong_fields_are_named_with_a_remedy(
    shared: Any, spec: Json, path: str, value: Any, pointer: str, words: str
) -> None:
    wrong = change(spec, path, value)
    for response in (
        shared.user.post("/v1/jobs", json=wrong),
        shared.user.post("/v1/plans", json=wrong),
    ):
        if (
            response.status_code == 200
        ):  # a plan shows why it would not fit, instead of being refused
            errors = response.json()["problems"]
            assert response.json()["fits"] is False
        else:
            errors = assert_problem(response, "spec_invalid")["errors"]
        assert any(
            error["pointer"] == pointer and words in error["detail"] for error in errors
        ), errors
    assert shared.user.get("/v1/jobs").json()["data"] == []


def test_everything_wrong_is_said_at_once(shared: Any, spec: Json) -> None:
    change(spec, "/training/steps", 0)
    change(spec, "/optimizer/lr", -1)
    del spec["training"]["seq_length"]
    body = assert_problem(shared.user.post("/v1/jobs", json=spec), "spec_invalid")
    assert {error["pointer"] for error in body["errors"]} == {
        "/training/steps",
        "/training/seq_length",
        "/optimizer/lr",
    }
    assert "seq_length is required; add it" in json.dumps(body)
    assert "(and 2 more)" in body["detail"]


def test_islands_must_fit_on_a_node(
    start: Any, settings: Any, spec: Json, make_node: Any
) -> None:
    service = start(settings)
    service.agent.report(make_node("n1", cpus=2), make_node("n2", cpus=2))
    body = assert_problem(
        service.user.post("/v1/jobs", json=change(spec, "/parallel/tp", 4)), "spec_invalid"
    )
    assert body["errors"][0]["pointer"] == "/parallel/tp"
    detail = "tp=4 needs 4 CPUs on one node, the largest has 2; tp=2 would fit"
    assert body["errors"][0]["detail"] == detail


CHOICES = [
    (
        {"nodes": {"exclude": ["pool=a", "10.0.0.2"]}},
        "/resources/nodes",
        "no node of cluster 'default' is left for the job (node 10.0.0.1: "
        "resources.nodes.exclude names it; node 10.0.0.2: resources.nodes.exclude names it); "
        "change resources.nodes or add nodes",
    ),
    (
        {"gpu_type": "H100"},
        "/resources/gpu_type",
        "no node of cluster 'default' is left for the job (node 10.0.0.1: it has A100, not "
        "H100; node 10.0.0.2: it has no GPU, not H100); change resources.gpu_type or add nodes",
    ),
    (
        {"custom": {"rdma": 3}},
        "/resources",
        "a rank needs 3 rdma on one node, the largest has 1",
    ),
]


@pytest.mark.parametrize(("resources", "pointer", "detail"), CHOICES)
def test_a_choice_that_leaves_no_node_says_why(
    start: Any,
    settings: Any,
    spec: Json,
    make_node: Any,
    resources: Json,
    pointer: str,
    detail: str,
) -> None:
    service = start(settings)
    first = make_node("n1", gpus=4) | {
        "address": "10.0.0.1",
        "accelerator_type": "A100",
        "labels": {"pool": "a"},
        "resources": {"rdma": 1},
    }
    service.agent.report(first, make_node("n2") | {"address": "10.0.0.2"})
    wrong = change(spec, "/resources", resources)
    body = assert_problem(service.user.post("/v1/jobs", json=wrong), "spec_invalid")
    assert body["errors"][0]["pointer"] == pointer
    assert body["errors"][0]["detail"] == detail
    plan = service.user.post("/v1/plans", json=wrong).json()
    assert (plan["fits"], plan["problems"][0]["detail"]) == (False, detail)


BODIES = [
    (b"{not json", 400, "json_invalid", "not valid JSON"),
    (b"", 422, "spec_invalid", "the request body is empty; send a job spec"),
    (b"[1]", 422, "spec_invalid", "the request body must be a JSON object, got a list"),
    (b'"text"', 422, "spec_invalid", "must be a JSON object, got 'text'"),
    (b"null", 422, "spec_invalid", "must be a JSON object, got null"),
    (b"[" * 100_000, 400, None, ""),
    (b'{"a": ' + b"9" * 10_000 + b"}", 422, "spec_invalid", ""),
    (b"\xff\xfe", 400, None, ""),
    (b" " * ((1 << 20) + 1), 413, "body_too_large", "limited to 1 MiB"),
]


@pytest.mark.parametrize(
    ("body", "status", "code", "words"), BODIES, ids=[str(case[0][:12]) for case in BODIES]
)
def test_bodies_that_are_no_spec(
    shared: Any, body: bytes, status: int, code: str | None, words: str
) -> None:
    response = shared.user.post(
        "/v1/jobs", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status, response.text
    problem = assert_problem(response, code or response.json()["code"])
    assert words in problem["detail"]


def test_body_of_unknown_length_is_cut_off(shared: Any) -> None:
    response = shared.user.post(
        "/v1/jobs",
        content=iter([b" " * 65536] * 40),
        headers={"Content-Type": "application/json"},
    )
    assert_problem(response, "body_too_large")


QUERIES = [
    ("GET", "/v1/jobs?limit=0", "/query/limit", "request_invalid"),
    ("GET", "/v1/jobs?limit=x", "/query/limit", "request_invalid"),
    ("GET", "/v1/jobs?limit=101", "/query/limit", "request_invalid"),
    ("GET", "/v1/jobs?after=job-nope", "/query/after", "request_invalid"),
    ("GET", "/v1/jobs?status=sleepy", "/query/status", "request_invalid"),
    ("GET", "/v1/jobs/{id}/events?after=x", "/query/after", "request_invalid"),
    ("GET", "/v1/jobs/{id}/metrics?keys=loss,mood", "/query/keys", "request_invalid"),
    ("GET", "/v1/jobs/{id}/metrics?max_points=1", "/query/max_points", "request_invalid"),
    ("GET", "/v1/jobs/{id}/logs?rank=-1", "/query/rank", "request_invalid"),
    (
        "GET",
        "/v1/jobs/{id}/logs?offset=99999999999999999999999",
        "/query/offset",
        "request_invalid",
    ),
    ("GET", "/v1/jobs/{id}/logs", None, "not_found"),
    ("GET", "/v1/jobs/{id}/ranks?attempt=3", None, "not_found"),
    ("GET", "/v1/jobs/job-nope", None, "not_found"),
    ("GET", "/v1/jobs/job-nope/stream", None, "not_found"),
    ("GET", "/v1/jobs/%00", None, "not_found"),
    ("POST", "/v1/jobs/job-nope/cancel", None, "not_found"),
    ("DELETE", "/v1/jobs/job-nope", None, "not_found"),
    ("DELETE", "/v1/jobs/{id}", None, "job_active"),
    ("POST", "/v1/jobs/{id}/checkpoint", None, "job_not_running"),
    ("GET", "/v1/nothing", None, "not_found"),
    ("GET", "/docs", None, "not_found"),
    ("PUT", "/v1/jobs", None, "method_not_allowed"),
    ("POST", "/v1/jobs/{id}/fork", None, "not_found"),
]


@pytest.mark.parametrize(
    ("method", "path", "pointer", "code"),
    QUERIES,
    ids=[f"{case[0]} {case[1]}" for case in QUERIES],
)
def test_addresses_and_parameters(
    with_job: tuple[Any, str], method: str, path: str, pointer: str | None, code: str
) -> None:
    service, job_id = with_job
    body = assert_problem(service.user.request(method, path.replace("{id}", job_id)), code)
    if pointer:
        assert body["errors"][0]["pointer"] == pointer


def test_bodies_of_other_routes(with_job: tuple[Any, str]) -> None:
    service, job_id = with_job
    body = assert_problem(
        service.user.post(f"/v1/jobs/{job_id}/cancel", json={"chekpoint": True}),
        "request_invalid",
    )
    assert body["errors"][0]["pointer"] == "/chekpoint"
    assert "leave it out" in body["detail"]
    assert (
        assert_problem(service.user.post("/v1/plans", json={}), "spec_invalid")["errors"][
            0
        ]["pointer"]
        == "/model"
    )


def test_keys_with_another_body_are_refused(with_job: tuple[Any, str], spec: Json) -> None:
    service, _ = with_job
    headers = {"Idempotency-Key": "same"}
    assert service.user.post("/v1/jobs", json=spec, headers=headers).status_code == 201
    body = assert_problem(
        service.user.post("/v1/jobs", json=spec | {"name": "other"}, headers=headers),
        "idempotency_key_reused",
    )
    assert "new key" in body["detail"]
    for key in ("", "k" * 256):
        assert (
            "1 to 255"
            in assert_problem(
                service.user.post("/v1/jobs", json=spec, headers={"Idempotency-Key": key}),
                "request_invalid",
            )["detail"]
        )


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "/{0}", "file://{0}", "{0}/./"])
def test_a_folder_that_an_active_job_writes_to_is_refused(
    service: Any, spec: Json, tmp_path: Path, spelling: str
) -> None:
    folder = str(tmp_path / "shared")
    first = service.submit(spec | {"storage": {"path": folder}})["id"]
    again = spec | {"storage": {"path": spelling.format(folder)}}
    for address in ("/v1/jobs", "/v1/plans"):
        response = service.user.post(address, json=again)
        problem = response.json()
        assert response.status_code == 422, problem
        assert problem["code"] == "spec_invalid", problem
        assert problem["errors"][0]["pointer"] == "/storage/path"
        assert problem["errors"][0]["code"] == "in_use"
        assert first in problem["detail"]
        assert f"wait until {first} has ended" in problem["detail"]
    assert (
        service.user.post(
            "/v1/plans", json=spec | {"storage": {"path": folder + "2"}}
        ).status_code
        == 200
    )
    service.user.post(f"/v1/jobs/{first}/cancel")
    assert service.user.post("/v1/plans", json=again).status_code == 200
    assert service.user.post("/v1/jobs", json=again).status_code == 201


def test_the_default_folder_of_an_active_job_is_refused_too(
    service: Any, spec: Json
) -> None:
    first = service.submit(spec)
    response = service.user.post(
        "/v1/jobs", json=spec | {"storage": {"path": first["storage_path"]}}
    )
    assert response.status_code == 422
    assert first["id"] in response.json()["detail"]
    assert (
        service.user.post(
            "/v1/jobs", json=spec | {"storage": {"path": "s3://bucket/x"}}
        ).status_code
        == 201
    )
    assert (
        service.user.post(
            "/v1/jobs", json=spec | {"storage": {"path": "s3://bucket/x/"}}
        ).status_code
        == 422
    )
    assert (
        service.user.post(
            "/v1/jobs", json=spec | {"storage": {"path": "s3://bucket/y"}}
        ).status_code
        == 201
    )


def test_tokens_open_only_their_own_doors(service: Any) -> None:
    job_id, driver = service.running_job()
    other = service.submit()["id"]
    nobody = service.client(None)
    user = service.user
    agent = service.agent.http
    for path in (
        "/v1/jobs",
        "/metrics",
        "/v1/nothing",
        "/docs",
        "/internal/v1/agent/hello",
        f"/internal/v1/jobs/{job_id}/desired",
    ):
        response = nobody.get(path)
        assert "Bearer" in response.headers["WWW-Authenticate"]
        assert (
            "Authorization: Bearer" in assert_problem(response, "unauthenticated")["detail"]
        )
        assert_problem(service.client("x" * 43).get(path), "unauthenticated")
        assert_problem(service.client(f"{job_id}.{'0' * 64}").get(path), "unauthenticated")
        assert_problem(
            nobody.get(path, headers={"Authorization": "Basic dTp1"}), "unauthenticated"
        )
    assert "scope agent" in assert_problem(agent.get("/v1/jobs"), "forbidden")["detail"]
    assert_problem(user.get("/internal/v1/agent/hello"), "forbidden")
    assert_problem(user.get(f"/internal/v1/jobs/{job_id}/desired"), "forbidden")
    assert_problem(driver.http.get("/v1/jobs"), "forbidden")
    assert_problem(driver.http.get("/internal/v1/agent/hello"), "forbidden")
    assert (
        f"valid for {job_id} only"
        in assert_problem(
            driver.http.get(f"/internal/v1/jobs/{other}/desired"), "forbidden"
        )["detail"]
    )
    assert_problem(driver.http.get("/internal/v1/jobs/"), "forbidden")
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert nobody.get(path).status_code == 200


def test_wrong_token_is_refused_before_the_body_is_read(service: Any) -> None:
    response = service.client("x" * 43).post(
        "/v1/jobs", content=b"{not json", headers={"Content-Type": "application/json"}
    )
    assert_problem(response, "unauthenticated")


def test_tokens_are_stored_as_fingerprints_only(service: Any) -> None:
    _, driver = service.running_job()
    secret = driver.http.headers["Authorization"].removeprefix("Bearer ")
    service.stop()
    data = b"".join(
        path.read_bytes()
        for path in service.settings.data_dir.iterdir()
        if path.name.startswith("service.db")
    )
    for token in ("u" * 43, "a" * 43, secret, secret.partition(".")[2]):
        assert token.encode() not in data
    assert (service.settings.data_dir / "service.key").stat().st_mode & 0o777 == 0o600
    service._start()


def test_agents_words_are_checked(service: Any, make_node: Callable[..., Any]) -> None:
    good = {
        "protocol": 1,
        "cluster": "default",
        "agent_id": "a",
        "code_version": "1",
        "ray_version": "2",
        "namespace": "n",
    }
    post = service.agent.http.post
    assert_problem(
        post("/internal/v1/agent/report", json=good | {"cluster": "mars"}),
        "request_invalid",
    )
    assert_problem(
        post("/internal/v1/agent/report", json=good | {"protocol": 7}),
        "protocol_unsupported",
    )
    body = assert_problem(
        post("/internal/v1/agent/report", json=good | {"nodes": [{"node_id": 1}]}),
        "request_invalid",
    )
    assert body["errors"][0]["pointer"] == "/nodes/0/node_id"
    assert_problem(
        service.agent.http.get("/internal/v1/agent/desired", params={"cluster": "mars"}),
        "request_invalid",
    )
    assert post("/internal/v1/agent/checks", json={"check_id": "long-gone"}).json() == {
        "ok": True
    }


def test_faults_of_the_service_are_logged_and_not_shown(
    service: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the secret inside")

    monkeypatch.setattr("service.api.render.summaries", broken)
    body = assert_problem(
        service.user.get("/v1/jobs", headers={"X-Request-ID": "mine-1"}), "internal"
    )
    assert body["request_id"] == "mine-1"
    assert "mine-1" in body["detail"]
    assert "secret" not in json.dumps(body)
    assert any(
        "mine-1" in record.getMessage() and "the secret inside" in str(record.exc_info)
        for record in caplog.records
    )


def test_a_database_that_does_not_answer_is_said_plainly(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    def gone(*_: object) -> None:
        raise OperationalError("SELECT 1", {}, sqlite3.OperationalError("disk I/O error"))

    monkeypatch.setattr("service.jobs.lifecycle.find", gone)
    response = service.user.get("/v1/jobs/job-x")
    assert "try again" in assert_problem(response, "unavailable")["detail"]
    assert response.headers["Retry-After"] == "2"
    monkeypatch.setattr(service.app.state.context.store, "ping", gone)
    ready = service.client(None).get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["status"] == "unavailable"


@pytest.fixture(scope="module")
def module_settings(
    tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[], str | None]
) -> Any:
    from service.settings import Settings

    folder = tmp_path_factory.mktemp("refusals")
    return Settings(
        data_dir=folder / "data",
        database_url=new_database(),
        tokens_file=tokens_file(folder),
        check_wait_s=0.0,
    )


@pytest.fixture(scope="module")
def shared(
    module_settings: Any, start_service: Callable[..., Any], new_node: Callable[..., Any]
) -> Any:
    """One service for refusals, which leave nothing behind; its cluster has one node
    with 4 CPUs.
    """
    service = start_service(module_settings)
    service.agent.report(new_node(cpus=4))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def with_job(
    tmp_path_factory: pytest.TempPathFactory,
    module_settings: Any,
    start_service: Callable[..., Any],
    new_database: Callable[[], str | None],
) -> Any:
    """Another, with one job that waits for an agent."""
    own = {"data_dir": tmp_path_factory.mktemp("with-job"), "database_url": new_database()}
    service = start_service(module_settings.model_copy(update=own))
    yield service, service.submit()["id"]
    service.stop()


def paths(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    own = [here] if here else []
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return own + [path for key, value in items for path in paths(value, (*here, key))]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [
            0,
            -1,
            1,
            2,
            3,
            1 << 31,
            1 << 63,
            10**30,
            1e308,
            -0.0,
            "",
            "auto",
            "NaN",
            "\0",
            "\ud800",
            "a" * 5000,
            "../x",
            "s3://b",
        ]
    ),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.none(), max_size=2),
)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_changed_spec_is_accepted_or_refused_with_a_pointer(
    shared: Any, full_spec: Json, data: st.DataObject
) -> None:
    spec = json.loads(json.dumps(full_spec))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths(spec)))
        node = spec
        for key in path[:-1]:
            node = node[key]
        action = data.draw(st.sampled_from(["change", "change", "remove", "add"]))
        if action == "change":
            node[path[-1]] = data.draw(ODD)
        elif action == "remove":
            del node[path[-1]]
        elif isinstance(node, dict):
            node[data.draw(st.text(max_size=8))] = data.draw(ODD)
        if not paths(spec):
            break
    content = json.dumps(spec).encode()
    response = shared.user.post(
        "/v1/plans", content=content, headers={"Content-Type": "application/json"}
    )
    if response.status_code == 200:
        body = response.json()
        assert len(body["ranks"]) == body["world_size"] >= 1
        assert json.dumps(body["resolved_spec"])
        assert body["fits"] is False or body["world_size"] <= body["room"]
    else:
        body = assert_problem(response, response.json()["code"])
        assert 400 <= response.status_code < 500, body
        assert body["errors"], body
    posted = shared.user.post(
        "/v1/jobs", content=content, headers={"Content-Type": "application/json"}
    )
    if posted.status_code == 201:
        assert response.status_code == 200
        assert not response.json()["problems"]
        assert (
            shared.user.post(f"/v1/jobs/{posted.json()['id']}/cancel").json()["status"]
            == "cancelled"
        )
        assert shared.user.delete(f"/v1/jobs/{posted.json()['id']}").status_code == 204
    else:
        errors = assert_problem(posted, posted.json()["code"])["errors"]
        assert 400 <= posted.status_code < 500
        assert errors
        assert errors == (response.json().get("errors") or response.json().get("problems"))


@pytest.fixture
def full_spec(spec: Json) -> Json:
    """Every field spelt out, so that every field is changed."""
    from workers.protocol.job import JobSpec

    return JobSpec.model_validate(spec).model_dump(mode="json") | {"storage": None}

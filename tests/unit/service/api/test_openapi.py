"""/openapi.json is what is served: a short form of `make fuzz`, its examples, its words."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode

from service.http.openapi import operations
from service.settings import Settings
from tests.support.finished_job import add_finished_job
from tests.support.service_tokens import USER_TOKEN, tokens_file

Json = dict[str, Any]
CONFIG = Path(__file__).parents[3] / "fuzz" / "schemathesis.toml"


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
    new_database: Callable[[], str | None],
    start_service: Callable[[Settings], Any],
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("openapi")
    service = start_service(
        Settings(
            data_dir=folder / "data",
            database_url=new_database(),
            tokens_file=tokens_file(folder),
            check_wait_s=0.0,
        )
    )
    yield service
    service.stop()


@pytest.fixture(scope="module")
def document(running: Any) -> Json:
    body: Json = running.client(None).get("/openapi.json").json()
    return body


@pytest.fixture(scope="module")
def api(running: Any) -> Any:
    job_id = add_finished_job(running.user, running.agent.http, running.client)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUZZ_TOKEN", USER_TOKEN)
        patch.setenv("FUZZ_JOB", job_id)
        config = SchemathesisConfig.from_path(CONFIG)
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json", config=config)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_the_document_describes_them(api: Any, mode: GenerationMode) -> None:
    for result in api.get_all_operations():
        operation = result.ok()

        @hypothesis_settings(
            max_examples=3,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(mode))
        def call(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate()

        try:
            call()
        except Unsatisfiable:
            # Nothing is wrong to send where there are no parameters.
            assert mode is GenerationMode.NEGATIVE, operation.label


def test_operations_have_plain_names_of_their_own(document: Json) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert sorted(names) == sorted(set(names))
    assert {"create_job", "list_jobs", "get_job", "cancel_jobs", "list_metrics"} <= set(
        names
    )
    assert not [name for name in names if "v1" in name]
    assert not [name for name in document["components"]["schemas"] if "_" in name]


def test_every_operation_names_its_token_and_all_of_its_errors(document: Json) -> None:
    schemes = document["components"]["securitySchemes"]
    assert schemes["token"]["scheme"] == "bearer"
    for path, method, operation in operations(document):
        is_open = path in ("/healthz", "/readyz")
        assert operation["security"] == ([] if is_open else [{"token": []}])
        statuses = set(operation["responses"])
        assert {"405", "422", "500", "503"} <= statuses, (path, method)
        assert ({"401", "403"} <= statuses) is not is_open
        assert ("404" in statuses) is ("{" in path)
        assert ({"400", "413", "415"} <= statuses) is ("requestBody" in operation)
    stream = document["paths"]["/v1/jobs/{job_id}/stream"]["get"]["responses"]
    assert stream["429"] == {"$ref": "#/components/responses/TooManyRequests"}
    busy = document["components"]["responses"]["TooManyRequests"]
    assert set(busy["headers"]) == {"Retry-After", "X-Request-ID"}
    assert set(busy["content"]) == {"application/problem+json"}
    created = document["paths"]["/v1/jobs"]["post"]["responses"]["201"]
    assert set(created["headers"]) == {"Idempotent-Replayed", "Location", "X-Request-ID"}


def test_everything_is_described(document: Json) -> None:
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        assert schema.get("description"), name
        for field, value in schema.get("properties", {}).items():
            # What only refers to another type is described there.
            reference = value.get("$ref", "").rpartition("/")[2]
            assert value.get("description") or reference in schemas, (name, field)
    tags = {tag["name"] for tag in document["tags"]}
    for path, method, operation in operations(document):
        assert set(operation["tags"]) <= tags
        assert operation["description"], (path, method)
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), (path, method, parameter["name"])


def test_examples_match_their_schemas(document: Json) -> None:
    num_examples = 0
    for path, method, operation in operations(document):
        bodies = [operation.get("requestBody", {})]
        bodies += [
            answer for answer in operation["responses"].values() if "content" in answer
        ]
        for body in bodies:
            for content in body.get("content", {}).values():
                schema = {**content["schema"], "components": document["components"]}
                if "example" in content:
                    num_examples += 1
                    jsonschema.Draft202012Validator(schema).validate(content["example"])
                else:
                    assert path in ("/healthz", "/readyz", "/metrics"), (path, method)
    assert num_examples >= 20


def test_the_document_is_openapi_3_1(document: Json) -> None:
    text = json.dumps(document)
    assert document["openapi"] == "3.1.0"
    assert "itemSchema" not in text  # a keyword of 3.2
    assert "HTTPValidationError" not in text
    metrics = document["paths"]["/metrics"]["get"]["responses"]["200"]
    assert list(metrics["content"]) == ["text/plain"]
    # Every reference leads somewhere.
    for kind, name in re.findall(r'"#/components/(\w+)/([\w.-]+)"', text):
        assert name in document["components"][kind]

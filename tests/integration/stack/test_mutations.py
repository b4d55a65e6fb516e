"""Any one change to a valid spec is either refused with a pointer, or the job it makes
reaches its first step.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.running_stack import SPEC, Road
from workers.protocol.job import JobSpec

pytestmark = pytest.mark.ray

VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    0.5,
    1.5,
    1e30,
    10**12,
    "",
    "x",
    "auto",
    "-1",
    "é\u0000",
    [],
    [1],
    {},
    {"a": 1},
]
Path = tuple[str | int, ...]


def full_spec() -> dict[str, Any]:
    """Every field spelt out, so that every field can be changed; short and small, so
    that what is accepted starts quickly.
    """
    spec = {
        **copy.deepcopy(SPEC),
        "data": {"train": [{"path": "CORPUS"}], "tokenizer": {"kind": "bytes"}},
    }
    values = JobSpec.from_mapping(spec).model_dump(mode="json")
    del values["storage"]
    return values


def paths(node: Any, prefix: Path = ()) -> Iterator[Path]:
    """Of every field, groups included."""
    items: Any = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """(what was changed, the spec)."""
    spec = full_spec()
    *parents, leaf = draw(st.sampled_from(sorted(paths(spec), key=str)))
    node: Any = spec
    for key in parents:
        node = node[key]
    what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "insert"]))
    if what == "delete":
        del node[leaf]
    elif what == "insert" and isinstance(node, dict):
        node["surprise"] = draw(st.sampled_from(VALUES))
    else:
        node[leaf] = draw(st.sampled_from(VALUES))
    return f"{what} {'.'.join(map(str, (*parents, leaf)))}", spec


def check(road: Road, change: str, spec: dict[str, Any]) -> None:
    body = json.dumps(spec).replace('"CORPUS"', json.dumps(str(road.corpus)))
    headers = road.headers | {"Content-Type": "application/json"}
    response = httpx.post(
        f"{road.record.url}/v1/jobs", content=body, headers=headers, timeout=30
    )
    assert "Traceback" not in response.text
    if response.status_code != 201:
        assert 400 <= response.status_code < 500, f"{change}: {response.text}"
        problem = response.json()
        assert problem["errors"], problem
        for entry in problem["errors"]:
            assert entry["pointer"].startswith("/"), problem
            assert entry["detail"], problem
        return
    job_id = response.json()["id"]
    job = road.wait(
        job_id,
        lambda job: (
            bool((job["progress"] or {}).get("step")) or job["ended_at"] is not None
        ),
    )
    if job["status"] == "failed":
        # Only what reading the data has shown may come this late, still by field and
        # before any rank was placed.
        assert job["attempt"] == 0, f"{change}: {job}"
        assert job["problem"]["errors"], f"{change}: {job}"
    httpx.post(
        f"{road.record.url}/v1/jobs/{job_id}/cancel",
        json={"checkpoint": False},
        headers=road.headers,
        timeout=10,
    )
    road.finish(job_id)


OPTIONS: dict[str, Any] = {
    "deadline": None,
    "phases": [Phase.generate],
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=6, derandomize=True, **OPTIONS)
@given(mutated())
def test_a_few_mutations(road: Road, mutation: tuple[str, dict[str, Any]]) -> None:
    check(road, *mutation)


@pytest.mark.chaos
@settings(max_examples=200, print_blob=True, **OPTIONS)
@given(mutated())
def test_two_hundred_mutations(road: Road, mutation: tuple[str, dict[str, Any]]) -> None:
    check(road, *mutation)

"""The rendered manifests are those that kustomize makes, and Kubernetes accepts them."""

import shutil
import subprocess
from typing import Any

import jsonschema
import pytest

from tests.support.manifests import (
    KUBERNETES,
    OVERLAYS,
    documents,
    overlay,
    schema_of,
)

RENDERED = [*OVERLAYS, "rayjob", "rayjob-template"]
KUBECTL = shutil.which("kubectl")


def test_every_overlay_is_rendered() -> None:
    folders = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
    files = sorted(path.stem for path in (KUBERNETES / "rendered").iterdir())
    assert folders == sorted([*OVERLAYS, "rayjob"])
    assert files == sorted(RENDERED)


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", RENDERED)
def test_rendered_files_are_what_kustomize_makes(name: str) -> None:
    folder = KUBERNETES / "overlays" / name
    if name == "rayjob-template":
        folder = KUBERNETES / "rayjob"
    command = ["kubectl", "kustomize", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rendered = (KUBERNETES / f"rendered/{name}.yaml").read_text()
    assert result.stdout == rendered, "run `make manifests`"


@pytest.mark.parametrize("name", RENDERED)
def test_the_schema_of_its_kind_accepts_every_object(name: str) -> None:
    for item in overlay(name).objects:
        schema = schema_of(item["apiVersion"], item["kind"])
        assert problems(schema, item) == [], item["metadata"]["name"]


def test_the_schemas_accept_the_example_of_secrets() -> None:
    for secret in documents(KUBERNETES / "secrets.example.yaml"):
        assert problems(schema_of("v1", "Secret"), secret) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_of_workloads_match_their_pods(name: str) -> None:
    for kind in ("Deployment", "StatefulSet"):
        for item in overlay(name).of_kind(kind):
            # A selector cannot be changed later, and must match what the template makes.
            labels = item["spec"]["template"]["metadata"]["labels"].items()
            assert item["spec"]["selector"]["matchLabels"].items() <= labels


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("RayCluster", "rayVersions"),
        ("Deployment", "replica"),
        ("NetworkPolicy", "ingres"),
        ("ServiceMonitor", "endpoint"),
        ("PrometheusRule", "group"),
        ("PodDisruptionBudget", "minAvailables"),
    ],
)
def test_an_unknown_field_is_a_problem(kind: str, field: str) -> None:
    item: dict[str, Any] = {**overlay("production").of_kind(kind)[0]}
    item["spec"] = {**item["spec"], field: 1}
    assert problems(schema_of(item["apiVersion"], kind), item) != []


def test_a_kind_of_another_version_has_no_schema() -> None:
    with pytest.raises(KeyError, match="apps/v1beta1"):
        schema_of("apps/v1beta1", "Deployment")


@pytest.mark.parametrize("name", RENDERED)
def test_objects_have_names_of_their_own_in_one_namespace(name: str) -> None:
    keys = []
    for item in overlay(name).objects:
        namespace = item["metadata"].get("namespace")
        if item["kind"] in ("Namespace", "PriorityClass"):
            assert namespace is None
        else:
            assert namespace == "megatron-ray"
        keys.append((item["kind"], item["metadata"]["name"]))
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", RENDERED)
def test_no_token_lies_in_the_manifests(name: str) -> None:
    assert overlay(name).of_kind("Secret") == []


def test_the_example_names_a_secret_once() -> None:
    names = []
    for secret in documents(KUBERNETES / "secrets.example.yaml"):
        assert secret["kind"] == "Secret"
        names.append(secret["metadata"]["name"])
    assert len(names) == len(set(names))


def problems(schema: dict[str, Any], value: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]

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
    ingress_rules_schema,
    overlay,
    pod_template_schema,
    ray_cluster_schema,
)

KUBECTL = shutil.which("kubectl")


def test_every_overlay_is_rendered() -> None:
    folders = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
    files = sorted(path.stem for path in (KUBERNETES / "rendered").iterdir())
    assert folders == files == sorted(OVERLAYS)


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", OVERLAYS)
def test_rendered_files_are_what_kustomize_makes(name: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rendered = (KUBERNETES / f"rendered/{name}.yaml").read_text()
    assert result.stdout == rendered, "run `make manifests`"


@pytest.mark.parametrize("name", OVERLAYS)
def test_kuberay_accepts_the_cluster(name: str) -> None:
    cluster = overlay(name).one("RayCluster", "training")
    assert problems(ray_cluster_schema(), cluster) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubernetes_accepts_the_pods(name: str) -> None:
    for kind in ("Deployment", "StatefulSet"):
        for item in overlay(name).of_kind(kind):
            template = item["spec"]["template"]
            assert problems(pod_template_schema(), template) == []
            # A selector cannot be changed later, and must match what the template makes.
            labels = template["metadata"]["labels"].items()
            assert item["spec"]["selector"]["matchLabels"].items() <= labels


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubernetes_accepts_the_network_policies(name: str) -> None:
    for policy in overlay(name).of_kind("NetworkPolicy"):
        assert problems(ingress_rules_schema(), policy["spec"].get("ingress", [])) == []


def test_an_unknown_field_is_a_problem() -> None:
    cluster: dict[str, Any] = {**overlay("dev").one("RayCluster", "training")}
    cluster["spec"] = {**cluster["spec"], "rayVersions": "2.60.0"}
    assert problems(ray_cluster_schema(), cluster) != []


@pytest.mark.parametrize("name", OVERLAYS)
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


@pytest.mark.parametrize("name", OVERLAYS)
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

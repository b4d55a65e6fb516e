"""Reads the rendered manifests of `deploy/kubernetes`.

Owns: pods, containers and variables as Kubernetes and KubeRay would make them. Must not
know: what is right.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ("dev", "gpu", "kueue", "production")
Json = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """What a template makes: its labels and its spec."""

    owner: str
    labels: dict[str, str]
    spec: Json

    @property
    def containers(self) -> list[Json]:
        """All containers, those that start first included."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def container(self, name: str) -> Json:
        """Returns the container of that name."""
        return named(self.containers, name)


class Overlay:
    """The objects of one rendered overlay."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.objects = documents(KUBERNETES / f"rendered/{name}.yaml")

    def of_kind(self, kind: str) -> list[Json]:
        """Returns all objects of a kind."""
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str, name: str) -> Json:
        """Returns the object of a kind and name."""
        for item in self.of_kind(kind):
            if item["metadata"]["name"] == name:
                return item
        raise AssertionError(f"{self.name}: no {kind} {name}")

    @property
    def ray_cluster(self) -> Json:
        """The spec of the RayCluster."""
        spec: Json = self.one("RayCluster", "training")["spec"]
        return spec

    def pods(self) -> list[Pod]:
        """Returns a pod for every template."""
        cluster = self.ray_cluster
        templates = {"ray-head": cluster["headGroupSpec"]["template"]}
        for group in cluster["workerGroupSpecs"]:
            templates[group["groupName"]] = group["template"]
        for kind in ("Deployment", "StatefulSet"):
            for item in self.of_kind(kind):
                templates[item["metadata"]["name"]] = item["spec"]["template"]
        pods = []
        for owner, template in templates.items():
            pods.append(Pod(owner, template["metadata"]["labels"], template["spec"]))
        return pods

    def pod(self, owner: str) -> Pod:
        """Returns the pod of a workload or of a group of Ray's nodes."""
        for pod in self.pods():
            if pod.owner == owner:
                return pod
        raise AssertionError(f"{self.name}: no pod of {owner}")

    def containers(self) -> Iterator[tuple[str, Json]]:
        """Yields every container with its place, as in `ray-head/ray-head`."""
        for pod in self.pods():
            for container in pod.containers:
                yield f"{pod.owner}/{container['name']}", container
        autoscaler = self.ray_cluster.get("autoscalerOptions")
        if autoscaler is not None and self.ray_cluster.get("enableInTreeAutoscaling"):
            # KubeRay fills in name and image of the head's.
            yield "ray-head/autoscaler", autoscaler

    def environment(self, container: Json) -> dict[str, str]:
        """Returns the variables with plain values, of ConfigMaps and of the container."""
        variables: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                variables |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", ()):
            variables[variable["name"]] = variable.get("value", "")
        return variables


@cache
def overlay(name: str) -> Overlay:
    """Returns a rendered overlay, read once."""
    return Overlay(name)


@cache
def ray_cluster_schema() -> Json:
    """Returns the schema of a RayCluster, in which unknown fields are mistakes."""
    path = ROOT / "tests/support/schemas/raycluster.v1.json"
    schema: Json = json.loads(path.read_text())["openAPIV3Schema"]
    # Kubernetes drops unknown fields in silence.
    for name in ("spec",):
        _close(schema["properties"][name])
    return schema


def pod_template_schema() -> Json:
    """Returns the schema of a pod's template, which the RayCluster's contains."""
    head = ray_cluster_schema()["properties"]["spec"]["properties"]["headGroupSpec"]
    template: Json = head["properties"]["template"]
    return template


def ingress_rules_schema() -> Json:
    """Returns the schema of a NetworkPolicy's rules, which the RayCluster's contains."""
    policy = ray_cluster_schema()["properties"]["spec"]["properties"]["networkPolicy"]
    rules: Json = policy["properties"]["head"]["properties"]["ingressRules"]
    return rules


def _close(schema: Any) -> None:
    """Forbids unknown fields in all objects whose fields are listed."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    if not isinstance(schema, dict):
        return
    for item in schema.values():
        _close(item)
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        schema.setdefault("additionalProperties", False)


def documents(path: Path) -> list[Json]:
    """Returns the documents of a YAML file."""
    return [item for item in yaml.safe_load_all(path.read_text()) if item]


def named(items: list[Json], name: str) -> Json:
    """Returns the item of that name."""
    for item in items:
        if item["name"] == name:
            return item
    raise AssertionError(f"no item {name}")

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
SCHEMAS = ROOT / "tests/support/schemas"
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
def schema_of(api_version: str, kind: str) -> Json:
    """Returns the schema of a kind, in which unknown fields are mistakes.

    Raises KeyError for a kind that has no schema here.
    """
    if (api_version, kind) in _custom_resources():
        path = _custom_resources()[api_version, kind]
        schema: Json = json.loads(path.read_text())["openAPIV3Schema"]
        if kind == "RayJob":
            cluster = schema_of(api_version, "RayCluster")["properties"]["spec"]
            schema["properties"]["spec"]["properties"]["rayClusterSpec"] = cluster
        # Kubernetes drops unknown fields in silence.
        _close(schema["properties"]["spec"])
        return schema
    definitions = json.loads((SCHEMAS / "kubernetes.v1.29.json").read_text())["$defs"]
    versions = definitions[kind]["properties"]["apiVersion"]["enum"]
    if api_version not in versions:
        raise KeyError(f"{kind} of {api_version}")
    return {"$ref": f"#/$defs/{kind}", "$defs": definitions}


@cache
def _custom_resources() -> dict[tuple[str, str], Path]:
    """Returns the files of schemas by version and kind."""
    paths = {}
    for path in SCHEMAS.glob("*.json"):
        content = json.loads(path.read_text())
        if "openAPIV3Schema" in content:
            paths[content["apiVersion"], content["kind"]] = path
    return paths


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

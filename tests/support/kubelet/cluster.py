"""A cluster of one machine: controllers that keep pods running, and Services.

Owns: which pods there are, their addresses, the names of Services. Must not know: what
the pods do.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.kubelet import kuberay
from tests.support.kubelet.pod_values import Objects, PodFacts
from tests.support.kubelet.pods import Image, Pod, PodSetup
from tests.support.kubelet.sandbox import Sandbox, make_network

Json = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet")


@dataclass(frozen=True)
class Template:
    """What a controller makes a pod of, again and again."""

    owner: str
    namespace: str
    labels: dict[str, str]
    spec: Json


class Cluster:
    """Runs the pods of a list of manifests. Lives inside `sandbox.command_inside`."""

    def __init__(self, manifests: Sequence[Json], image: Image, folder: Path) -> None:
        make_network()
        self.objects = Objects.of(manifests, folder / "claims")
        self.pods: dict[str, Pod] = {}
        """By owner: a workload, or a group of Ray's nodes with a number."""
        self._image = image
        self._folder = folder
        self._numbers = itertools.count(2)
        self._templates: dict[str, Template] = {}
        self._services = [item for item in manifests if item["kind"] == "Service"]
        self._manifests = manifests

    def start(self) -> None:
        """Starts the pods of all workloads."""
        for item in self._manifests:
            self.apply(item)

    def apply(self, manifest: Json) -> None:
        """Starts the pods of a workload; objects without pods start none."""
        if manifest["kind"] == "RayCluster":
            self._services.append(kuberay.head_service(manifest))
        for template in _templates(manifest):
            self._templates[template.owner] = template
            self._create(template.owner)

    def replace(self, owner: str) -> Pod:
        """Kills a pod and makes another one, as controllers do: new name, new address."""
        self.pods[owner].kill()
        return self._create(owner)

    def delete(self, owner: str) -> float:
        """Ends a pod with its grace period, then replaces it; returns its seconds."""
        seconds = self.pods[owner].delete()
        self._create(owner)
        return seconds

    def kill(self) -> None:
        """Ends everything."""
        for pod in self.pods.values():
            pod.kill()

    def address(self, service: str, port: int) -> str:
        """Returns host and port of a Service, for a client on this machine."""
        (manifest,) = [
            item for item in self._services if item["metadata"]["name"] == service
        ]
        owner = self._selected(manifest)
        assert owner is not None, f"no pod for {service}"
        return f"{self.pods[owner].sandbox.address}:{port}"

    def errors(self) -> list[BaseException]:
        """Returns why containers could not be started."""
        return [error for pod in self.pods.values() for error in pod.errors]

    def _create(self, owner: str) -> Pod:
        template = self._templates[owner]
        number = next(self._numbers)
        name = f"{owner}-{number}"
        folder = self._folder / name
        folder.mkdir()
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        address = f"10.77.0.{number}"
        # It has its network before the first container starts.
        sandbox = Sandbox(name, address, number)
        facts = PodFacts(name, template.namespace, address, template.labels)
        setup = PodSetup(facts, template.spec, self.objects, self._image, folder)
        pod = Pod(setup, sandbox)
        self.pods[owner] = pod
        self._write_hosts()
        pod.start()
        return pod

    def _write_hosts(self) -> None:
        """Writes the names of all Services for every pod: the cluster's DNS."""
        lines = ["127.0.0.1 localhost"]
        for service in self._services:
            owner = self._selected(service)
            if owner is not None:
                address = self.pods[owner].sandbox.address
                lines.append(f"{address} {' '.join(_names(service))}")
        for pod in self.pods.values():
            own = f"{pod.sandbox.address} {pod.setup.facts.name}"
            # In place, since the file is mounted.
            (pod.setup.folder / "hosts").write_text("\n".join([*lines, own, ""]))

    def _selected(self, service: Json) -> str | None:
        """Returns the pod that a Service leads to."""
        selector = service["spec"]["selector"].items()
        for owner, pod in self.pods.items():
            if selector <= pod.setup.facts.labels.items():
                _require_equal_ports(service, pod)
                return owner
        return None


def _templates(item: Json) -> list[Template]:
    name = item["metadata"]["name"]
    namespace = item["metadata"].get("namespace", "default")
    by_owner = {}
    if item["kind"] in WORKLOADS:
        assert item["spec"]["replicas"] == 1
        by_owner[name] = item["spec"]["template"]
    elif item["kind"] == "RayCluster":
        for group, templates in kuberay.pod_templates(item).items():
            for index, template in enumerate(templates):
                by_owner[f"{name}-{group}-{index}"] = template
    return [
        Template(owner, namespace, template["metadata"]["labels"], template["spec"])
        for owner, template in by_owner.items()
    ]


def _names(service: Json) -> list[str]:
    name = service["metadata"]["name"]
    namespace = service["metadata"]["namespace"]
    return [
        name,
        f"{name}.{namespace}",
        f"{name}.{namespace}.svc",
        f"{name}.{namespace}.svc.cluster.local",
    ]


def _require_equal_ports(service: Json, pod: Pod) -> None:
    """A Service is a name here, which cannot change a port."""
    ports = {}
    for container in pod.setup.spec["containers"]:
        for port in container.get("ports", ()):
            ports[port["name"]] = port["containerPort"]
    for port in service["spec"]["ports"]:
        target = port.get("targetPort", port["port"])
        assert ports.get(target, target) == port["port"], service["metadata"]["name"]

"""Ray's ports are closed to everybody but those who need them."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.manifests import OVERLAYS, Json, Pod, overlay

MONITORED = ["production"]
CLIENTS = {"megatron-ray-clients": "true"}
PROMETHEUS = {"kubernetes.io/metadata.name": "monitoring"}


def selected(pods: Iterable[Pod], selector: Json) -> list[str]:
    """Returns the pods that a selector of labels selects."""
    labels = selector.get("matchLabels", {})
    assert set(selector) <= {"matchLabels"}
    return [pod.owner for pod in pods if labels.items() <= pod.labels.items()]


def senders(name: str, receiver: str, port: str | None) -> list[str]:
    """Returns who may connect to a pod: owners of pods, or labels of namespaces.

    None stands for a port that no container names.
    """
    pods = overlay(name).pods()
    allowed: set[str] = set()
    for policy in overlay(name).of_kind("NetworkPolicy"):
        if receiver not in selected(pods, policy["spec"]["podSelector"]):
            continue
        for rule in policy["spec"].get("ingress", ()):
            ports = [entry["port"] for entry in rule.get("ports", ())]
            if ports and port not in ports:
                continue
            for peer in rule["from"]:
                if "podSelector" in peer:
                    allowed.update(selected(pods, peer["podSelector"]))
                else:
                    allowed.update(peer["namespaceSelector"]["matchLabels"])
    return sorted(allowed)


def nodes_of_ray(name: str) -> list[str]:
    (group,) = overlay(name).ray_cluster["workerGroupSpecs"]
    return sorted(["ray-head", "megatron-ray-agent", group["groupName"]])


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_is_closed_by_default(name: str) -> None:
    closed = overlay(name).one("NetworkPolicy", "closed")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_nodes_of_ray_reach_each_other_and_are_reached_by_no_other(name: str) -> None:
    nodes = nodes_of_ray(name)
    for receiver in nodes:
        assert senders(name, receiver, None) == nodes


@pytest.mark.parametrize("name", OVERLAYS)
def test_metrics_of_ray_are_open_to_prometheus_at_most(name: str) -> None:
    expected = nodes_of_ray(name)
    if name in MONITORED:
        expected = sorted([*expected, *PROMETHEUS])
    assert senders(name, "ray-head", "metrics") == expected


@pytest.mark.parametrize("name", OVERLAYS)
def test_drivers_and_clients_reach_the_service_and_its_port_only(name: str) -> None:
    expected = [*nodes_of_ray(name), *CLIENTS]
    if name in MONITORED:
        expected += PROMETHEUS
    assert senders(name, "megatron-ray-service", "http") == sorted(expected)
    assert senders(name, "megatron-ray-service", None) == []


def test_only_the_head_reaches_redis() -> None:
    assert senders("production", "redis", "redis") == ["ray-head"]
    assert senders("production", "redis", None) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_selector_selects_a_pod_and_every_port_is_one_of_it(name: str) -> None:
    stage = overlay(name)
    pods = stage.pods()
    for policy in stage.of_kind("NetworkPolicy"):
        receivers = selected(pods, policy["spec"]["podSelector"])
        assert receivers
        for rule in policy["spec"].get("ingress", ()):
            for peer in rule["from"]:
                assert "namespaceSelector" in peer or selected(pods, peer["podSelector"])
            for entry in rule.get("ports", ()):
                for receiver in receivers:
                    assert entry["port"] in ports_of(stage.pod(receiver))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_service_leads_to_a_port_of_a_pod(name: str) -> None:
    stage = overlay(name)
    for service in stage.of_kind("Service"):
        (owner,) = selected(stage.pods(), {"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports_of(stage.pod(owner))


def ports_of(pod: Pod) -> dict[str, Any]:
    """Returns the named ports of a pod's containers."""
    ports = {}
    for container in pod.containers:
        for port in container.get("ports", ()):
            ports[port["name"]] = port["containerPort"]
    return ports

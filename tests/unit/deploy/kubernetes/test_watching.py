"""Probes, monitors and alerts ask for what the service serves."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import promql_parser
import pytest
import sqlalchemy as sa
import yaml
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.orm import Session

from service.api.health import router
from service.http.auth import OPEN_PATHS
from service.http.telemetry import Telemetry
from service.store.schema import Table
from tests.support.manifests import OVERLAYS, Json, overlay
from workers.protocol.states import JobState

METRIC = re.compile(r"\bmegatron_ray_\w+")
PROMTOOL = shutil.which("promtool")
MATCHER = re.compile(r'(megatron_ray_\w+)\{(\w+)="([^"]*)"\}')


@pytest.fixture(scope="module")
def exported() -> dict[str, set[tuple[str, str]]]:
    """Labels with their values, by the name of every sample that the service exports."""
    telemetry = Telemetry()
    for status in (200, 500):
        telemetry.observe("GET", "/v1/jobs", status, 0.01, is_long_wait=False)
    engine = sa.create_engine("sqlite://")
    Table.metadata.create_all(engine)
    with Session(engine) as session:
        text = telemetry.render(session, {"default": 1.0}).decode()
    engine.dispose()
    samples: dict[str, set[tuple[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        # Gauges of running jobs have no sample while none runs.
        samples.setdefault(family.name, set())
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels.items())
    return samples


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_ask_for_open_paths_of_the_service(name: str) -> None:
    container = overlay(name).pod("megatron-ray-service").container("service")
    served = [route.path for route in router.routes if isinstance(route, APIRoute)]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = container[kind]["httpGet"]
        assert request["path"] in served
        assert request["path"] in OPEN_PATHS
        assert request["port"] in [port["name"] for port in container["ports"]]
    # A database that is away must not restart the service.
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_node_of_the_agent_is_asked_as_kuberay_asks_its_own(name: str) -> None:
    node = overlay(name).pod("megatron-ray-agent").container("ray-node")
    for kind in ("startupProbe", "livenessProbe"):
        assert node[kind]["httpGet"] == {"path": "/api/healthz", "port": "health"}


def alerts() -> Iterator[Json]:
    (rule,) = overlay("production").of_kind("PrometheusRule")
    for group in rule["spec"]["groups"]:
        yield from group["rules"]


def test_alerts_use_metrics_that_the_service_exports(
    exported: dict[str, set[tuple[str, str]]],
) -> None:
    for alert in alerts():
        names = METRIC.findall(alert["expr"])
        assert names
        assert set(names) <= set(exported), alert["alert"]
        for name, label, value in MATCHER.findall(alert["expr"]):
            assert (label, value) in exported[name], alert["alert"]


def test_alerts_say_what_is_wrong() -> None:
    names = []
    for alert in alerts():
        names.append(alert["alert"])
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["summary"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("alert", list(alerts()), ids=lambda alert: str(alert["alert"]))
def test_prometheus_accepts_the_expressions_and_times_of_alerts(alert: Json) -> None:
    promql_parser.parse(alert["expr"])
    if "for" in alert:
        assert promql_parser.parse_duration(alert["for"]) > timedelta()


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("rate(a)", "expected type matrix"),
        ("sum(a", "unclosed left parenthesis"),
        ("a unless on() >", "invalid promql query"),
    ],
)
def test_a_wrong_expression_is_found(expression: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        promql_parser.parse(expression)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (rule,) = overlay("production").of_kind("PrometheusRule")
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    command = ["promtool", "check", "rules", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_states_of_alerts_are_states_of_jobs() -> None:
    states = set()
    for alert in alerts():
        for name, label, value in MATCHER.findall(alert["expr"]):
            if (name, label) == ("megatron_ray_jobs", "state"):
                states.add(value)
    assert states
    assert states <= {state.value for state in JobState}


def test_monitors_select_the_service_and_the_nodes_of_ray() -> None:
    stage = overlay("production")
    (monitor,) = stage.of_kind("ServiceMonitor")
    service = stage.one("Service", "megatron-ray")
    labels = service["metadata"]["labels"].items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    # /metrics is no open path.
    assert endpoint["path"] not in OPEN_PATHS
    credentials = {"name": "megatron-ray-tokens", "key": "user"}
    assert endpoint["authorization"]["credentials"] == credentials
    (nodes,) = stage.of_kind("PodMonitor")
    labels_of_nodes = nodes["spec"]["selector"]["matchLabels"].items()
    owners = [pod.owner for pod in stage.pods() if labels_of_nodes <= pod.labels.items()]
    assert set(owners) == {"ray-head", "gpu-8", "megatron-ray-agent"}

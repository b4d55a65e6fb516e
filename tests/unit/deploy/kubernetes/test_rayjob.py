"""One RayJob per job: the service stays outside, an agent of its own is the entrypoint."""

import shlex
from typing import Any

import typer.main

from service.settings import Settings
from tests.support.manifests import KUBERNETES, Json, documents, named, overlay
from workers.agent.__main__ import app as agent_app

STAGE = overlay("rayjob")
(JOB,) = documents(KUBERNETES / "rendered/rayjob-template.yaml")
CLUSTER: Json = JOB["spec"]["rayClusterSpec"]


def test_the_overlay_brings_no_cluster_and_no_agent() -> None:
    assert STAGE.of_kind("RayCluster") == []
    assert [item["metadata"]["name"] for item in STAGE.of_kind("Deployment")] == [
        "megatron-ray-service"
    ]


def test_the_entrypoint_is_an_agent_that_ends_with_the_job() -> None:
    environment = {"$RAY_ADDRESS": "127.0.0.1:6379"}
    text = JOB["spec"]["entrypoint"]
    for name, value in environment.items():
        text = text.replace(name, value)
    words = shlex.split(text)
    assert words[:3] == ["python", "-m", "workers.agent"]
    command: Any = typer.main.get_command(agent_app)
    options = command.make_context("agent", words[3:]).params
    (port,) = STAGE.one("Service", "megatron-ray")["spec"]["ports"]
    assert options["service"] == f"http://megatron-ray:{port['port']}"
    assert options["until_idle"] is True
    # The command line replaces both together.
    assert options["cluster"] == JOB["metadata"]["name"]
    head = CLUSTER["headGroupSpec"]["template"]["spec"]["containers"][0]
    folder = named(head["volumeMounts"], "agent-token")["mountPath"]
    assert str(options["token_file"]) == f"{folder}/agent"


def test_the_service_accepts_clusters_of_this_kind() -> None:
    (service,) = STAGE.of_kind("Deployment")
    container = service["spec"]["template"]["spec"]["containers"][0]
    settings = Settings.from_environment(STAGE.environment(container))
    assert settings.has_cluster(JOB["metadata"]["name"])
    assert settings.lasting_clusters == ()


def test_kueue_can_queue_it() -> None:
    (queue,) = STAGE.of_kind("LocalQueue")
    labels = JOB["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    # Conditions of Kueue: the cluster is the job's own, fixed, and goes with it.
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in JOB["spec"]
    assert CLUSTER["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in CLUSTER


def test_its_nodes_are_those_of_the_overlay_that_it_is_made_of() -> None:
    cluster = overlay("kueue").ray_cluster
    assert CLUSTER["workerGroupSpecs"] == cluster["workerGroupSpecs"]
    assert CLUSTER["authOptions"] == cluster["authOptions"]


def test_kuberay_reaches_the_dashboard_and_no_other_port() -> None:
    policy = STAGE.one("NetworkPolicy", "ray-dashboard")["spec"]
    head = CLUSTER["headGroupSpec"]["template"]
    selector = policy["podSelector"]["matchLabels"]
    assert selector.items() <= head["metadata"]["labels"].items()
    ports = {port["name"] for port in head["spec"]["containers"][0]["ports"]}
    (rule,) = policy["ingress"]
    assert {port["port"] for port in rule["ports"]} == {"dashboard"} <= ports


def test_whatever_its_pods_refer_to_is_in_the_overlay() -> None:
    accounts = {item["metadata"]["name"] for item in STAGE.of_kind("ServiceAccount")}
    claims = {item["metadata"]["name"] for item in STAGE.of_kind("PersistentVolumeClaim")}
    groups = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        assert spec["serviceAccountName"] in accounts
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in spec["containers"]:
            STAGE.environment(container)

"""What KubeRay makes of the manifests is understood by Ray, and fits the Services."""

import shlex
from typing import Any

import pytest
from ray.scripts.scripts import cli as ray_cli

from tests.support.kubelet import kuberay
from tests.support.manifests import KUBERNETES, Json, documents, overlay

DEV = overlay("dev").one("RayCluster", "training")
(JOB,) = documents(KUBERNETES / "rendered/rayjob-template.yaml")
OF_JOB = kuberay.cluster_of_job(JOB)


def start_options(template: Json) -> dict[str, Any]:
    """Returns the options of the `ray start` of a pod, by Ray's own parser."""
    (text,) = template["spec"]["containers"][0]["args"]
    words = shlex.split(text.partition("; ")[2])
    assert words[:2] == ["ray", "start"]
    command: Any = ray_cli.commands["start"]
    options: dict[str, Any] = command.make_context("start", words[2:]).params
    return options


@pytest.mark.parametrize(
    ("cluster", "group", "cpus", "gpus"),
    [(DEV, "workers", 2, None), (OF_JOB, "gpu-8", 32, 8)],
)
def test_nodes_have_the_resources_of_their_containers(
    cluster: Json, group: str, cpus: int, gpus: int | None
) -> None:
    (template,) = kuberay.pod_templates(cluster)[group]
    options = start_options(template)
    assert (options["num_cpus"], options["num_gpus"]) == (cpus, gpus)
    name = cluster["metadata"]["name"]
    assert options["address"] == f"{name}-head-svc.megatron-ray.svc.cluster.local:6379"
    assert options["block"] is True


@pytest.mark.parametrize("cluster", [DEV, OF_JOB])
def test_no_rank_fits_on_the_head(cluster: Json) -> None:
    (template,) = kuberay.pod_templates(cluster)["headgroup"]
    options = start_options(template)
    assert options["head"] is True
    assert (options["num_cpus"], options["num_gpus"]) == (0, 0)


@pytest.mark.parametrize("cluster", [DEV, OF_JOB])
def test_the_service_of_the_head_selects_it(cluster: Json) -> None:
    (template,) = kuberay.pod_templates(cluster)["headgroup"]
    selector = kuberay.head_service(cluster)["spec"]["selector"].items()
    assert selector <= template["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", 0.5), ("2", 2), (8, 8), ("8Gi", 8 << 30), ("1.5Mi", 1572864)],
)
def test_quantities_are_read_as_kubernetes_does(text: str | int, value: float) -> None:
    assert kuberay.quantity(text) == value


def test_what_is_not_rehearsed_is_an_error() -> None:
    with pytest.raises(AssertionError, match="enableInTreeAutoscaling"):
        kuberay.pod_templates(overlay("gpu").one("RayCluster", "training"))

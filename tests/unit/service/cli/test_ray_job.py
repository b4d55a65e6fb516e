"""`submit --rayjob` prints the RayJob that makes the job's cluster."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.fake_rest_service import JOB, FakeService, Run
from tests.support.manifests import KUBERNETES, schema_of

TEMPLATE = KUBERNETES / "rendered/rayjob-template.yaml"
OWN = ("--set", "cluster=rayjob-llama", "--set", "parallel.dp=1")


@pytest.fixture
def submit(run: Run, service: FakeService, tmp_path: Path) -> Any:
    """Calls `submit --rayjob` with settings of the spec; returns code, manifest, stderr."""
    service.routes["POST /v1/jobs"] = (201, JOB)
    service.requests.clear()

    def call(*settings: str, template: Path = TEMPLATE, more: Any = ()) -> Any:
        words = [word for setting in settings for word in ("--set", setting)]
        code, out, err = run(
            *("submit", "spec.yaml", *OWN, *words, *more),
            *("--rayjob", str(template), "--url", service.url),
        )
        return code, yaml.safe_load(out), err

    return call


def test_the_manifest_is_a_ray_job_named_after_the_cluster(submit: Any) -> None:
    code, manifest, err = submit()
    assert code == 0
    assert err.startswith("submitted job-abc; it starts once its RayJob is there")
    schema = schema_of("ray.io/v1", "RayJob")
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(manifest)) == []
    assert manifest["metadata"]["name"] == "rayjob-llama"
    assert " --cluster=rayjob-llama " in manifest["spec"]["entrypoint"]
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "training"}
    template = yaml.safe_load(TEMPLATE.read_text())
    assert "rayjob-template" not in yaml.safe_dump(manifest)
    # The rest is what operators have written.
    template["spec"]["entrypoint"] = manifest["spec"]["entrypoint"]
    template["metadata"]["name"] = "rayjob-llama"
    assert manifest == template


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        (["parallel.tp=8", "parallel.dp=8"], 8),
        (["parallel.tp=4", "parallel.dp=3"], 2),
        (["parallel.tp=2", "parallel.pp=2", "parallel.dp=2"], 1),
        (["parallel.dp=9"], 2),
        # A node has 32 CPUs.
        (["parallel.dp=9", "resources.cpus_per_rank=16"], 5),
        (["parallel.dp=64", "resources.accelerator=cpu"], 2),
    ],
)
def test_the_cluster_has_the_nodes_that_the_job_needs(
    submit: Any, settings: list[str], nodes: int
) -> None:
    _, manifest, _ = submit(*settings)
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    sizes = {group["replicas"], group["minReplicas"], group["maxReplicas"]}
    assert sizes == {nodes}


@pytest.mark.parametrize(
    ("settings", "message", "remedy"),
    [
        (["parallel.dp=auto"], "/parallel/dp: auto takes", "--set parallel.dp=2"),
        (["cluster=Default_1"], "/cluster: 'Default_1' cannot", "--set cluster=rayjob-1"),
        (
            ["parallel.tp=16"],
            "node of the template's group 'gpu-8' has room for 8",
            "lower tp",
        ),
        (["training.steps=-1"], "/training/steps", ""),
    ],
)
def test_a_job_that_cannot_have_a_cluster_is_not_submitted(
    submit: Any, service: FakeService, settings: list[str], message: str, remedy: str
) -> None:
    code, _, err = submit(*settings)
    assert code == 2
    assert message in err
    assert remedy in err
    assert service.requests == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: RayCluster", "contains 0 RayJobs, expected one"),
        ("{", "cannot read the template"),
        (None, "cannot read the template"),
    ],
)
def test_a_wrong_template_is_named(
    submit: Any, service: FakeService, tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "template.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = submit(template=path)
    assert code != 0
    assert message in err
    assert str(path) in err
    assert service.requests == []


@pytest.mark.parametrize("option", ["--watch", "--json"])
def test_nothing_else_is_printed_beside_a_manifest(
    submit: Any, service: FakeService, option: str
) -> None:
    code, _, err = submit(more=[option])
    assert code == 2
    assert "leave --watch and --json out" in err
    assert service.requests == []

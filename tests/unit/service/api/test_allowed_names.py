"""Jobs that name an image, or credentials, which administrators have allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.settings import Settings

Json = dict[str, Any]
LABEL = "megatron-ray/image"


def test_a_job_with_an_image_needs_a_node_that_runs_it(
    settings: Settings, start: Any, spec: Json, make_node: Callable[..., Json]
) -> None:
    service = start(settings.model_copy(update={"images": ("default", "te")}))
    service.agent.report(make_node("n1"))
    spec["image"] = "te"
    response = service.user.post("/v1/jobs", json=spec)
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["pointer"] == "/image"
    assert "it runs image default, not te" in error["detail"]
    assert error["detail"].endswith("change image or add nodes")
    # A node with the label, or one that an autoscaler may still make.
    with_label = make_node("n2", cpus=2, labels={LABEL: "te"})
    service.agent.report(make_node("n1"), with_label)
    plan = service.user.post("/v1/plans", json=spec).json()
    assert (plan["fits"], plan["room"], plan["world_size"]) == (True, 2, 2)
    group = {"name": "te", "max_nodes": 1, "cpus": 2, "labels": {LABEL: "te"}}
    service.agent.report(make_node("n1"), node_groups=[group])
    plan = service.user.post("/v1/plans", json=spec).json()
    assert (plan["fits"], plan["room"], plan["new_nodes"]) == (True, 0, {"te": 1})
    # Without one a job leaves such nodes alone.
    spec["image"] = "default"
    service.agent.report(make_node("n1", cpus=2), with_label)
    assert service.user.post("/v1/plans", json=spec).json()["world_size"] == 2


def test_credentials_are_for_what_a_job_reads(
    settings: Settings, start: Any, spec: Json, tmp_path: Path
) -> None:
    changes = {"credentials": ("corpora",), "single_user": True}
    service = start(settings.model_copy(update=changes))
    spec["credentials"] = ["moon"]
    (error,) = service.user.post("/v1/jobs", json=spec).json()["errors"]
    assert error["pointer"] == "/credentials/0"
    spec["credentials"] = ["corpora"]
    spec["storage"] = {"path": "s3://runs/x"}
    (error,) = service.user.post("/v1/jobs", json=spec).json()["errors"]
    assert error["pointer"] == "/credentials"
    assert "write to a folder, or leave credentials out" in error["detail"]
    spec["storage"] = {"path": str(tmp_path / "run")}
    assert service.user.post("/v1/jobs", json=spec).status_code == 201

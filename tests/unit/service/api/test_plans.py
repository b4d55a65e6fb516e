"""Plans: the same numbers as the parameter table, and nothing started."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.planning.answers import estimates as planning
from megatron_ray.planning.suggest import nearest
from megatron_ray.sharding.parameters import local_parameters
from megatron_ray.validation.resolution import with_vocabulary
from megatron_ray.validation.storage.disk_space import checkpoint_bytes
from service.cli import offline_plan
from service.settings import Settings
from workers.protocol.job import JobSpec


def plan(service: Any, spec: dict[str, Any]) -> dict[str, Any]:
    response = service.user.post("/v1/plans", json=spec)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize(
    ("precision", "weight", "state"), [("fp32", 4, 8), ("bf16", 2, 12)]
)
@pytest.mark.parametrize("zero", [0, 1])
def test_bytes_are_counted_from_the_parameter_table(
    service: Any,
    spec: dict[str, Any],
    make_node: Any,
    precision: str,
    weight: int,
    state: int,
    zero: int,
) -> None:
    service.agent.report(make_node(cpus=4))
    spec["training"]["precision"] = precision
    spec["parallel"] = {"tp": 2, "sequence_parallel": True, "zero": zero}
    answer = plan(service, spec)
    model = JobSpec.model_validate(answer["resolved_spec"]).model.model_copy(
        update={"vocab_size": 1024}
    )
    elements = sum(
        item.num_elements for item in local_parameters(model, ParallelDims(tp=2, dp=2), 0)
    )
    memory = answer["memory"]
    assert (answer["world_size"], answer["fits"], answer["room"], answer["problems"]) == (
        4,
        True,
        4,
        [],
    )
    padded = pytest.approx(elements, rel=1e-3)
    assert memory["parameters_bytes"] / weight == padded
    assert memory["gradients_bytes"] / 4 == padded
    assert memory["optimizer_bytes"] / state * (2 if zero else 1) == padded
    assert memory["vocab_size"] == 1024
    whole = ("total_bytes_estimate", "vocab_size", "rank")
    assert memory["total_bytes_estimate"] == sum(
        memory[name] for name in memory if name not in whole
    )
    assert {entry["axis"] for entry in answer["communication"]} == {
        "tp",
        "dp",
        "world",
    }
    resolved = JobSpec.from_mapping(answer["resolved_spec"])
    assert answer["checkpoint_bytes"] == checkpoint_bytes(with_vocabulary(resolved, 1024))
    assert answer["num_checkpoints"] == 1
    assert answer["bubble_share"] == 0
    assert answer["ranks"][3] == {
        "rank": 3,
        "coordinates": {"tp": 1, "cp": 0, "dp": 1, "pp": 0},
        "island": 1,
    }
    assert service.user.get("/v1/jobs").json()["data"] == []


def test_what_is_frozen_needs_memory_for_its_weights_only(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(make_node(cpus=4))
    whole, half = (
        plan(service, spec | {"optimizer": {"lr": 1e-3, "freeze": names}})["memory"]
        for names in ([], ["layers.[01].*"])
    )
    assert half["parameters_bytes"] == whole["parameters_bytes"]
    left = half["gradients_bytes"] / whole["gradients_bytes"]
    assert 0.5 < left < 0.7
    assert half["optimizer_bytes"] / whole["optimizer_bytes"] == pytest.approx(
        left, rel=1e-6
    )


def test_a_plan_larger_than_the_cluster_says_by_how_much(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(make_node(cpus=2))
    answer = plan(service, spec | {"parallel": {"dp": 4}})
    assert (answer["world_size"], answer["fits"], answer["room"], len(answer["ranks"])) == (
        4,
        False,
        2,
        4,
    )
    assert answer["problems"][0]["pointer"] == "/parallel"
    assert "room for 2" in answer["problems"][0]["detail"]


def test_an_unknown_cluster_is_said_to_be_unknown(
    service: Any, spec: dict[str, Any]
) -> None:
    answer = plan(service, spec)
    assert (answer["world_size"], answer["fits"], answer["room"]) == (1, None, None)
    assert "has not been reported yet" in answer["notes"][0]
    assert "not checked" in answer["notes"][1]


def test_a_plan_says_which_kind_of_device_its_memory_assumes(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    spec["training"]["precision"] = "bf16"
    nobody_knows = plan(service, spec)
    assert any("memory is estimated for GPUs" in note for note in nobody_knows["notes"])
    service.agent.report(make_node(cpus=4))
    answer = plan(service, spec)
    assert answer["hardware"] == "CPU"
    assert "memory is estimated for CPUs with bf16 products" in answer["notes"][-1]
    spec["training"]["precision"] = "fp32"
    assert not any("memory is estimated" in note for note in plan(service, spec)["notes"])
    named = service.user.post("/v1/plans?hardware=h200", json=spec).json()
    assert not any("memory is estimated" in note for note in named["notes"])


def test_vocabularies(service: Any, spec: dict[str, Any]) -> None:
    assert (
        plan(service, spec | {"data": {**spec["data"], "tokenizer": {"kind": "bytes"}}})[
            "memory"
        ]["vocab_size"]
        == 257
    )
    file = spec | {
        "data": {**spec["data"], "tokenizer": {"kind": "file", "path": "/t.json"}}
    }
    answer = plan(service, file)
    assert answer["memory"] is None
    assert "set model.vocab_size" in answer["notes"][-1]
    assert (
        plan(service, file | {"model": {"preset": "gpt-tiny", "vocab_size": 99}})["memory"][
            "vocab_size"
        ]
        == 99
    )


def test_seventy_billion_parameters_are_planned_in_no_time(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(*(make_node(f"n{i}", cpus=96, gpus=8) for i in range(256)))
    training = {
        "seq_length": 8192,
        "micro_batch_size": 1,
        "global_batch_size": 1024,
        "steps": 10,
        "precision": "bf16",
    }
    answer = plan(
        service,
        spec
        | {
            "model": {"preset": "llama3-70b"},
            "parallel": {"tp": 8, "sequence_parallel": True},
            "training": training,
        },
    )
    assert answer["world_size"] == 2048
    assert answer["fits"]
    assert answer["ranks"][2047]["island"] == 255
    assert answer["memory"]["parameters_bytes"] == pytest.approx(2 * 70.55e9 / 8, rel=0.01)


def test_experts_are_shared_out_over_their_own_ranks(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(make_node(cpus=4))
    answer = plan(
        service, spec | {"model": {"preset": "moe-tiny"}, "parallel": {"dp": 4, "ep": 2}}
    )
    model = JobSpec.model_validate(answer["resolved_spec"]).model.model_copy(
        update={"vocab_size": 1024}
    )
    table = local_parameters(model, ParallelDims(dp=4, ep=2), 0)
    experts = sum(item.num_elements for item in table if item.of_expert)
    dense = sum(item.num_elements for item in table) - experts
    assert experts == 4 * 4 * 3 * 128 * 256
    # alignment and padding of buckets
    share = dense / 4 + experts / 2
    close = 2e-3
    assert answer["memory"]["parameters_bytes"] == pytest.approx(
        4 * (dense + experts), rel=close
    )
    assert answer["memory"]["optimizer_bytes"] == pytest.approx(8 * share, rel=close)
    memory = plan(
        service,
        spec | {"model": {"preset": "moe-tiny"}, "parallel": {"dp": 4, "ep": 2, "zero": 3}},
    )["memory"]
    kinds = [memory[f"{kind}_bytes"] for kind in ("parameters", "gradients", "optimizer")]
    assert kinds == pytest.approx([4 * share, 4 * share, 8 * share], rel=close)
    assert memory["gathered_bytes_estimate"] > 0


def test_a_grid_of_experts_that_the_cluster_has_no_room_for_is_planned_all_the_same(
    service: Any, spec: dict[str, Any]
) -> None:
    answer = plan(service, spec | {"model": {"preset": "moe-tiny"}, "parallel": {"ep": 4}})
    assert answer["world_size"] == 4


def test_recomputed_activations_need_less(service: Any, spec: dict[str, Any]) -> None:
    def activations(**recompute: Any) -> int:
        training = spec["training"] | {"recompute": recompute}
        estimate: int = plan(service, spec | {"training": training})["memory"][
            "activations_bytes_estimate"
        ]
        return estimate

    settings = [
        activations(),
        activations(granularity="selective", modules=["norm", "activation"]),
        activations(granularity="full", method="block", num_layers=3),
        activations(granularity="full", method="uniform", num_layers=1),
    ]
    assert settings == sorted(set(settings), reverse=True)


LARGE: dict[str, Any] = {
    "model": {"preset": "llama3-70b"},
    "training": {
        "seq_length": 8192,
        "micro_batch_size": 1,
        "global_batch_size": 1024,
        "steps": 10,
        "precision": "bf16",
    },
}


def test_time_is_estimated_for_the_clusters_gpus_or_for_those_asked_for(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    request = spec | LARGE | {"parallel": {"tp": 8, "pp": 4, "sequence_parallel": True}}
    answer = service.user.post("/v1/plans?hardware=h200", json=request).json()
    assert answer["hardware"] == "H200"
    assert answer["world_size"] == 32
    assert answer["fits"] is None
    parts = (
        "products_s",
        "attention_s",
        "memory_s",
        "communication_s",
        "bubble_s",
        "update_s",
    )
    assert sum(answer["time"][part] for part in parts) == pytest.approx(
        answer["time"]["step_s"]
    )
    assert 0.2 < answer["time"]["mfu"] < 0.7
    assert 0 < answer["bubble_share"] < 0.02
    assert plan(service, request)["hardware"] is None
    assert "set hardware" in plan(service, request)["notes"][-1]
    service.agent.report(
        *(make_node(f"n{i}", cpus=96, gpus=8, accelerator_type="H100") for i in range(8))
    )
    assert plan(service, request)["hardware"] == "H100"
    assert plan(service, request)["time"]["step_s"] > 0
    wrong = service.user.post("/v1/plans?hardware=abacus", json=request)
    assert wrong.status_code == 422
    assert "known: A100, H100, H200, B200, CPU" in wrong.json()["errors"][0]["detail"]


def test_what_cannot_fit_into_the_gpus_is_refused_with_the_nearest_layout_that_does(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(
        *(make_node(f"n{i}", cpus=96, gpus=8, accelerator_type="H100") for i in range(8))
    )
    request = spec | LARGE | {"parallel": {"tp": 8, "dp": 8, "sequence_parallel": True}}
    answer = plan(service, request)
    (problem,) = answer["problems"]
    assert answer["fits"] is False
    assert (problem["pointer"], problem["code"]) == (
        "/parallel",
        "memory_fits",
    )
    assert "rank 0 needs" in problem["detail"]
    assert "activations" in problem["detail"]
    assert "H100 has 80" in problem["detail"]
    assert "the nearest layout that fits is tp=8" in problem["detail"]
    refused = service.user.post("/v1/jobs", json=request)
    assert refused.status_code == 422
    assert refused.json()["errors"] == answer["problems"]
    assert (
        service.user.post("/v1/plans?hardware=B200", json=request).json()["problems"] == []
    )
    (problem,) = plan(
        service, request | {"training": request["training"] | {"precision": "fp32"}}
    )["problems"]
    assert "no layouts are compared for fp32 on H100" in problem["detail"]
    assert service.user.get("/v1/jobs").json()["data"] == []


def test_search_for_a_layout_that_fits_keeps_nobody_from_writing(
    service: Any, spec: dict[str, Any], make_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = service.submit(spec | LARGE | {"parallel": {"tp": 8, "dp": 8}})
    others = []

    def searching(*given: Any) -> Any:
        with ThreadPoolExecutor() as threads:  # would wait for the lock for ever
            others.append(threads.submit(service.submit).result(timeout=10))
        return nearest(*given)

    monkeypatch.setattr(planning, "nearest", searching)
    nodes = [
        make_node(f"n{index}", cpus=96, gpus=8, accelerator_type="H100")
        for index in range(8)
    ]
    service.agent.report(*nodes)
    failed = service.job(large["id"])
    assert failed["status"] == "failed"
    assert "the nearest layout that fits is" in failed["problem"]["detail"]
    (other,) = others
    assert service.job(other["id"])["status_reason"] == "waiting_agent", (
        "came too late for this report"
    )
    service.agent.report(*nodes)
    assert service.job(other["id"])["status_reason"] == "preparing_data"


def test_gpus_of_an_unknown_kind_refuse_nothing(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(
        *(make_node(f"n{i}", cpus=96, gpus=8, accelerator_type="G9") for i in range(8))
    )
    assert (
        plan(
            service,
            spec | LARGE | {"parallel": {"tp": 8, "dp": 8, "sequence_parallel": True}},
        )["fits"]
        is True
    )


def test_the_quickest_layouts_that_fit_are_suggested(
    service: Any, spec: dict[str, Any]
) -> None:
    small = (
        spec
        | LARGE
        | {
            "model": {"preset": "llama3-8b"},
            "training": LARGE["training"] | {"global_batch_size": 32},
        }
    )
    response = service.user.post("/v1/plans/suggest?hardware=H100&ranks=16", json=small)
    answer = response.json()
    assert response.status_code == 200
    assert (
        answer["world_size"],
        answer["hardware"],
        answer["notes"],
    ) == (16, "H100", [])
    steps = [entry["time"]["step_s"] for entry in answer["data"]]
    assert steps == sorted(steps)
    assert len(steps) == 10
    for entry in answer["data"]:
        changes = entry["changes"]
        assert (
            changes["parallel.tp"]
            * changes["parallel.pp"]
            * changes["parallel.cp"]
            * changes["parallel.dp"]
            == 16
        )
        assert entry["total_bytes_estimate"] <= 80 * 2**30
    few = service.user.post(
        "/v1/plans/suggest?hardware=H100&ranks=2", json=spec | LARGE
    ).json()
    assert few["data"] == []
    assert "no layout that was tried fits on 2 ranks" in few["notes"][0]
    assert (
        service.user.post("/v1/plans/suggest", json=spec | LARGE).json()["errors"][0][
            "pointer"
        ]
        == "/query/hardware"
    )


def test_a_plan_for_other_devices_does_not_ask_the_cluster_for_room(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(make_node(cpus=2))
    request = spec | LARGE | {"parallel": {"tp": 8, "pp": 4, "sequence_parallel": True}}
    response = service.user.post("/v1/plans?hardware=H100&ranks=64", json=request)
    answer = response.json()
    assert (answer["world_size"], answer["problems"]) == (64, [])
    assert (answer["fits"], answer["room"]) == (None, None)
    assert answer["resolved_spec"]["resources"]["accelerator"] == "gpu"
    assert answer["time"]["step_s"] > 0
    assert "the cluster was not looked at" in answer["notes"]
    wrong = service.user.post("/v1/plans?hardware=H100&ranks=16", json=request)
    assert wrong.status_code == 422
    assert "= 32 ranks, but there is room for 16" in wrong.json()["errors"][0]["detail"]


def test_numbers_without_effect_are_in_the_plan_and_in_the_jobs_history(
    service: Any, spec: dict[str, Any]
) -> None:
    request = spec | {"schedule": {"warmup_steps": 100}}
    words = "/schedule/warmup_steps: warmup_steps=100 is not shorter than training.steps=20"
    assert any(words in note for note in plan(service, request)["notes"])
    job = service.submit(request)
    events = service.user.get(
        f"/v1/jobs/{job['id']}/events?level=warn&type=spec.warning"
    ).json()["data"]
    assert [event["type"] for event in events] == ["spec.warning"]
    assert events[0]["message"].startswith(words)


def test_a_model_that_cannot_be_exported_is_noted_before_it_is_trained(
    service: Any, spec: dict[str, Any]
) -> None:
    request = spec | {"model": {"preset": "gpt-tiny", "position_embedding": "none"}}
    words = (
        "/model/position_embedding: checkpoints cannot be exported in Hugging Face's format: "
        "model.position_embedding='none' cannot be expressed in the config.json of llama"
    )
    assert any(words in note for note in plan(service, request)["notes"])
    response = service.user.post("/v1/plans?hardware=CPU", json=request)
    assert any(words in note for note in response.json()["notes"])
    offline = offline_plan.make_plan(request, None, None)
    assert any(words in note for note in offline["notes"])
    job = service.submit(request)
    events = service.user.get(
        f"/v1/jobs/{job['id']}/events?level=warn&type=spec.warning"
    ).json()["data"]
    assert [event["type"] for event in events] == ["spec.warning"]
    assert events[0]["message"].startswith(words)
    assert not any("exported" in note for note in plan(service, spec)["notes"])


def test_a_plan_shows_what_groups_of_parameters_set(
    service: Any, spec: dict[str, Any]
) -> None:
    groups = [{"parameters": ["embedding.*", "head.*"], "weight_decay": 0}]
    request = spec | {"optimizer": {"lr": 1e-3, "weight_decay": 0.1, "groups": groups}}
    notes = plan(service, request)["notes"]
    assert "optimizer.groups[0] sets weight_decay=0 for 2 of 39 trained tensors" in notes


def test_a_job_whose_paths_were_not_checked_tells_so(
    service: Any, settings: Settings, start: Any, make_node: Any
) -> None:
    def created(running: Any) -> tuple[str, str]:
        running.agent.report(make_node("n1"))
        (event,) = running.user.get(
            f"/v1/jobs/{running.submit()['id']}/events?type=job.created"
        ).json()["data"]
        return event["level"], event["message"]

    level, message = created(service)
    assert level == "warn"
    assert "created; its paths were not checked, because the agent of cluster" in message
    service.stop()
    patient = start(settings.model_copy(update={"check_wait_s": 10.0}))
    with patient.agent as agent:
        agent.answer_checks()
        assert created(patient) == ("info", "job 'tiny' created")

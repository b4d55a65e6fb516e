"""What cannot be recorded is refused with the place where the host does it, and a remedy
that is legal.
"""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation import check
from tests.support.installed_callback import install

EXPERTS = {"num_experts": 4, "top_k": 2}
GRAPH: dict[str, Any] = {"cuda_graph": {}}


def config(*, graph: bool = True, **groups: dict[str, Any]) -> TrainConfig:
    training = {"seq_length": 256, "global_batch_size": 16, "steps": 10}
    return TrainConfig.from_mapping(
        {
            "model": {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
            | groups.get("model", {}),
            "parallel": groups.get("parallel", {}),
            "training": training | groups.get("training", {}) | (GRAPH if graph else {}),
            "data": {"train": [{"path": "builtin://python-stdlib"}]}
            | groups.get("data", {}),
            "callbacks": groups.get("callbacks", {}),
            "optimizer": {"lr": 1e-3},
        }
    )


OUT = "leave training.cuda_graph out"
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {
            "training": {
                "rampup_batch_size": {"start": 4, "increment": 4, "samples": 80},
            }
        },
        "/training/rampup_batch_size",
        "training.cuda_graph replays one number of microbatches, and steps grow from 4 to 16 "
        f"samples; leave rampup_batch_size out, or {OUT}",
    ),
    (
        {"data": {"separate_documents": True}},
        "/data/separate_documents",
        "training.cuda_graph replays kernels of fixed sizes, and the host reads the lengths of "
        "documents in every step (Packed.lengths in models/batch.py); set separate_documents "
        f"to false, or {OUT}",
    ),
    (
        {"parallel": {"pp": 2}},
        "/parallel/pp",
        "training.cuda_graph needs pp=1, not 2: the host asks which sends are complete "
        f"(pipeline_parallel/runner.py); use pp=1, or {OUT}",
    ),
    (
        {"parallel": {"zero": 3}},
        "/parallel/zero",
        "training.cuda_graph does not record zero=3: torch's fully_shard allocates and frees "
        "gathered weights on the host (data_parallel/full_shard.py); use zero=1, or " + OUT,
    ),
    (
        {"parallel": {"overlap_param_gather": True}},
        "/parallel/overlap_param_gather",
        "training.cuda_graph cannot wait for weights whose gathers have started before a "
        "replay, as overlap_param_gather does layer by layer "
        f"(data_parallel/weight_gathers.py); leave overlap_param_gather out, or {OUT}",
    ),
    (
        {
            "model": {"moe": EXPERTS | {"capacity_factor": 1.25, "pad_to_capacity": True}},
            "parallel": {"dp": 2, "ep": 2, "ep_comm_overlap": True},
        },
        "/parallel/ep_comm_overlap",
        "training.cuda_graph records the passes of one thread, and ep_comm_overlap runs two "
        "at once, each on its own (distributed/interleaver.py); leave ep_comm_overlap out, "
        f"or {OUT}",
    ),
    (
        {"model": {"spec": "transformer_engine"}, "training": {"precision": "bf16"}},
        "/model/spec",
        "training.cuda_graph does not record spec=transformer_engine, which keeps state of "
        "its passes on the host (parallelize/transformer_engine); set model.spec to local, or "
        + OUT,
    ),
    (
        {"model": {"moe": EXPERTS}},
        "/model/moe/pad_to_capacity",
        "training.cuda_graph needs experts of fixed sizes, and without capacity_factor the "
        "host reads the rows of each expert (expert_parallel/dispatch.py); give "
        f"capacity_factor and set pad_to_capacity to true, or {OUT}",
    ),
    (
        {"model": {"moe": EXPERTS | {"capacity_factor": 1.25}}},
        "/model/moe/pad_to_capacity",
        "training.cuda_graph needs experts of fixed sizes, and with capacity_factor=1.25 "
        "alone the host reads the rows of each expert (expert_parallel/dispatch.py); set "
        f"pad_to_capacity to true, or {OUT}",
    ),
    (
        {"model": {"hidden_dropout": 0.1}},
        "/model/hidden_dropout",
        "training.cuda_graph would drop the same elements in every step: the host seeds the "
        f"masks of hidden_dropout=0.1 by sample (models/dropout.py); use 0, or {OUT}",
    ),
    (
        {"model": {"attention_dropout": 0.2}},
        "/model/attention_dropout",
        "training.cuda_graph would drop the same elements in every step: the host seeds the "
        f"masks of attention_dropout=0.2 by sample (models/dropout.py); use 0, or {OUT}",
    ),
    (
        {"callbacks": {"activations": {}}},
        "/callbacks/activations",
        "training.cuda_graph runs no hooks in the steps that it replays, and activations "
        "measures in hooks (training/callbacks/activation_monitor.py); leave activations out, "
        f"or {OUT}",
    ),
    (
        {"callbacks": {"installed": {"growth": {}}}},
        "/callbacks/installed/growth",
        "training.cuda_graph runs no hooks in the steps that it replays, and callback growth "
        "may register some (begin_step in training/callbacks/protocol.py); leave it out, or "
        + OUT,
    ),
]


@pytest.mark.parametrize(
    ("groups", "pointer", "detail"), REFUSED, ids=[pointer for _, pointer, _ in REFUSED]
)
def test_a_combination_is_refused_with_place_and_remedy(
    groups: dict[str, Any], pointer: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    (problem,) = check.find_problems(config(**groups))
    assert (problem.pointer, problem.code) == (pointer, "cuda_graph")
    assert problem.detail == detail
    assert not check.find_problems(config(graph=False, **groups))


@pytest.mark.parametrize(
    "groups",
    [
        {"training": {"precision": "fp16"}},
        {"training": {"precision": "bf16", "fp8": {"recipe": "delayed"}}},
        {"training": {"compile": "blocks"}},
        {
            "training": {
                "recompute": {"granularity": "full", "method": "uniform", "num_layers": 1}
            }
        },
        {
            "training": {
                "rules": [
                    {"when": "not_finite", "action": "stop", "before_reduction": True}
                ]
            }
        },
        {"parallel": {"tp": 2, "sequence_parallel": True, "tp_comm_overlap": True}},
        {"parallel": {"cp": 2, "dp": 2, "zero": 0}},
        {"model": {"moe": EXPERTS | {"capacity_factor": 1.0, "pad_to_capacity": True}}},
        {"callbacks": {"optimizer": {}, "unigram": {}}},
    ],
    ids=str,
)
def test_what_stays_on_the_device_is_recorded(groups: dict[str, Any]) -> None:
    assert check.find_problems(config(**groups)) == []


def test_a_run_without_replays_is_noted() -> None:
    (warning,) = check.find_warnings(config(training={"steps": 3}))
    assert warning.pointer == "/training/cuda_graph/warmup_steps"
    assert warning.detail == (
        "warmup_steps=3 is not below training.steps=3, so no step is replayed; lower it"
    )
    assert check.find_warnings(config(training={"steps": 4})) == []

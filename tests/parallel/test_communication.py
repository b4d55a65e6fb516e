"""What a plan gives for a rank's sending is what it does send: one whole step of a rank
among 4,096, every collective written down.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from torch import Tensor

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.planning.communication import step_communication, sync_communication
from megatron_ray.validation import check, resolution
from tests.parallel.test_meta_step import step
from tests.support.layout_matrix import EXPERTS
from tests.support.parity import GPT2, LLAMA

RANK = 17
RANKS = 4096
LAST = RANKS - 1
SHAPE = LLAMA | {
    "num_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "ffn_hidden_size": 128,
    "head_dim": 8,
}
MOE = SHAPE | {
    "moe": EXPERTS | {"num_experts": 16, "capacity_factor": 1.0, "pad_to_capacity": True}
}
LATENT: dict[str, Any] = {
    name: value
    for name, value in SHAPE.items()
    if name not in ("num_query_groups", "head_dim")
}
LATENT["mla"] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
DIRECT = LATENT | {"mla": LATENT["mla"] | {"q_lora_rank": None}}
MTP = {"mtp": {"num_layers": 2}}
DEEPSEEK = LATENT | {
    "mtp": {"num_layers": 1},
    "moe": MOE["moe"]
    | {
        "score_function": "sigmoid",
        "expert_bias": True,
        "num_groups": 4,
        "group_top_k": 2,
        "shared_expert_ffn_hidden_size": 32,
        "aux_loss": "seq_aux_loss",
        "layer_pattern": [0, *[1] * 7],
    },
}
FULL = {"granularity": "full", "method": "uniform", "num_layers": 2}
OPERATIONS = {"granularity": "operations"}
CORE = {"granularity": "selective", "modules": ("core_attention", "mlp")}
Sent = Counter[tuple[Group, str]]

WIDE_LATENTS = DEEPSEEK | {
    "hidden_size": 128,
    "mla": {
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    "moe": DEEPSEEK["moe"] | {"ffn_hidden_size": 64, "shared_expert_ffn_hidden_size": 64},
}
"""Sizes that FP8 multiplies."""
IN_MOST_DIRECTIONS = {"tp": 4, "sequence_parallel": True, "ep": 8, "etp": 2, "pp": 2}
FP8_CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("current", "tp", SHAPE | {"head_dim": 16}, {"tp": 8, "sequence_parallel": True}, {}),
    ("current", "mlp recomputed", SHAPE | {"head_dim": 16}, {"tp": 4}, {"recompute": CORE}),
    ("current", "deepseek", WIDE_LATENTS, IN_MOST_DIRECTIONS, {"recompute": FULL}),
    (
        "current",
        "deepseek with saved outputs",
        WIDE_LATENTS,
        IN_MOST_DIRECTIONS,
        {"recompute": OPERATIONS},
    ),
    (
        "current",
        "saved attention",
        SHAPE | {"head_dim": 16},
        {"tp": 4},
        {"recompute": OPERATIONS | {"save": ("attention",)}},
    ),
    ("delayed", "deepseek", WIDE_LATENTS, IN_MOST_DIRECTIONS, {}),
    ("mxfp8", "tp", SHAPE | {"head_dim": 32}, {"tp": 4}, {}),
]
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("tp with sequence parallelism", SHAPE, {"tp": 8, "sequence_parallel": True}, {}),
    (
        "tp overlapped",
        SHAPE | {"tie_embeddings": True},
        {"tp": 8, "sequence_parallel": True, "tp_comm_overlap": True},
        {},
    ),
    (
        "tp overlapped, layers recomputed",
        LATENT | MTP,
        {"tp": 4, "sequence_parallel": True, "tp_comm_overlap": True, "pp": 2},
        {"recompute": FULL},
    ),
    (
        "tp overlapped, zero bubble in a V",
        DEEPSEEK,
        {
            "tp": 2,
            "sequence_parallel": True,
            "tp_comm_overlap": True,
            "ep": 2,
            "pp": 4,
            "vpp": 2,
            "schedule": "zb-v",
        },
        {},
    ),
    (
        "tp overlapped, every second product saved",
        MOE,
        {"tp": 4, "sequence_parallel": True, "tp_comm_overlap": True, "ep": 4, "etp": 2},
        {"recompute": OPERATIONS},
    ),
    (
        "tokens of experts overlapped",
        MOE,
        {"dp": 4, "ep": 4, "pp": 2, "ep_comm_overlap": True},
        {},
    ),
    ("tp overlapped on one rank", SHAPE, {"tp_comm_overlap": True, "cp": 2}, {}),
    ("tp without, nothing sharded", SHAPE, {"tp": 8, "zero": 0}, {}),
    (
        "more tp ranks than key/value heads",
        SHAPE,
        {"tp": 16, "sequence_parallel": True, "bucket_elements": 5000},
        {},
    ),
    ("1f1b", SHAPE, {"tp": 2, "sequence_parallel": True, "pp": 4}, {}),
    (
        "interleaved, tied embeddings",
        GPT2 | {"num_layers": 8, "num_attention_heads": 8, "max_sequence_length": 128},
        {"tp": 4, "pp": 4, "vpp": 2},
        {},
    ),
    (
        "short gradients, wide residuals, shared heads and embeddings",
        SHAPE | {"tie_embeddings": True},
        {"tp": 8, "sequence_parallel": True, "pp": 2},
        {
            "grad_reduce_in_fp32": False,
            "fp32_residual_connection": True,
            "precision": "fp16",
        },
    ),
    (
        "zero bubble in a V",
        SHAPE | {"num_layers": 8},
        {"pp": 4, "vpp": 2, "schedule": "zb-v"},
        {},
    ),
    (
        "own gradients checked",
        SHAPE,
        {"tp": 2, "pp": 2},
        {"rules": [{"when": "not_finite", "action": "stop", "before_reduction": True}]},
    ),
    ("ring", SHAPE, {"tp": 2, "sequence_parallel": True, "cp": 8}, {}),
    ("ring recomputed", SHAPE, {"cp": 4}, {"recompute": {"granularity": "selective"}}),
    ("gathered keys", SHAPE, {"cp": 4, "cp_method": "all_gather"}, {}),
    ("heads exchanged", SHAPE, {"cp": 4, "cp_method": "a2a"}, {"precision": "fp32"}),
    (
        "heads exchanged in a ring",
        SHAPE,
        {"cp": 8, "cp_method": "a2a+p2p", "hierarchical_cp_sizes": (4, 2)},
        {},
    ),
    (
        "layers recomputed",
        SHAPE,
        {"tp": 4, "sequence_parallel": True, "pp": 2},
        {"recompute": FULL},
    ),
    (
        "mlp recomputed",
        SHAPE,
        {"tp": 4},
        {"recompute": {"granularity": "selective", "modules": ("mlp", "norm")}},
    ),
    (
        "every second product saved",
        SHAPE | {"peri_norm": True},
        {"tp": 4, "sequence_parallel": True, "cp": 2},
        {"recompute": OPERATIONS},
    ),
    (
        "attention saved between exchanges of heads",
        SHAPE,
        {"tp": 2, "cp": 4, "cp_method": "a2a"},
        {"recompute": OPERATIONS | {"save": ("attention",)}, "precision": "fp32"},
    ),
    (
        "products saved, experts exchanged again",
        DEEPSEEK,
        {"tp": 4, "sequence_parallel": True, "ep": 2, "etp": 2, "pp": 2, "cp": 2},
        {"recompute": OPERATIONS | {"save": ("products",), "every": 1}},
    ),
    (
        "exchanges of experts saved",
        MOE | {"moe": MOE["moe"] | {"shared_expert_ffn_hidden_size": 32}},
        {"tp": 2, "sequence_parallel": True, "ep": 4, "etp": 2, "cp": 2},
        {"recompute": OPERATIONS | {"save": ("all_to_all", "reduce_scatter")}},
    ),
    (
        "products saved, experts gathered again",
        MOE,
        {"tp": 2, "sequence_parallel": True, "ep": 4, "etp": 2, "dispatcher": "allgather"},
        {"recompute": OPERATIONS | {"every": 3}},
    ),
    ("experts", MOE, {"ep": 8}, {}),
    (
        "experts in all directions",
        MOE,
        {"tp": 4, "sequence_parallel": True, "ep": 4, "etp": 2, "pp": 2, "cp": 2},
        {},
    ),
    (
        "experts, everything gathered",
        MOE,
        {"tp": 2, "sequence_parallel": True, "ep": 4, "etp": 2, "dispatcher": "allgather"},
        {},
    ),
    (
        "experts recomputed",
        MOE,
        {"tp": 2, "sequence_parallel": True, "ep": 4, "pp": 2},
        {"recompute": FULL},
    ),
    (
        "shared and biased experts",
        MOE
        | {
            "moe": MOE["moe"]
            | {
                "shared_expert_ffn_hidden_size": 32,
                "score_function": "sigmoid",
                "expert_bias": True,
            }
        },
        {"tp": 2, "sequence_parallel": True, "ep": 4, "cp": 2},
        {"recompute": {"granularity": "selective", "modules": ("moe",)}},
    ),
    (
        "latent attention, tp with sequence parallelism",
        LATENT,
        {"tp": 8, "sequence_parallel": True},
        {},
    ),
    ("latent attention, tp without", LATENT, {"tp": 8}, {}),
    (
        "latent attention with direct queries",
        DIRECT,
        {"tp": 4, "sequence_parallel": True, "zero": 0},
        {},
    ),
    (
        "latent attention in a ring",
        LATENT,
        {"tp": 2, "sequence_parallel": True, "cp": 4},
        {},
    ),
    (
        "latent attention, heads exchanged",
        LATENT | MTP,
        {"tp": 2, "cp": 4, "cp_method": "a2a"},
        {"precision": "fp32"},
    ),
    (
        "latent attention, gathered keys",
        LATENT | MTP,
        {"cp": 4, "cp_method": "all_gather"},
        {"recompute": CORE},
    ),
    ("mtp", SHAPE | MTP, {"tp": 4, "sequence_parallel": True}, {}),
    (
        "mtp in a pipeline",
        SHAPE | MTP,
        {"tp": 2, "pp": 4, "layout": "Ett|tt|ttt|tmmL"},
        {},
    ),
    (
        "mtp, tied embeddings",
        SHAPE | MTP | {"tie_embeddings": True},
        {"pp": 2, "vpp": 2, "bucket_elements": 5000},
        {},
    ),
    (
        "mtp in a V",
        LATENT | MTP,
        {"tp": 2, "pp": 4, "vpp": 2, "schedule": "zb-v"},
        {},
    ),
    (
        "mtp recomputed",
        LATENT | MTP,
        {"tp": 4, "sequence_parallel": True, "pp": 2},
        {"recompute": FULL},
    ),
    (
        "deepseek",
        DEEPSEEK,
        {"tp": 2, "sequence_parallel": True, "ep": 8, "pp": 4, "layout": "Ett|ttt|tt|tmL"},
        {},
    ),
    (
        "deepseek in all directions",
        DEEPSEEK,
        {"tp": 4, "sequence_parallel": True, "ep": 2, "etp": 2, "pp": 2, "cp": 2},
        {"recompute": FULL},
    ),
    *[
        (f"fp8 {recipe}, {name}", shape, parallel, training | {"fp8": {"recipe": recipe}})
        for recipe, name, shape, parallel, training in FP8_CASES
    ],
]


def make(
    shape: dict[str, Any], parallel: dict[str, Any], training: dict[str, Any]
) -> TrainConfig:
    dp = RANKS // (parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1))
    batch = {
        "seq_length": 128,
        "micro_batch_size": 1,
        "global_batch_size": 2 * dp,
        "steps": 1,
        "precision": "bf16",
    }
    # Fewer layers are as good where no pipeline splits them, and take less time.
    if "pp" not in parallel:
        shape = shape | {"num_layers": 2}
    fields = {
        "model": shape,
        "parallel": parallel | {"dp": dp},
        "data": {"train": [{"path": "unused"}], "tokenizer": {"kind": "bytes"}},
        "training": batch | training,
        "optimizer": {"lr": 1e-3},
    }
    config = resolution.with_vocabulary(TrainConfig.from_mapping(fields), 257)
    assert check.find_problems(config, RANKS) == []
    return config


def recording(sent: Sent) -> Callable[[ParallelMesh], AbstractContextManager[None]]:
    """Writes down what this rank hands to the functions through which everything goes."""

    @contextmanager
    def during(_: ParallelMesh) -> Iterator[None]:
        # name: (kind, which argument is sent, which is the group)
        watched = {
            "start_all_reduce": ("all_reduce", 0, 1),
            "start_all_gather_into": ("all_gather", 1, 2),
            "start_reduce_scatter_into": ("reduce_scatter", 1, 2),
            "start_send": ("send", 0, 2),
            "start_exchange": ("send", 0, 4),
            "start_all_to_all_rows": ("all_to_all", 0, 1),
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, (kind, content, place) in watched.items():
                patch.setattr(
                    collectives,
                    name,
                    _noting(sent, getattr(collectives, name), kind, content, place),
                )
            yield

    return during


def _noting(
    sent: Sent, plain: Callable[..., Any], kind: str, content: int, place: int
) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        tensor = given[content]
        group = given[place]
        assert isinstance(tensor, Tensor)
        if group is not None:
            sent[group, kind] += tensor.numel() * tensor.element_size()
        return plain(*given)

    return call


LAST_STAGES = ("1f1b", "mtp in a pipeline", "zero bubble in a V", "deepseek")
"""Cases whose last rank, on another stage, is looked at in every check."""


def runs() -> list[Any]:
    """(config's parts, rank) of every case, and of the last stage of a pipeline."""
    params = []
    for name, *parts in CASES:
        params.append(pytest.param(parts, RANK, id=f"{name}, rank {RANK}"))
        if parts[1].get("pp"):
            marks = [] if name in LAST_STAGES else [pytest.mark.parity]
            params.append(pytest.param(parts, LAST, id=f"{name}, rank {LAST}", marks=marks))
    return params


@pytest.mark.parametrize(("parts", "rank"), runs())
def test_bytes_per_axis_and_kind_are_those_of_the_plan(
    parts: list[dict[str, Any]], rank: int
) -> None:
    assert_planned(make(*parts), rank)


@pytest.mark.parametrize(
    "case", ["more tp ranks than key/value heads", "deepseek in all directions"]
)
def test_bytes_of_whole_matrices_are_those_of_the_plan(case: str) -> None:
    (parts,) = [parts for name, *parts in CASES if name == case]
    fields = make(*parts).model_dump() | {"optimizer": {"name": "muon", "lr": 0.1}}
    assert_planned(TrainConfig.from_mapping(fields), RANK)


GROUPS: dict[str, Any] = {
    "groups": 4,
    "sync_every": 6,
    "sync_moments_every": {"exp_avg": 2, "exp_avg_sq": 5},
    "fragments": 2,
}


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize(
    ("shape", "parallel"),
    [
        (SHAPE | {"tie_embeddings": True}, {"tp": 4, "pp": 4, "bucket_elements": 5000}),
        (MOE, {"tp": 2, "sequence_parallel": True, "ep": 4, "etp": 1}),
        (SHAPE, {"zero": 0, "cp": 2}),
    ],
    ids=["pipeline", "experts", "zero 0"],
)
def test_bytes_between_replica_groups_are_those_of_the_plan(
    shape: dict[str, Any], parallel: dict[str, Any], number: int
) -> None:
    """Step 8 is the last one."""
    config = make(shape, parallel | {"local_sgd": GROUPS}, {"steps": 8})
    assert_planned(config, RANK, number)


def test_moments_of_matrices_are_averaged_as_planned() -> None:
    every = {"exp_avg": 2, "momentum_buffer": 3}
    groups = GROUPS | {"sync_moments_every": every, "fragments": 1}
    fields = make(SHAPE, {"local_sgd": GROUPS}, {"steps": 8}).model_dump()
    fields["optimizer"] = {"name": "muon", "lr": 0.1}
    fields["parallel"]["local_sgd"] = groups
    assert_planned(TrainConfig.from_mapping(fields), RANK, 6)


def test_groups_of_replicas_send_at_most_a_sixteenth_of_plain_data_parallelism() -> None:
    """Weights every 32 steps, moments less often; counted over the longest period."""
    every = {"exp_avg": 64, "exp_avg_sq": 128}
    plain = make(SHAPE, {"tp": 2}, {"steps": 1000, "precision": "fp32"})
    fields = plain.model_dump()
    fields["parallel"]["local_sgd"] = {
        "groups": plain.parallel.dp,
        "sync_every": 32,
        "sync_moments_every": every,
    }
    config = TrainConfig.from_mapping(fields)
    assert check.find_problems(config, RANKS) == []
    of_groups = 0
    for number in range(1, 129):
        for tally in (
            step_communication(config, RANK),
            sync_communication(config, RANK, number),
        ):
            assert tally is not None
            assert ("dp", "reduce_scatter") not in tally.bytes
            of_groups += tally.bytes.get(("sync", "all_reduce"), 0)
    tally = step_communication(plain, RANK)
    assert tally is not None
    # An all-reduce is a reduce-scatter and an all-gather of as many bytes. Here buckets are
    # padded a lot for so many replicas, so the weights themselves are compared too.
    assert of_groups / 128 <= tally.bytes["dp", "reduce_scatter"] / 16
    weights = sync_communication(config, RANK, 32).bytes["sync", "all_reduce"]
    assert of_groups / 128 <= weights / 16
    assert 128 * weights / of_groups == pytest.approx(18.3, abs=0.2), "1/32 + 1/64 + 1/128"


def assert_planned(config: TrainConfig, rank: int, number: int | None = None) -> None:
    """What a step of the rank sends is what the plan has."""
    sent = Sent()
    meshes = list[ParallelMesh]()

    def around(mesh: ParallelMesh) -> AbstractContextManager[None]:
        meshes.append(mesh)
        return recording(sent)(mesh)

    step(config, rank, "meta", around, number)
    mesh = meshes[0]
    planned = step_communication(config, rank)
    assert planned is not None
    planned.add_all(sync_communication(config, rank, number or 1))
    groups = {
        "tp": mesh.tp_group,
        "cp": mesh.cp_group,
        "pp": mesh.pp_group,
        "dp": mesh.replica_group,
        "ep": mesh.ep_group,
        "etp": mesh.etp_group,
        "edp": mesh.expert_replica_group,
        "embedding": mesh.embedding_group,
        "tokens": mesh.token_group,
        "world": mesh.step_group,
        "sync": mesh.sync_group,
    }
    within = dict.fromkeys(mesh.cp_levels, mesh.cp_group) | {
        mesh.dp_group: mesh.replica_group
    }  # parts of an axis are that axis
    sent_bytes = Sent()
    expected = Sent()
    for (group, kind), size in sent.items():
        sent_bytes[group if group in groups.values() else within[group], kind] += size
    for (axis, kind), size in planned.bytes.items():
        expected[groups[axis], kind] += size
    names = {group: axis for axis, group in groups.items()}

    def by_name(sizes: Sent) -> dict[tuple[str, str], int]:
        return {(names[group], kind): size for (group, kind), size in sizes.items() if size}

    assert by_name(sent_bytes) == by_name(expected)


def test_what_torch_sends_is_not_counted() -> None:
    assert step_communication(make(SHAPE, {"zero": 3}, {}), RANK) is None

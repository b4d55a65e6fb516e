"""Which weights are matrices, which are one together, and which replica updates them."""

from typing import Any

import pytest

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.optimizer import MuonConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding import matrices as module
from megatron_ray.sharding.buckets import plan_buckets
from megatron_ray.sharding.matrices import (
    OwnedMatrix,
    Round,
    matrices_of,
    rounds_of_buckets,
    rounds_of_rows,
    tp_owners,
)
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import freeze, local_parameters, logical_parameters

MUON = MuonConfig()


def model(**fields: Any) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 300, **fields})


GPT2 = model(preset="gpt2-tiny")
DEEPSEEK = model(preset="deepseek-tiny", mtp={"num_layers": 1})


def table(config: ModelConfig, tp: int = 1) -> tuple[LocalParameter, ...]:
    return local_parameters(config, ParallelDims(tp=tp), 0)


def names(config: ModelConfig, muon: MuonConfig = MUON, tp: int = 1) -> list[str]:
    listed = []
    for tensor in table(config, tp):
        for matrix in matrices_of(tensor, muon):
            parts = [part.logical.name.removesuffix(".weight") for part in matrix.parts]
            listed.append("+".join(parts))
    return listed


@pytest.mark.parametrize("config", [GPT2, DEEPSEEK])
def test_matrices_are_the_weights_of_linear_layers(config: ModelConfig) -> None:
    expected = []
    for parameter in logical_parameters(config):
        name = parameter.name.removesuffix(".weight")
        if len(parameter.shape) == 2 and not name.endswith(("embedding", "head")):
            expected.append(name)
    assert names(config) == expected
    assert names(config, tp=2) == expected


def test_fused_weights_may_be_one_matrix() -> None:
    llama = model(preset="gpt-tiny")
    joined = names(llama, MuonConfig(split_qkv=False, split_gate_up=False))
    layer = "layers.0.attention."
    assert f"{layer}q+{layer}k+{layer}v" in joined
    assert "layers.0.mlp.gate+layers.0.mlp.up" in joined
    assert f"{layer}o" in joined
    split = names(llama, MuonConfig(split_qkv=False))
    assert "layers.0.mlp.gate" in split
    # Gate and up of each expert by itself.
    experts = names(DEEPSEEK, MuonConfig(split_gate_up=False))
    of_first = [name for name in experts if ".experts.0.gate" in name]
    assert of_first
    for name in of_first:
        prefix = name.partition("gate")[0]
        assert name == f"{prefix}gate+{prefix}up"


def test_what_is_frozen_is_no_matrix() -> None:
    for tensor in freeze(table(GPT2), ["*"]):
        assert matrices_of(tensor, MUON) == ()


def covered(rounds: tuple[Round, ...]) -> list[OwnedMatrix]:
    """All matrices, of which every element has exactly one replica."""
    listed = [owned for round_ in rounds for owned in round_]
    for owned in listed:
        position = 0
        for share in owned.shares():
            assert share.start == position
            assert share == owned.share_of(share.replica)
            position = share.end
        assert position == owned.matrix.num_elements
    return listed


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket_elements", [1, 20_000, None])
def test_shares_are_those_of_the_buckets(replicas: int, bucket_elements: Any) -> None:
    plan = plan_buckets(table(GPT2, tp=2), replicas, bucket_elements)
    listed = covered(rounds_of_buckets(plan, MUON, replicas))
    assert len(listed) == len(names(GPT2))
    for owned in listed:
        if owned.first_replica == owned.last_replica:
            assert owned.owner == owned.first_replica
        assert owned.share_of(owned.last_replica + 1) is None
    by_name = {owned.matrix.parts[0].logical.name: owned for owned in listed}
    for bucket in plan.buckets:
        for placed in bucket.placed:
            for part in placed.parameter.parts:
                if not part.logical.is_matrix:
                    continue
                start = placed.part_start(part)
                for share in by_name[part.logical.name].shares():
                    low, high = bucket.shard(share.replica, replicas)
                    assert low <= start + share.start < start + share.end <= high


@pytest.mark.parametrize("replicas", [1, 3, 8])
def test_rows_are_shared_as_torch_does(replicas: int) -> None:
    listed = covered(rounds_of_rows(table(GPT2, tp=2), MUON, replicas))
    assert len(listed) == len(names(GPT2))
    for owned in listed:
        rows = -(-owned.matrix.tensor.shape[0] // replicas)
        columns = owned.matrix.shape[1]
        first = owned.matrix.parts[0].start
        for share in owned.shares():
            assert (first + share.start // columns) // rows == share.replica


def test_work_is_spread_over_the_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads() -> list[int]:
        work = [0, 0, 0, 0]
        for owned in covered(rounds_of_rows(table(DEEPSEEK), MUON, 4)):
            work[owned.owner] += owned.matrix.flops(1)
        return work

    assert max(loads()) < 1.2 * min(loads())
    assert len(rounds_of_rows(table(DEEPSEEK), MUON, 4)) == 1
    # Rounds bound what is in memory at once.
    monkeypatch.setattr(module, "ROUND_ELEMENTS", 4000)
    rounds = rounds_of_rows(table(DEEPSEEK), MUON, 4)
    assert len(rounds) > 1
    largest = 49_152
    for round_ in rounds:
        *others, _ = [owned.matrix.num_elements for owned in round_]
        assert sum(others) < 4 * 2 * largest


def test_every_replica_has_work_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUND_ELEMENTS", 10_000)
    experts = [tensor for tensor in table(DEEPSEEK) if tensor.of_expert]
    # One bucket, whose first half is the first replica's.
    *rounds, _ = rounds_of_buckets(plan_buckets(experts, 2, None), MUON, 2)
    assert len(rounds) > 5
    for round_ in rounds:
        assert {owned.owner for owned in round_} == {0, 1}


def test_tensor_parallel_ranks_take_turns() -> None:
    listed = covered(rounds_of_rows(table(GPT2, tp=2), MUON, 1))
    owners = tp_owners([owned.matrix for owned in listed], 2)
    work = [0, 0]
    for owned, owner in zip(listed, owners, strict=True):
        work[owner] += owned.matrix.flops(1)
    assert max(work) < 1.3 * min(work)

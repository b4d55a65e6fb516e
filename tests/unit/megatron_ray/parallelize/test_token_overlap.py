"""Symmetric memory: torch has its functions, and what they need is checked."""

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.parallelize import token_overlap
from megatron_ray.tensor_parallel.overlap import MessageOverlap
from megatron_ray.tensor_parallel.symmetric_memory import (
    GatherAndConsume,
    ProduceAndScatter,
)

COPIED: dict[str, Any] = {
    "tp": 2,
    "sequence_parallel": True,
    "tp_comm_overlap": True,
    "tp_symmetric_memory": True,
}


class Rank0Of2:
    """Stands in for a process group."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


class Mesh:
    """Stands in for the mesh of a rank."""

    def __init__(self, device: str = "cpu", group: Any = None) -> None:
        self.device = torch.device(device)
        self.tp_group = group


def overlap(mesh: Any, **changes: bool) -> object:
    given: ParallelMesh = mesh
    return token_overlap.token_overlap(ParallelismConfig(**(COPIED | changes)), given)


@pytest.mark.parametrize(
    ("function", "protocol"),
    [
        (symmetric_memory._pipelined_all_gather_and_consume, GatherAndConsume),
        (symmetric_memory._pipelined_produce_and_all2all, ProduceAndScatter),
    ],
)
def test_torchs_functions_take_these_arguments_in_this_order(
    function: Any, protocol: type
) -> None:
    given = list(inspect.signature(protocol.__call__).parameters)
    taken = inspect.signature(function).parameters
    assert given[1:] == list(taken)[: len(given) - 1]
    # All others have defaults.
    for name in list(taken)[len(given) - 1 :]:
        assert taken[name].default is not inspect.Parameter.empty
    assert list(inspect.signature(symmetric_memory.enable_symm_mem_for_group).parameters)[
        :1
    ] == ["group_name"]


def test_tokens_are_messages_unless_they_are_copied() -> None:
    mesh = Mesh(group=Rank0Of2())
    assert isinstance(overlap(mesh, tp_symmetric_memory=False), MessageOverlap)
    assert overlap(mesh, tp_symmetric_memory=False, tp_comm_overlap=False) is None
    assert overlap(Mesh()) is None


def test_memory_is_that_of_gpus() -> None:
    words = (
        "/parallel/tp_symmetric_memory: GPUs read each other's memory, and this rank "
        "computes on cpu; leave it out"
    )
    with pytest.raises(ConfigError, match=words):
        overlap(Mesh(group=Rank0Of2()))


def test_gpus_of_other_nodes_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_hosts(host: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return torch.cat([host, host + 1])

    monkeypatch.setattr(collectives, "all_gather_rows", all_hosts)
    monkeypatch.setattr(
        torch, "tensor", lambda values, device: torch.as_tensor(values, device="cpu")
    )
    words = (
        "/parallel/tp_symmetric_memory: tp=2 ranks are on 2 nodes, and GPUs read the memory "
        "of those of their own node only; use a tp of GPUs of one node, or leave it out"
    )
    with pytest.raises(ConfigError, match=words):
        overlap(Mesh("cuda", Rank0Of2()))

"""Chooses how tensor-parallel ranks overlap tokens with products.

Owns: the import of torch's symmetric memory, whose functions are not public, and what it
needs. Must not know: layers.
"""

from socket import gethostname
from zlib import crc32

import torch
import torch.distributed as dist

from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.tensor_parallel.overlap import MessageOverlap, TokenOverlap
from megatron_ray.tensor_parallel.symmetric_memory import (
    PipelinedCopies,
    SymmetricMemoryOverlap,
)


def token_overlap(parallel: ParallelismConfig, mesh: ParallelMesh) -> TokenOverlap | None:
    """Returns how tokens and products overlap; None if they do not.

    All ranks of a tp group must call it. Raises ConfigError where GPUs cannot read each
    other's memory.
    """
    group = mesh.tp_group
    if not parallel.tp_comm_overlap or not parallel.sequence_parallel or group is None:
        return None
    if not parallel.tp_symmetric_memory:
        return MessageOverlap(group)
    _check_memory(group, mesh.device)
    return SymmetricMemoryOverlap(group, _load_copies(group))


def _check_memory(group: dist.ProcessGroup, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            "/parallel/tp_symmetric_memory: GPUs read each other's memory, and this rank "
            f"computes on {device.type}; leave it out"
        )
    host = torch.tensor([crc32(gethostname().encode())], device=device)
    hosts = set(collectives.all_gather_rows(host, group).tolist())
    if len(hosts) > 1:
        raise ConfigError(
            f"/parallel/tp_symmetric_memory: tp={group.size()} ranks are on {len(hosts)} "
            "nodes, and GPUs read the memory of those of their own node only; use a tp of "
            "GPUs of one node, or leave it out"
        )


def _load_copies(group: dist.ProcessGroup) -> PipelinedCopies:
    """Imports torch's functions; the group's buffers are made on their first use."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    symmetric_memory.enable_symm_mem_for_group(group.group_name)
    return PipelinedCopies(
        symmetric_memory._pipelined_all_gather_and_consume,
        symmetric_memory._pipelined_produce_and_all2all,
    )

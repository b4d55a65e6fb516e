"""ZeRO-3: parameters themselves sharded over the replicas, through torch's fully_shard.

Owns: wrapping a model, and giving its shards to the flat buffers that everything else
reads.

Each rank keeps an equal number of rows of every tensor it would hold (Zhao et al. 2023,
FSDP), in fp32; a block's weights are gathered for its forward and backward only, in the
type of the model, and its gradients are scattered as sums in fp32. With fewer shards
than replicas (HSDP) each shard has equals, and gradients are summed over those too.
Which rows are whose comes from the parameter table; DTensor appears only here. Must not
know: the optimizer's arithmetic, scaling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.data_parallel.buffers import FlatBuffers, replace_parameters
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.weight_grad import GradSlot


@dataclass(frozen=True)
class Shards:
    """Modules that are sharded among the same ranks."""

    modules: Sequence[nn.Module]
    group: Group
    """Who has the other shards."""
    copies: Group = None
    """Who has the same one."""


class FullShard:
    """A model under fully_shard whose shards follow flat buffers: gradients are
    accumulated in them, and `adopt` takes the weights over.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Shards], dtype: torch.dtype
    ) -> None:
        """`model` is on device meta and of type fp32, and the last module of `parts`,
        in which what lies inside another comes first.
        """
        # Here, because it imports the compiler and DTensor: seconds of a start, which
        # only such a job should pay.
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for part in parts:
            mesh = _device_mesh(part) if part.modules else None
            for module in part.modules:
                fully_shard(module, mesh=mesh, mp_policy=policy)
                assert isinstance(module, FSDPModule)
                # Sums, as everywhere; gloo has no scaled sum either.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "stage")
        self.model = model
        self._shards: list[tuple[nn.Parameter, Tensor]] = []

    def attach(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """Makes the buffers' views the memory of shards and gradients.

        Raises ValueError when the table and torch cut differently.
        """
        replaced = {}
        for name, parameter in self.model.named_parameters():
            shape = _local(parameter).shape
            weight = (
                weights[name] if name in weights else torch.zeros(shape, device=device)
            )  # no rows of it are here
            if weight.shape != shape:
                raise ValueError(
                    f"{name}: the table has {tuple(weight.shape)} here, torch {tuple(shape)}"
                )
            replaced[parameter] = nn.Parameter(
                _like(parameter, weight), parameter.requires_grad
            )
            if parameter.requires_grad:
                gradient = (
                    gradients[name]
                    if name in gradients
                    else torch.zeros(shape, device=device)
                )
                replaced[parameter].grad = _like(parameter, gradient)
            self._shards.append((replaced[parameter], weight))
        replace_parameters(self.model, replaced)

    @torch.no_grad()
    def adopt(self) -> None:
        """The flat buffers' weights become the model's: torch keeps a padded copy where
        rows do not divide evenly.
        """
        for parameter, weight in self._shards:
            own = _local(parameter)
            if own.data_ptr() != weight.data_ptr():
                own.copy_(weight)


class TorchReducer:
    """torch brings gradients together, into these buffers."""

    def __init__(self, buffers: FlatBuffers) -> None:
        self._buffers = buffers

    def begin_step(self, trainable: set[str]) -> None:
        """Gradients start from zero: torch adds to what is there."""
        self._buffers.gradients.zero_()

    def ready(self, slot: GradSlot) -> None:
        """Gradients go through autograd here, never through slots."""
        raise ValueError(f"{slot.name} has a slot, which ZeRO-3 has none of")

    def finish(self) -> None:
        """Reductions are waited for by torch at the end of each backward."""


def _device_mesh(part: Shards):  # type: ignore[no-untyped-def]
    from torch.distributed.device_mesh import DeviceMesh

    shard = part.group
    replicate = part.copies
    if shard is None:  # torch wants a group even where there is nothing to share out
        shard = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    kind = "cuda" if dist.get_backend(shard) == "nccl" else "cpu"
    if replicate is None:
        return DeviceMesh.from_group(shard, kind, mesh_dim_names=("shard",))
    members = torch.tensor([dist.get_process_group_ranks(shard)])
    here = dist.get_process_group_ranks(replicate)
    # Rows are the groups of shards; the distance between two of them is the same for
    # every member.
    mesh = members + torch.tensor([[rank - dist.get_rank()] for rank in here])
    return DeviceMesh.from_group(
        [replicate, shard], kind, mesh=mesh, mesh_dim_names=("replicate", "shard")
    )


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter._local_tensor  # type: ignore[no-any-return, attr-defined] # to_local() would be a node of autograd


def _like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

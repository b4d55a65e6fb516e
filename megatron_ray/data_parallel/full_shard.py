"""Shards the parameters themselves over the replicas (ZeRO-3), by torch's fully_shard.

Each rank keeps an equal number of rows of every tensor it would have (Zhao et al. 2023,
FSDP), in fp32; a block's weights are gathered for its forward and backward only, in the
type of the model, and its gradients are scattered as sums in fp32. With fewer shards than
replicas (HSDP) each shard has copies, and gradients are summed over those too. Which rows
are on which rank comes from the parameter table. DTensor appears only here. Must not
know: the optimizer's arithmetic, scaling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.data_parallel.buffers import FlatBuffers, replace_parameters
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.weight_grad import GradSlot

# fully_shard and DTensor import the compiler: seconds of a start, which only a job with
# ZeRO-3 should pay. So they are imported inside functions.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Shards:
    """Modules that are sharded over the same ranks."""

    modules: Sequence[nn.Module]
    """A module inside another comes first."""
    group: Group
    """Ranks with the other shards."""
    copies: Group = None
    """Ranks with the same shard."""


class FullShard:
    """A model under fully_shard whose shards and gradients lie in flat buffers.

    `model` is on device meta and of type fp32, and is itself the last module of `parts`,
    in which a module inside another comes first. `dtype` is that of gathered weights.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Shards], dtype: torch.dtype
    ) -> None:
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
            if not part.modules:
                continue
            mesh = _device_mesh(part)
            for module in part.modules:
                fully_shard(module, mesh=mesh, mp_policy=policy)
                assert isinstance(module, FSDPModule)
                # Sums, as everywhere; gloo has no scaled sum either.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # A pipeline stage is run by `stage` and not by `forward`, and must gather as well.
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

        Raises ValueError when the parameter table and torch cut differently.
        """
        replaced = {}
        for name, parameter in self.model.named_parameters():
            shape = _local_shard(parameter).shape
            weight = _view_or_zeros(weights, name, shape, device)
            if weight.shape != shape:
                raise ValueError(
                    f"{name}: the table has {tuple(weight.shape)} here, torch {tuple(shape)}"
                )
            shard = nn.Parameter(_like(parameter, weight), parameter.requires_grad)
            if parameter.requires_grad:
                # torch adds gradients to existing ones, which are the buffer's memory.
                gradient = _view_or_zeros(gradients, name, shape, device)
                shard.grad = _like(parameter, gradient)
            replaced[parameter] = shard
            self._shards.append((shard, weight))
        replace_parameters(self.model, replaced)

    @torch.no_grad()
    def sync_model(self) -> None:
        """Copies the flat buffers' weights to the model.

        Only where they are not its memory: torch keeps a padded copy of shards whose rows
        do not divide evenly.
        """
        for parameter, weight in self._shards:
            shard = _local_shard(parameter)
            if shard.data_ptr() != weight.data_ptr():
                shard.copy_(weight)


class TorchReducer:
    """The reducer under ZeRO-3, where torch reduces gradients into the buffers."""

    def __init__(self, buffers: FlatBuffers) -> None:
        self._buffers = buffers

    def begin_step(self, trainable: set[str]) -> None:
        """Clears the gradients, since torch adds to existing ones."""
        self._buffers.gradients.zero_()

    def ready(self, slot: GradSlot) -> None:
        """Raises ValueError: gradients go through autograd here, never through slots."""
        raise ValueError(f"{slot.name} has a slot, which ZeRO-3 has none of")

    def finish(self) -> None:
        """Does nothing: torch waits for reductions at the end of each backward."""


def _device_mesh(part: Shards) -> "DeviceMesh":
    from torch.distributed.device_mesh import DeviceMesh

    shard = part.group
    if shard is None:
        # torch needs a group even where there is nothing to share out.
        shard = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert shard is not None
    kind = "cpu"
    if dist.get_backend(shard) == "nccl":
        kind = "cuda"
    if part.copies is None:
        return DeviceMesh.from_group(shard, kind, mesh_dim_names=("shard",))
    members = torch.tensor([dist.get_process_group_ranks(shard)])
    copies = torch.tensor(dist.get_process_group_ranks(part.copies))
    # Rows are the groups of shards; the distance between two of them is the same for
    # every member.
    mesh = members + (copies - dist.get_rank())[:, None]
    return DeviceMesh.from_group(
        [part.copies, shard], kind, mesh=mesh, mesh_dim_names=("replicate", "shard")
    )


def _view_or_zeros(
    views: Mapping[str, Tensor], name: str, shape: torch.Size, device: torch.device
) -> Tensor:
    """Returns a parameter's view; zeros of a rank that has no rows of it."""
    if name in views:
        return views[name]
    return torch.zeros(shape, device=device)


def _local_shard(parameter: nn.Parameter) -> Tensor:
    # Not to_local(), which would be a node of autograd.
    shard: Tensor = parameter._local_tensor  # type: ignore[attr-defined]
    return shard


def _like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """Returns a DTensor over `local` that is cut as the parameter is."""
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

"""Shards the parameters themselves over the replicas (ZeRO-3), by torch's fully_shard.

Each rank keeps an equal number of rows of each of its tensors (Zhao et al. 2023, FSDP),
in fp32. A block's weights are gathered only for its forward and backward, in the type
of the model, and its gradients are reduce-scattered as sums and kept in fp32. With fewer shards
than replicas (HSDP) each shard has copies, and gradients are summed over those too. The
parameter table determines the rows of each rank. DTensor is used only here. Must not
know: the optimizer's arithmetic, scaling.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.data_parallel.buffers import FlatBuffers, replace_parameters
from megatron_ray.data_parallel.fp8_shards import Fp8Shard
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.weight_grad import GradSlot

# fully_shard and DTensor import the compiler, which takes seconds. They are imported inside
# functions, so that only jobs with ZeRO-3 pay for it.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Shards:
    """Modules that are sharded over the same ranks."""

    modules: Sequence[nn.Module]
    """Inner modules come before outer ones."""
    group: Group
    """Ranks with the other shards."""
    copies: Group = None
    """Ranks with copies of the same shard."""


class FullShard:
    """A model under fully_shard, with shards and gradients in flat buffers.

    `model` is on device meta, in fp32, and is the last module of `parts`, where inner
    modules come before outer ones. `dtype` is the type of gathered weights, `grad_dtype`
    that in which gradients are reduced. The weights `in_fp8` are gathered in FP8: their
    shards must be attached as `Fp8Shard`.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Shards],
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        in_fp8: Collection[str] = (),
    ) -> None:
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=grad_dtype, cast_forward_inputs=False
        )
        # torch looks at the type of a parameter before and after sharding.
        _mark_in_fp8(model, in_fp8)
        for part in parts:
            if not part.modules:
                continue
            mesh = _device_mesh(part)
            for module in part.modules:
                fully_shard(module, mesh=mesh, mp_policy=policy)
                assert isinstance(module, FSDPModule)
                # Sums, as in all reductions; gloo does not support scaled sums.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # Pipelines call `stage` instead of `forward`, which must gather as well.
        register_fsdp_forward_method(model, "stage")
        self.model = model
        self._shards: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def attach(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """Makes the buffers' views the memory of shards and gradients.

        Raises ValueError when the parameter table and torch shard differently.
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
            # A copy of the DTensor loses the type of its local tensor.
            shard._local_tensor = weight  # type: ignore[attr-defined]
            if parameter.requires_grad:
                # torch accumulates into existing gradients, so these use the buffer's
                # memory.
                gradient = _view_or_zeros(gradients, name, shape, device)
                shard.grad = _like(parameter, gradient)
            replaced[parameter] = shard
            self._shards[name] = (shard, weight)
        replace_parameters(self.model, replaced)

    @torch.no_grad()
    def sync_model(self, names: Collection[str]) -> None:
        """Copies the flat buffers' weights with these names to the model.

        Needed where torch keeps a padded copy of shards that do not divide evenly.
        """
        for name in names:
            parameter, weight = self._shards[name]
            shard = _local_shard(parameter)
            if shard.data_ptr() != weight.data_ptr():
                shard.copy_(weight)


class TorchReducer:
    """The reducer under ZeRO-3, where torch reduces gradients into the buffers."""

    not_finite: Tensor | None = None

    def __init__(self, buffers: FlatBuffers) -> None:
        self._buffers = buffers

    def begin_step(self, trainable: set[str]) -> None:
        """Clears the gradients, since torch adds to existing ones."""
        self._buffers.gradients.zero_()

    def ready(self, slot: GradSlot) -> None:
        """Raises ValueError, because under ZeRO-3 autograd accumulates gradients."""
        raise ValueError(f"{slot.name} has a slot, but ZeRO-3 uses none")

    def finish(self) -> None:
        """Does nothing: torch waits for reductions at the end of each backward."""


def _mark_in_fp8(model: nn.Module, names: Collection[str]) -> None:
    replaced = {}
    for name, parameter in model.named_parameters():
        replaced[parameter] = parameter
        if name in names:
            marked = parameter.detach().as_subclass(Fp8Shard)
            replaced[parameter] = nn.Parameter(marked, parameter.requires_grad)
    replace_parameters(model, replaced)


def _device_mesh(part: Shards) -> "DeviceMesh":
    from torch.distributed.device_mesh import DeviceMesh

    shard = part.group
    if shard is None:
        # torch needs a group even for a single rank.
        shard = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert shard is not None
    kind = "cpu"
    if dist.get_backend(shard) == "nccl":
        kind = "cuda"
    if part.copies is None:
        return DeviceMesh.from_group(shard, kind, mesh_dim_names=("shard",))
    members = torch.tensor([dist.get_process_group_ranks(shard)])
    copies = torch.tensor(dist.get_process_group_ranks(part.copies))
    # Each row is a group of shards; the offset between two rows is the same for all
    # members.
    mesh = members + (copies - dist.get_rank())[:, None]
    return DeviceMesh.from_group(
        [part.copies, shard], kind, mesh=mesh, mesh_dim_names=("replicate", "shard")
    )


def _view_or_zeros(
    views: Mapping[str, Tensor], name: str, shape: torch.Size, device: torch.device
) -> Tensor:
    """Returns a parameter's view; zeros if the rank has none of its rows."""
    if name in views:
        return views[name]
    return torch.zeros(shape, device=device)


def _local_shard(parameter: nn.Parameter) -> Tensor:
    # Not to_local(), which would add an autograd node.
    shard: Tensor = parameter._local_tensor  # type: ignore[attr-defined]
    return shard


def _like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """Returns a DTensor over `local` that is sharded like the parameter."""
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

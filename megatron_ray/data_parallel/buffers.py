"""Contiguous memory for parameters and main gradients, and the overlapped reduction of
its buckets.

Owns: flat buffers, views into them, starting a bucket's collective the moment its last
gradient is complete. Must not know: the optimizer's arithmetic, scaling (gradients stay
sums over tokens here).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group, Pending
from megatron_ray.ops.grad_slots import SlottedModule
from megatron_ray.ops.weight_grad import GradSlot, WeightGradSink
from megatron_ray.sharding.buckets import Bucket, BucketPlan


@dataclass(frozen=True)
class FlatBuffers:
    """One flat tensor of parameters (model type) and one of main gradients (fp32), cut
    by the same plan; padding is zero. The gradients end where the frozen parameters
    begin.
    """

    plan: BucketPlan
    parameters: Tensor
    gradients: Tensor

    @classmethod
    def allocate(
        cls, plan: BucketPlan, dtype: torch.dtype, device: torch.device
    ) -> "FlatBuffers":
        """Zero-filled buffers."""
        return cls(
            plan,
            torch.zeros(plan.num_elements, dtype=dtype, device=device),
            torch.zeros(plan.num_trainable, device=device),
        )

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensor inside a flat buffer of each parameter that it reaches to."""
        reached = [placed for placed in self.plan.placed if placed.end <= buffer.numel()]
        return {
            placed.parameter.name: buffer[placed.start : placed.end].view(
                placed.parameter.shape
            )
            for placed in reached
        }


def bind_parameters(model: nn.Module, views: Mapping[str, Tensor]) -> None:
    """Replaces the model's (meta) parameters by views into flat buffers.

    Raises ValueError when names or shapes disagree.
    """
    expected = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    offered = {name: tuple(view.shape) for name, view in views.items()}
    if expected != offered:
        wrong = sorted(set(expected.items()) ^ set(offered.items()))
        raise ValueError(f"the model and the parameter table disagree: {wrong[:4]}")
    replace_parameters(
        model,
        {
            old: nn.Parameter(views[name], old.requires_grad)
            for name, old in model.named_parameters()
        },
    )


def replace_parameters(
    model: nn.Module, replaced: Mapping[nn.Parameter, nn.Parameter]
) -> None:
    """Puts another in the place of each, wherever in the model it stands; one that two
    layers share stays shared.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, replaced[parameter])


def attach_slots(
    model: nn.Module, gradients: Mapping[str, Tensor], sink: WeightGradSink
) -> None:
    """Gives every layer the slots of its trainable parameters, onto these main
    gradients; a parameter that two layers share expects the contributions of both.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    slots: dict[str, GradSlot] = {}
    for module in model.modules():
        if not isinstance(module, SlottedModule):
            continue
        for local_name, parameter in module.named_parameters(recurse=False):
            name = names[parameter]
            if name in slots:
                slots[name].uses += module.uses
            elif parameter.requires_grad:
                slots[name] = sink.register(name, gradients[name], module.uses)
            if name in slots:
                module.slots[local_name] = slots[name]


class GradReducer:
    """Sums main gradients over the data-parallel group, bucket by bucket, while the
    backward pass goes on.

    With `sharded` (ZeRO-1) each rank receives the sum of its own part only, in place;
    the rest of the bucket is then meaningless.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        group: Group,
        *,
        sharded: bool,
        on_start: Callable[[Bucket], None] | None = None,
    ) -> None:
        self.buffers = buffers
        self.group = group
        self.sharded = sharded
        self._on_start = on_start
        self._bucket_of = {
            placed.parameter.name: bucket
            for bucket in buffers.plan.buckets
            for placed in bucket.placed
        }
        self._missing: dict[int, int] = {}
        self._pending: list[Pending] = []

    def begin_step(self, trainable: set[str]) -> None:
        """Expects each trainable parameter once; buckets without any are never reduced."""
        self._missing = {
            bucket.index: sum(
                placed.parameter.name in trainable for placed in bucket.placed
            )
            for bucket in self.buffers.plan.buckets
        }
        self._pending = []

    def ready(self, slot: GradSlot) -> None:
        """A parameter's gradient is complete; starts the bucket's collective when it
        was the last one.
        """
        bucket = self._bucket_of[slot.name]
        self._missing[bucket.index] -= 1
        if self._missing[bucket.index] == 0:
            if self._on_start is not None:
                self._on_start(bucket)
            self._pending.append(self._start(bucket))

    def finish(self) -> None:
        """Waits for every bucket.

        Raises RuntimeError when a gradient never came: the sum would be silently wrong.
        """
        left = [
            bucket.index
            for bucket in self.buffers.plan.buckets
            if self._missing[bucket.index] > 0
        ]
        if left:
            absent = [
                placed.parameter.name
                for placed in self.buffers.plan.buckets[left[0]].placed
            ]
            raise RuntimeError(
                f"{len(left)} gradient buckets were never complete; the first holds {absent[:4]}"
            )
        for pending in self._pending:
            pending.wait()
        self._pending = []

    def _start(self, bucket: Bucket) -> Pending:
        whole = self.buffers.gradients[bucket.start : bucket.end]
        if not self.sharded or self.group is None:
            return collectives.start_all_reduce(whole, self.group)
        low, high = bucket.shard(collectives.rank(self.group), collectives.size(self.group))
        return collectives.start_reduce_scatter_into(
            self.buffers.gradients[low:high], whole, self.group
        )


class Reducer(Protocol):
    """Brings a step's gradients of one set of buffers together; see `GradReducer` and
    `full_shard`.
    """

    def begin_step(self, trainable: set[str]) -> None: ...

    def ready(self, slot: GradSlot) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that have the same replicas: the dense ones, or the experts."""

    buffers: FlatBuffers
    reducer: Reducer
    group: Group
    """Who has the same buffers."""
    adopt: Callable[[], None] = lambda: None
    """Takes over weights that were written to the flat buffers, where the model does
    not live in them."""

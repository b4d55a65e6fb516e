"""Keeps parameters and main gradients in flat buffers, and reduces their buckets.

A bucket's collective starts when its last gradient is complete, so it overlaps with the
rest of the backward pass. Must not know: the optimizer's arithmetic, scaling (gradients
are sums over tokens here).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_ray.data_parallel.weight_gathers import WeightGathers
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group, Pending
from megatron_ray.ops.grad_slots import SlottedModule
from megatron_ray.ops.weight_grad import GradSlot, WeightGradSink
from megatron_ray.sharding.buckets import Bucket, BucketPlan
from megatron_ray.sharding.parameter_types import LocalParameter

OnReduce = Callable[[Bucket], None]


@dataclass(frozen=True)
class FlatBuffers:
    """One flat tensor of parameters and one of main gradients.

    Both are laid out by the same plan; padding is zero. Frozen parameters come last and
    have no gradients.
    """

    plan: BucketPlan
    parameters: Tensor
    gradients: Tensor

    @classmethod
    def allocate(
        cls,
        plan: BucketPlan,
        dtype: torch.dtype,
        device: torch.device,
        grad_dtype: torch.dtype = torch.float32,
    ) -> "FlatBuffers":
        """Returns zero-filled buffers, parameters of type `dtype`."""
        return cls(
            plan,
            torch.zeros(plan.num_elements, dtype=dtype, device=device),
            torch.zeros(plan.num_trainable, dtype=grad_dtype, device=device),
        )

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Returns each parameter's tensor inside a flat buffer, by name.

        Parameters beyond the buffer's end (frozen ones, in the gradients) are left out.
        """
        views = {}
        for placed in self.plan.placed:
            if placed.end <= buffer.numel():
                flat = buffer[placed.start : placed.end]
                views[placed.parameter.name] = flat.view(placed.parameter.shape)
        return views


class Reducer(Protocol):
    """Reduces a step's gradients of one set of buffers over its replicas.

    `GradReducer` and `full_shard.TorchReducer` are the two.
    """

    not_finite: Tensor | None
    """Whether this rank's own gradients of the step are not finite, a bool scalar; None
    where that is not checked."""

    def begin_step(self, trainable: set[str]) -> None:
        """Resets the state of the previous step."""
        ...

    def ready(self, slot: GradSlot) -> None:
        """Records that a parameter's gradient is complete on this rank."""
        ...

    def finish(self) -> None:
        """Waits until all gradients are reduced."""
        ...


def _do_nothing() -> None:
    pass


@dataclass(frozen=True)
class RowShards:
    """Tensors whose rows are sharded over a group, by `sharding.row_shards`."""

    table: tuple[LocalParameter, ...]
    """The whole tensors."""
    group: Group


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same replicas: the dense ones, or those of experts."""

    buffers: FlatBuffers
    reducer: Reducer
    group: Group
    """Ranks with the same buffers."""
    sync_model: Callable[[], None] = _do_nothing
    """Copies weights from the flat buffers to the model if it has its own memory."""
    tp_group: Group = None
    """Ranks with the other parts of the same tensors."""
    rows: RowShards | None = None
    """How the tensors are sharded, if the buffers have some of their rows only."""
    gathers: WeightGathers | None = None
    """Gathers of updated weights that the next forward pass waits for; None where the
    update does."""


def buffer_views(
    groups: Sequence[ParameterGroup], choose: Callable[[FlatBuffers], Tensor]
) -> dict[str, Tensor]:
    """Returns every parameter's tensor inside the chosen buffer of its group, by name."""
    views: dict[str, Tensor] = {}
    for group in groups:
        views |= group.buffers.views(choose(group.buffers))
    return views


def bind_parameters(model: nn.Module, views: Mapping[str, Tensor]) -> None:
    """Replaces the model's (meta) parameters by views into flat buffers.

    Raises ValueError when the names are not those of the model.
    """
    parameters = dict(model.named_parameters())
    unmatched = sorted(parameters.keys() ^ views.keys())
    if unmatched:
        raise ValueError(f"the model and the parameter table disagree: {unmatched[:4]}")
    # Keyed by the old parameter, because a tied one has two modules but one name.
    replaced = {}
    for name, old in parameters.items():
        replaced[old] = nn.Parameter(views[name], old.requires_grad)
    replace_parameters(model, replaced)


def replace_parameters(
    model: nn.Module, replaced: Mapping[nn.Parameter, nn.Parameter]
) -> None:
    """Replaces each parameter in all of its modules, so shared ones stay shared."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, replaced[parameter])


def attach_slots(
    model: nn.Module, gradients: Mapping[str, Tensor], sink: WeightGradSink
) -> None:
    """Attaches slots for these main gradients to every layer's trainable parameters.

    The slot of a shared parameter expects the contributions of both layers.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if not isinstance(module, SlottedModule):
            continue
        for local_name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = names[parameter]
            # A tied weight occurs twice, in the embedding and in the head.
            if name in sink.slots:
                sink.slots[name].uses += module.uses
            else:
                sink.register(name, gradients[name], module.uses)
            module.slots[local_name] = sink.slots[name]


class GradReducer:
    """Sums main gradients over the data-parallel group, one bucket at a time.

    With `sharded` (ZeRO-1) each rank receives the sum of its own part only, in place;
    the rest of the bucket is then undefined. `on_start` is called with each bucket when
    its reduction starts. With `checks` each bucket is read before it.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        group: Group,
        *,
        sharded: bool,
        on_start: OnReduce | None = None,
        checks: bool = False,
    ) -> None:
        self.buffers = buffers
        self.not_finite: Tensor | None = None
        if checks:
            device = buffers.gradients.device
            self.not_finite = torch.zeros((), dtype=torch.bool, device=device)
        self.group = group
        self.sharded = sharded
        self._on_start = on_start
        self._bucket_of: dict[str, Bucket] = {}
        for bucket in buffers.plan.buckets:
            for placed in bucket.placed:
                self._bucket_of[placed.parameter.name] = bucket
        self._num_missing: dict[int, int] = {}
        self._pending: list[Pending] = []

    def begin_step(self, trainable: set[str]) -> None:
        """Resets the counts of missing gradients, one per trainable parameter.

        Buckets without a trainable parameter are never reduced.
        """
        # Counts instead of sets of names, because `ready` runs in every backward pass.
        self._num_missing = dict.fromkeys(range(len(self.buffers.plan.buckets)), 0)
        for name, bucket in self._bucket_of.items():
            if name in trainable:
                self._num_missing[bucket.index] += 1
        self._pending = []
        if self.not_finite is not None:
            self.not_finite.zero_()

    def ready(self, slot: GradSlot) -> None:
        """Starts the collective of a parameter's bucket when its gradient was the last."""
        bucket = self._bucket_of[slot.name]
        self._num_missing[bucket.index] -= 1
        if self._num_missing[bucket.index] > 0:
            return
        if self._on_start is not None:
            self._on_start(bucket)
        self._pending.append(self._start(bucket))

    def finish(self) -> None:
        """Waits for every bucket.

        Raises RuntimeError for a missing gradient, which would make the sum wrong.
        """
        incomplete = []
        for bucket in self.buffers.plan.buckets:
            if self._num_missing[bucket.index] > 0:
                incomplete.append(bucket)
        if incomplete:
            names = [placed.parameter.name for placed in incomplete[0].placed]
            raise RuntimeError(
                f"{len(incomplete)} gradient buckets were never complete; the first holds "
                f"{names[:4]}"
            )
        # In order of their start, which is the same on all ranks.
        for pending in self._pending:
            pending.wait()
        self._pending = []

    def _start(self, bucket: Bucket) -> Pending:
        gradients = self.buffers.gradients
        whole = gradients[bucket.start : bucket.end]
        if self.not_finite is not None:
            # The largest magnitude, in one pass and without a copy; NaN if one of them is.
            largest = torch.linalg.vector_norm(whole, float("inf"))
            self.not_finite.logical_or_(torch.isfinite(largest).logical_not())
        if not self.sharded or self.group is None:
            return collectives.start_all_reduce(whole, self.group)
        # In place: the output is this rank's part of the bucket.
        dp_rank = collectives.rank(self.group)
        start, end = bucket.shard(dp_rank, collectives.size(self.group))
        return collectives.start_reduce_scatter_into(
            gradients[start:end], whole, self.group
        )

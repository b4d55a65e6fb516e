"""After the backward pass: from sums in buckets to gradients ready for the update.

Owns: the one reduction rule.

Losses are sums over valid tokens; every reduction is a sum in the group that the
parameter table names; the one factor 1/global_tokens is applied here, once, together
with clipping. Must not know: the update rule, who reads the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.expert_parallel.layers import update_expert_biases
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel

# A norm over this many elements at a time stays exact enough in fp32; the squares are
# added in fp64.
_NORM_CHUNK = 4096


@dataclass(frozen=True)
class StepStats:
    """Device scalars of one step, fp64, the same on every rank."""

    values: Tensor
    """[loss sum, tokens, squared gradient norm of the sums, the model's attached losses
    ..., flags added up over the ranks ...]."""


def finalize_grads(
    model: ParallelModel,
    optimizer: ShardedOptimizer,
    mesh: ParallelMesh,
    loss_sum: Tensor,
    num_tokens: int,
    flags: Sequence[float] = (),
) -> StepStats:
    """Completes the reductions and adds up the step's numbers over the world in one
    small all-reduce; scales nothing yet.

    `num_tokens` are this replica's; `flags` are summed over all ranks, a way to agree
    on something without a collective of its own.
    """
    for family in model.parameter_groups:
        family.reducer.finish()
    _sum_over_tp(optimizer, mesh)
    _sum_shared_heads(optimizer, mesh)
    _sum_tied_embedding(optimizer, mesh)
    update_expert_biases(model.expert_biases.values(), mesh.token_group, mesh.dp_group)
    attached = model.aux_losses.values()
    values = torch.zeros(
        3 + len(attached) + len(flags), dtype=torch.float64, device=mesh.device
    )
    if mesh.tp_rank == 0 and model.has_loss:
        values[0] = loss_sum
        values[1] = num_tokens
    values[2] = _squared_norm(optimizer, mesh)
    for index, places in enumerate(attached):
        for place in places:
            if (part := place.take()) is not None:
                values[3 + index] += part
    if any(flags):  # a copy from the host, so only when there is something to say
        values[3 + len(attached) :] = torch.tensor(flags, dtype=torch.float64)
    return StepStats(collectives.all_reduce(values, mesh.world_group))


def scale_and_clip(
    optimizer: ShardedOptimizer, stats: StepStats, clip_grad_norm: float
) -> None:
    """Multiplies the gradient shard by 1/global_tokens and by Megatron's clipping
    factor min(1, limit / (norm + 1e-6)).
    """
    factor = 1.0 / stats.values[1].clamp(min=1.0)
    if clip_grad_norm > 0:
        norm = stats.values[2].sqrt() * factor
        factor = factor * (clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = factor.float()
    for shard in optimizer.shards:
        for run in shard.runs:
            shard.gradient(run).mul_(factor)


def _sum_over_tp(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> None:
    """Whole tensors of which each tp rank has seen only its tokens or heads (norms), in
    one all-reduce.
    """
    if mesh.tp_group is None:
        return
    views = [
        gradient
        for piece, gradient in optimizer.gradients()
        if piece.placed.parameter.sum_over_tp
    ]
    if not views:
        return
    flat = collectives.all_reduce(torch.cat(views), mesh.tp_group)
    for view, summed in zip(
        views, torch.split(flat, [view.numel() for view in views]), strict=True
    ):
        view.copy_(summed)


def _sum_shared_heads(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> None:
    """Key/value heads that several tp ranks hold because there are fewer heads than
    ranks: each has seen its own query heads only.

    One all-reduce over tp of all heads, where each rank fills in its own: cheaper than
    a group and a reduction for every head.
    """
    views = []
    num_kv_replicas = 1
    for piece, gradient in optimizer.gradients():
        for part in piece.placed.parameter.parts:
            first = piece.placed.part_start(part)
            start = max(piece.start, first)
            end = min(piece.end, first + part.box.num_elements)
            if part.num_kv_replicas > 1 and start < end:
                views.append(gradient[start - piece.start : end - piece.start])
                num_kv_replicas = part.num_kv_replicas
    if not views:
        return
    own = torch.cat(views)
    heads = own.new_zeros(mesh.dims.tp // num_kv_replicas, own.numel())
    head = mesh.tp_rank // num_kv_replicas
    heads[head] = own
    collectives.all_reduce(heads, mesh.tp_group)
    for view, summed in zip(
        views, torch.split(heads[head], [view.numel() for view in views]), strict=True
    ):
        view.copy_(summed)


def _sum_tied_embedding(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> None:
    """The word embedding of the first stage and its tied head on the last one: each has
    its own bucket, cut alike.
    """
    if mesh.embedding_group is None:
        return
    for piece, gradient in optimizer.gradients():
        if piece.placed.parameter.is_shared_embedding:
            collectives.all_reduce(gradient, mesh.embedding_group)


def _squared_norm(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> Tensor:
    """Sum of squares of the elements that this rank answers for, so that the world
    counts each logical element once.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for shard in optimizer.shards:
        if not shard.sharded and collectives.rank(shard.group) != 0:
            continue
        for run in shard.runs:
            if run.owns_norm and (run.tp_sharded or mesh.tp_rank == 0):
                total += _squares(shard.gradient(run))
    return total


def _squares(gradient: Tensor) -> Tensor:
    body = gradient.numel() // _NORM_CHUNK * _NORM_CHUNK
    norms = torch.linalg.vector_norm(gradient[:body].view(-1, _NORM_CHUNK), dim=1)
    total: Tensor = norms.double().square().sum() + gradient[body:].double().square().sum()
    return total

"""Completes the gradients after the backward pass and scales them for the update.

Owns: the one reduction rule.

Losses are sums over valid tokens; every reduction is a sum over the group given by the
parameter table; the factor 1/global_tokens is applied here, once, together with
clipping. Must not know: the update rule, losses, reports.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.counted_parts import counts, counts_shard, sum_of_squares
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.optimizer.step_sums import StepSums


def finalize_grads(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> None:
    """Completes the reductions that no bucket does; gradients stay sums over tokens.

    The buckets must be complete: gradients are sums over data-parallel replicas already.
    """
    # For three kinds of parameters a rank still has only a part of the gradient.
    _sum_over_tp(optimizer, mesh)
    _sum_shared_heads(optimizer, mesh)
    _sum_tied_embedding(optimizer, mesh)
    optimizer.copy_gradients()


def scale_and_clip(
    optimizer: ShardedOptimizer, sums: StepSums, clip_grad_norm: float
) -> None:
    """Multiplies this rank's gradients by 1/global_tokens and by the clipping factor.

    Gradients of a scaled loss are unscaled by the same product. Each replica group has its
    own tokens and its own norm.

    The clipping factor is Megatron's min(1, limit / (norm + 1e-6)); a limit of 0 clips
    nothing.
    """
    # Computed on the device, so that the host never waits for the norm.
    of_group = sums.of_group
    factor = 1.0 / of_group.num_tokens.clamp(min=1.0)
    if clip_grad_norm > 0:
        # The norm of the sums, divided by the tokens, is the norm of the means.
        norm = of_group.squared_norm.sqrt() * factor
        factor = factor * (clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    if sums.grad_factor is not None:
        factor = factor / sums.grad_factor
    factor = factor.float()
    if sums.skip is not None:
        # NaN would stay in the buffers' gaps, which no later step overwrites.
        factor = factor.nan_to_num(0.0, posinf=0.0)
    for shard in optimizer.shards:
        for run in shard.runs:
            shard.gradient(run).mul_(factor)


def squared_grad_norm(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> Tensor:
    """Returns this rank's share of the squared gradient norm, fp64.

    The sum of all shares over a replica group counts each logical element once. Gradients of a
    scaled loss count unscaled.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for shard in optimizer.shards:
        if not counts_shard(shard):
            continue
        for run in shard.runs:
            if counts(run.owns_norm, run.tp_sharded, mesh.tp_rank):
                total += sum_of_squares(shard.gradient(run))
    scaler = optimizer.loss_scaler
    if scaler is not None:
        total /= scaler.grad_factor(scaler.scale).square()
    return total


def _sum_over_tp(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> None:
    """Sums over tp the gradients that each tp rank has for its own tokens or heads.

    They belong to replicated tensors such as norms. They are small, so all share one
    all-reduce.
    """
    if mesh.tp_group is None:
        return
    views = []
    for piece, gradient in optimizer.gradients():
        if piece.placed.parameter.sum_over_tp:
            views.append(gradient)
    if views:
        _copy_back(collectives.all_reduce(torch.cat(views), mesh.tp_group), views)


def _sum_shared_heads(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> None:
    """Sums over tp the gradients of replicated key/value heads.

    Heads are replicated if a model has fewer key/value heads than tp ranks; each
    replica has the gradient of its own query heads only.
    """
    views = []
    num_replicas = 1
    for piece, gradient in optimizer.gradients():
        for part in piece.placed.parameter.parts:
            overlap = piece.overlap(part)
            if part.num_kv_replicas > 1 and overlap is not None:
                start, end = overlap
                views.append(gradient[start - piece.start : end - piece.start])
                num_replicas = part.num_kv_replicas
    if not views:
        return
    local_heads = torch.cat(views)
    # One all-reduce over tp of all heads, in which each rank fills in its own heads and
    # zeros elsewhere. This is cheaper than a group and a reduction per head.
    all_heads = local_heads.new_zeros(mesh.dims.tp // num_replicas, local_heads.numel())
    head = mesh.tp_rank // num_replicas
    all_heads[head] = local_heads
    collectives.all_reduce(all_heads, mesh.tp_group)
    _copy_back(all_heads[head], views)


def _sum_tied_embedding(optimizer: ShardedOptimizer, mesh: ParallelMesh) -> None:
    """Sums the gradient of a word embedding over the first and the last stage.

    The last stage uses it as its tied head. On both stages it has its own bucket, so
    their shards are the same rows.
    """
    if mesh.embedding_group is None:
        return
    for piece, gradient in optimizer.gradients():
        if piece.placed.parameter.is_shared_embedding:
            collectives.all_reduce(gradient, mesh.embedding_group)


def _copy_back(flat: Tensor, views: Sequence[Tensor]) -> None:
    """Copies the parts of a concatenation back to their views."""
    sizes = [view.numel() for view in views]
    for view, piece in zip(views, torch.split(flat, sizes), strict=True):
        view.copy_(piece)

"""Computes one step's gradients and sums on one rank.

Owns: the passes over the microbatches and the reductions after them. Must not know:
schedules of learning rate or checkpoints, reports.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ray.commands import mark_of, num_marks
from megatron_ray.distributed import collectives
from megatron_ray.distributed.activity import PROCESS
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.optimizer.finalize_grads import finalize_grads, squared_grad_norm
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.optimizer.step_sums import NUM_FIXED, SkipRule, StepSums
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.reports import StepPart
from megatron_ray.training.rules.injection import PLAIN_JUDGING, Judging, strike_
from megatron_ray.training.stages import loss_sum, run_stages


def no_mark(_: StepPart) -> None:
    """Ignores the end of a part of the step."""


def forward_backward(
    model: ParallelModel,
    mesh: ParallelMesh,
    batches: Sequence[Batch],
    mark: Callable[[StepPart], None] = no_mark,
) -> Tensor:
    """Runs forward and backward over this replica's microbatches.

    Returns the sum of their losses, zero on pipeline ranks without the last stage.
    Afterwards main gradients are sums, and their reductions are running. `mark` is called
    at the end of each forward and backward pass. Raises ValueError without a microbatch.
    """
    model.begin_step()
    if model.has_schedule:
        actions = model.actions(len(batches))
        losses = run_stages(model, mesh, actions, batches, ForwardMode.TRAIN, mark)
        return loss_sum(losses, mesh)
    total: Tensor | None = None
    for index, batch in enumerate(batches):
        PROCESS.microbatch = index
        # A parameter's reduction starts as soon as its last gradient is complete, so the
        # sink must know which microbatch is the last.
        model.sink.begin_microbatch(last=index == len(batches) - 1)
        loss = model.module(batch, ForwardMode.TRAIN)
        mark("forward")
        loss.backward()
        mark("backward")
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("a step needs at least one microbatch")
    return total


def reduce_step(
    model: ParallelModel,
    optimizer: ShardedOptimizer,
    mesh: ParallelMesh,
    loss_sum: Tensor,
    num_tokens: int,
    votes: Sequence[float] = (),
    skip_rule: SkipRule = SkipRule.NEVER,
    judging: Judging = PLAIN_JUDGING,
) -> StepSums:
    """Completes the gradients, then sums the step's numbers over the world.

    Replica groups keep their own sums for their update beside those of the world, in which
    the squared norm is such that the reported norm is the root mean square of the groups'.

    `num_tokens` are this replica's. `votes` are summed too, so that ranks agree on a
    command without a separate collective. `skip_rule` and the run's rules determine
    whether the step changes the model; `judging` is how these judge it. A scaled
    loss has its next scale afterwards.
    """
    model.finish_reductions()
    finalize_grads(optimizer, mesh)
    aux_losses = model.aux_losses.values()
    votes_start = NUM_FIXED + len(aux_losses)
    # fp64, because counts of tokens and sums of squares outgrow the precision of fp32.
    values = torch.zeros(votes_start + len(votes), dtype=torch.float64, device=mesh.device)
    # All ranks of a tp group compute the same loss, so only one counts it.
    if mesh.tp_rank == 0 and model.has_loss:
        values[0] = loss_sum
        values[1] = num_tokens
    values[2] = squared_grad_norm(optimizer, mesh)
    for index, losses in enumerate(aux_losses):
        for loss in losses:
            local_sum = loss.take()
            if local_sum is not None:
                values[NUM_FIXED + index] += local_sum
    # Filled one by one, because a copy from the host would wait for the device.
    for index, vote in enumerate(votes):
        if vote:
            values[votes_start + index].fill_(vote)
    strike_(values, judging.faults, num_tokens, optimizer.rules)
    values = _with_mark(values, model, mesh)
    part: Tensor | None = None
    if optimizer.rules is not None:
        part = values[:NUM_FIXED].clone()
    sums = _sum_over_groups(
        collectives.all_reduce(values, mesh.step_group), mesh, skip_rule
    )
    scaler = optimizer.loss_scaler
    if scaler is not None:
        scale = scaler.scale
        sums = replace(sums, loss_scale=scale, grad_factor=scaler.grad_factor(scale))
    # The numbers of a step that is left out mean nothing.
    if skip_rule is not SkipRule.ALWAYS:
        sums = _judged(sums, optimizer, part, is_confirmed=judging.is_confirmed)
    model.update_expert_biases(mesh, sums.skip)
    model.update_scales(mesh, sums.skip)
    return sums


def _sum_over_groups(values: Tensor, mesh: ParallelMesh, skip_rule: SkipRule) -> StepSums:
    """Returns the sums over the world, given those of this rank's replica group."""
    if mesh.sync_group is None:
        return StepSums(values, skip_rule)
    # Not finite where any group's numbers are not, so that all of them skip the step.
    over_world = collectives.all_reduce(values.clone(), mesh.sync_group)
    # With n groups of t tokens, sqrt(n x sum of squares) / (n x t) is that root mean square.
    over_world[2] *= mesh.dims.replica_groups
    return StepSums(over_world, skip_rule, group_values=values)


def _with_mark(values: Tensor, model: ParallelModel, mesh: ParallelMesh) -> Tensor:
    """Adds the marks of ranks, with this rank's if its own numbers are not finite.

    Nothing is added where own gradients are not checked.
    """
    not_finite = model.not_finite_gradients()
    if not_finite is None:
        return values
    index, bit = mark_of(mesh.rank)
    marks = values.new_zeros(num_marks(mesh.dims.world_size))
    marks[index] = (not_finite | torch.isfinite(values[0]).logical_not()) * bit
    return torch.cat([values, marks])


def _judged(
    sums: StepSums, optimizer: ShardedOptimizer, part: Tensor | None, *, is_confirmed: bool
) -> StepSums:
    """Returns the sums with the verdict of the run's rules; adapts the loss scale."""
    halted: Tensor | None = None
    if optimizer.rules is not None and part is not None:
        verdict = optimizer.rules.judge(sums, part, is_confirmed=is_confirmed)
        sums = replace(sums, verdict=verdict)
        halted = verdict.halted
    if optimizer.loss_scaler is not None:
        optimizer.loss_scaler.update(sums.overflow, halted)
    return sums

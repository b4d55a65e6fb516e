"""Computes the loss over held-out samples.

Must not know: when evaluations are due.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice

import torch

from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.reports import EvalReport
from megatron_ray.training.stages import run_stages

_ROUNDS = 4
"""Microbatches per pipeline run, in multiples of its length. More of them reduce idle
time but need more memory."""


@torch.no_grad()
def evaluate(
    model: ParallelModel,
    batches: Iterable[Batch],
    mesh: ParallelMesh,
    *,
    step: int,
    split: str,
) -> EvalReport:
    """Returns the mean loss per token over every replica's batches.

    All ranks must call it, with the same number of batches.
    """
    # Loss and tokens; summed over the world once, at the end.
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    # All ranks of a tp group compute the same loss, so only one counts it.
    counts_loss = mesh.tp_rank == 0 and model.has_loss
    actions = cache(
        lambda num_microbatches: model.pipeline.evaluation_actions(
            num_microbatches, mesh.pp_rank
        )
    )
    for group in _groups(batches, mesh):
        if model.actions:
            losses = run_stages(model, mesh, actions(len(group)), group, ForwardMode.EVAL)
        else:
            losses = [model.module(batch, ForwardMode.EVAL) for batch in group]
        if counts_loss:
            for loss, batch in zip(losses, group, strict=True):
                sums[0] += loss
                sums[1] += batch.num_tokens
    loss_sum, num_tokens = collectives.all_reduce(sums, mesh.world_group).tolist()
    return EvalReport(step, split, loss_sum / max(num_tokens, 1.0), int(num_tokens))


def _groups(batches: Iterable[Batch], mesh: ParallelMesh) -> Iterator[list[Batch]]:
    """Yields the batches in groups for one run of the pipeline."""
    iterator = iter(batches)
    while group := list(islice(iterator, _ROUNDS * mesh.dims.pp)):
        yield group

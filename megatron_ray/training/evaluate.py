"""Computes the loss over held-out samples.

Must not know: when evaluations are due.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch

from megatron_ray.data.datasets import EvaluationSource
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


@dataclass(frozen=True)
class Evaluation:
    """The held-out samples of a split."""

    sources: Sequence[EvaluationSource]
    batches: Callable[[], Iterable[tuple[int, Batch]]]
    """Returns this replica's batches, each with the number of its source."""


@torch.no_grad()
def evaluate(
    model: ParallelModel,
    evaluation: Evaluation,
    mesh: ParallelMesh,
    *,
    step: int,
    split: str,
) -> EvalReport:
    """Returns the mean loss per token over every replica's batches, and by source.

    All ranks must call it, with the same number of batches.
    """
    # Loss and tokens of each source; summed over the world once, at the end.
    shape = (len(evaluation.sources), 2)
    sums = torch.zeros(shape, dtype=torch.float64, device=mesh.device)
    # All ranks of a tp group compute the same loss, so only one counts it.
    counts_loss = mesh.tp_rank == 0 and model.has_loss
    actions = cache(
        lambda num_microbatches: model.pipeline.evaluation_actions(
            num_microbatches, mesh.pp_rank
        )
    )
    for group in _groups(evaluation.batches(), mesh):
        batches = [batch for _, batch in group]
        if model.has_schedule:
            losses = run_stages(
                model, mesh, actions(len(batches)), batches, ForwardMode.EVAL
            )
        else:
            losses = [model.module(batch, ForwardMode.EVAL) for batch in batches]
        if counts_loss:
            for loss, (source, batch) in zip(losses, group, strict=True):
                sums[source, 0] += loss
                sums[source, 1] += batch.num_tokens
    all_sums = collectives.all_reduce(sums, mesh.world_group).tolist()
    return _report(evaluation.sources, all_sums, step, split)


def _report(
    sources: Sequence[EvaluationSource],
    sums: Sequence[tuple[float, float]],
    step: int,
    split: str,
) -> EvalReport:
    """Returns the report of losses and tokens [sources, 2]."""
    blend_loss = 0.0
    blend_tokens = 0.0
    source_losses = {}
    for source, (loss, num_tokens) in zip(sources, sums, strict=True):
        source_losses[source.name] = loss / max(num_tokens, 1.0)
        if source.in_blend:
            blend_loss += loss
            blend_tokens += num_tokens
    mean_loss = blend_loss / max(blend_tokens, 1.0)
    return EvalReport(step, split, mean_loss, int(blend_tokens), source_losses)


def _groups(
    batches: Iterable[tuple[int, Batch]], mesh: ParallelMesh
) -> Iterator[list[tuple[int, Batch]]]:
    """Yields the batches in groups for one run of the pipeline."""
    iterator = iter(batches)
    while group := list(islice(iterator, _ROUNDS * mesh.dims.pp)):
        yield group

"""Loss over held-out samples. Owns: that. Must not know: when it is asked for."""

from collections.abc import Iterable

import torch

from megatron_ray import collectives
from megatron_ray.data.loader import Batch
from megatron_ray.mesh import ParallelMesh
from megatron_ray.models.gpt import GPT
from megatron_ray.training.reports import EvalReport


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Batch], mesh: ParallelMesh, *, step: int, split: str) -> EvalReport:
    """Mean loss in nats per token over every replica's batches; all ranks must call it, with equally many batches."""
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        loss = model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.position_ids)
        if mesh.tp_rank == 0:
            sums[0] += loss
            sums[1] += batch.num_tokens
    loss_sum, num_tokens = collectives.all_reduce(sums, mesh.world_group).tolist()
    return EvalReport(step, split, loss_sum / max(num_tokens, 1.0), int(num_tokens))

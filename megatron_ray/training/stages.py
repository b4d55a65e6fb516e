"""A rank's pipeline stages at work on a list of microbatches.

Owns: what a stage takes and what is sent. Must not know: schedules.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.pipeline_parallel.runner import PipelineRunner, Transfer
from megatron_ray.pipeline_parallel.schedules.actions import Order
from megatron_ray.pipeline_parallel.schedules.layout import StageContents


def run_stages(
    model: ParallelModel,
    mesh: ParallelMesh,
    actions: Order,
    batches: Sequence[Batch],
    mode: ForwardMode,
) -> list[Tensor]:
    """Executes a rank's list on these microbatches; the losses by microbatch where the
    last stage is, else none.
    """
    chunks = [_chunk(model, stage, batches, mode) for stage in model.module.stages]
    return PipelineRunner(
        actions,
        model.pipeline.stages,
        chunks,
        mesh.pp_group,
        _transfer(model, mesh, batches[0]),
        model.sink,
    ).step()


def _chunk(
    model: ParallelModel,
    stage: StageContents,
    batches: Sequence[Batch],
    mode: ForwardMode,
) -> Callable[[Tensor | None, int], Tensor]:
    def run(received_TH: Tensor | None, microbatch: int) -> Tensor:
        return model.module.stage(stage, received_TH, batches[microbatch], mode)

    return run


def _transfer(model: ParallelModel, mesh: ParallelMesh, batch: Batch) -> Transfer:
    """Between stages each tp rank sends its tokens only under sequence parallelism, and
    all of them otherwise.
    """
    tokens = batch.tokens_BS.numel() // (mesh.dims.tp if model.sequence_parallel else 1)
    return Transfer((tokens, model.module.config.hidden_size), model.dtype, mesh.device)


def loss_sum(losses: Sequence[Tensor], mesh: ParallelMesh) -> Tensor:
    """Their sum; zero on ranks that have none."""
    return (
        torch.stack(list(losses)).sum() if losses else torch.zeros((), device=mesh.device)
    )

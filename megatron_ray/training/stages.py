"""Runs a rank's pipeline stages over a list of microbatches.

Owns: the inputs of a stage and its messages. Must not know: schedules.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.pipeline_parallel.runner import PipelineRunner, Transfer
from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.reports import StepPart

_PART_OF: dict[Op, StepPart] = {
    Op.FORWARD: "forward",
    Op.SEND_FORWARD: "forward",
    Op.RECV_FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward",
    Op.BACKWARD_WEIGHT: "backward",
    Op.SEND_BACKWARD: "backward",
    Op.RECV_BACKWARD: "backward",
}
"""The pass that each action of a schedule belongs to; its waits are communication."""


def run_stages(
    model: ParallelModel,
    mesh: ParallelMesh,
    actions: Order,
    batches: Sequence[Batch],
    mode: ForwardMode,
    mark: Callable[[StepPart], None] | None = None,
) -> list[Tensor]:
    """Executes a rank's list of actions on these microbatches.

    `mark` is called with the pass that an action belongs to at its end, and where it is
    interrupted by another one. Returns the losses by microbatch on the rank of the last
    stage, else none.
    """
    # A new runner per call, because evaluations have other actions and maybe other shapes.
    chunks = [_chunk(model, stage, batches, mode) for stage in model.module.stages]
    return PipelineRunner(
        actions,
        model.pipeline.stages,
        chunks,
        mesh.pp_group,
        _transfer(model, mesh, batches[0]),
        mesh.interleaver,
        model.sink,
        _marker(mark),
    ).step()


def _marker(
    mark: Callable[[StepPart], None] | None,
) -> Callable[[Action], None] | None:
    """Returns what the runner calls at the end of an action."""
    if mark is None:
        return None
    return lambda action: mark(_PART_OF[action.op])


def _chunk(
    model: ParallelModel,
    stage: StageContents,
    batches: Sequence[Batch],
    mode: ForwardMode,
) -> Callable[[Tensor | None, int], Tensor]:
    """Returns the function that runs a stage on a microbatch, given by number."""

    def run(received_TH: Tensor | None, microbatch: int) -> Tensor:
        return model.module.stage(stage, received_TH, batches[microbatch], mode)

    return run


def _transfer(model: ParallelModel, mesh: ParallelMesh, batch: Batch) -> Transfer:
    """Returns the format of messages between stages: [tokens, hidden size].

    Each tp rank sends its own tokens under sequence parallelism, and all of them otherwise.
    """
    num_tokens = batch.tokens_BS.numel()
    if model.sequence_parallel:
        num_tokens //= mesh.dims.tp
    shape = (num_tokens, model.module.config.hidden_size)
    return Transfer(shape, model.hidden_dtype, mesh.device)


def loss_sum(losses: Sequence[Tensor], mesh: ParallelMesh) -> Tensor:
    """Returns the sum of the losses, zero on ranks that have none."""
    if not losses:
        return torch.zeros((), device=mesh.device)
    return torch.stack(list(losses)).sum()

"""Counts what autograd keeps of the blocks of a model, on whichever rank this runs."""

import torch
from torch import Tensor

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.forward_context import ForwardContext, ForwardMode
from megatron_ray.models.gpt import GPT
from megatron_ray.training.session import batch_maker, build
from tests.support.parity import RandomDataset


def blocks_of(
    config: TrainConfig, mesh: ParallelMesh
) -> tuple[GPT, Tensor, ForwardContext]:
    """A model, what its first block takes, and its context."""
    model, _ = build(config, mesh)
    dataset = RandomDataset(config.model.vocabulary, config.training.seq_length)
    size = config.training.micro_batch_size
    batch = StepLoader(
        dataset,
        size,
        size * mesh.dims.dp,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh),
    ).step(0)[0]
    hidden = (
        model.module._embed(batch.tokens_BS, batch.position_ids).detach().requires_grad_()
    )
    context = model.module.forward_context(batch, ForwardMode.TRAIN, hidden)
    model.sink.begin_microbatch(last=False)
    return model.module, hidden, context


def kept_bytes(config: TrainConfig, mesh: ParallelMesh) -> int:
    """Storages that autograd holds between forward and backward; parameters and the
    angles that all layers share are left out.
    """
    model, hidden, context = blocks_of(config, mesh)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.run_blocks(model.layers.values(), hidden, context)
    shared = [
        *model.parameters(),
        *(angles for angles in (context.cos, context.sin) if angles is not None),
    ]
    not_counted = {tensor.untyped_storage()._cdata for tensor in shared}
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in saved
    }
    assert output.requires_grad  # and alive, so that nothing above has been freed
    return sum(size for storage, size in storages.items() if storage not in not_counted)

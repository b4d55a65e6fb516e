"""What a rank holds of logical tensors, as boxes over live memory. Owns: the state's types, and how torch.distributed.checkpoint
sees them. Must not know: files, layouts, what the tensors mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_ray.parameters import Box


@dataclass
class TensorBox:
    """A box of a logical tensor and the memory that holds it."""

    box: Box
    tensor: torch.Tensor
    """A view of live memory, shape == box.size."""

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != self.box.size:
            raise ValueError(f"a tensor of shape {tuple(self.tensor.shape)} does not fill a box of size {self.box.size}")


@dataclass
class ShardedTensor:
    """The boxes of one logical tensor that this rank holds; boxes of all ranks together cover it, replicas are equal boxes.

    Implements the checkpointable protocol of torch.distributed.checkpoint, whose planner removes replicas and whose resharding
    finds the overlaps of any saved layout with any wanted one.
    """

    shape: tuple[int, ...]
    boxes: list[TensorBox]

    def held(self) -> Iterator[TensorBox]:
        """Boxes with elements in them."""
        return (held for held in self.boxes if held.box.num_elements)

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, held.box.offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(held.box), TensorProperties(dtype=held.tensor.dtype), torch.Size(self.shape)),
            )
            for held in self.held()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(held.box) for held in self.held()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for held in self.held():
            if held.box.offset == tuple(index.offset or ()):
                return held.tensor.detach()
        raise KeyError(f"{index.fqn}: no box at {index.offset} on this rank")


ShardedState = dict[str, ShardedTensor]
"""`model/<logical name>`, `optimizer/exp_avg/<logical name>`, `optimizer/exp_avg_sq/<logical name>` -> what this rank holds."""


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size))

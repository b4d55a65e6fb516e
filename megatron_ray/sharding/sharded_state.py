"""Describes a rank's state for a checkpoint: boxes of logical tensors over live memory.

Must not know: files, layouts, the meaning of tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ray.sharding.boxes import Box


@dataclass
class TensorBox:
    """A box of a logical tensor and the memory of its elements."""

    box: Box
    tensor: torch.Tensor
    """A view of live memory, shape == box.size."""

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != self.box.size:
            raise ValueError(
                f"a tensor of shape {tuple(self.tensor.shape)} does not fill a box of size "
                f"{self.box.size}"
            )


@dataclass
class ShardedTensor:
    """This rank's boxes of one logical tensor.

    Boxes of all ranks together cover it; replicas are equal boxes.
    """

    shape: tuple[int, ...]
    boxes: list[TensorBox]

    def nonempty(self) -> Iterator[TensorBox]:
        """Yields the boxes with elements in them."""
        for part in self.boxes:
            if part.box.num_elements:
                yield part

    def memory(self, box: Box) -> torch.Tensor:
        """Returns the live memory of one of this rank's boxes, without gradient history.

        Raises KeyError when it is not on this rank.
        """
        for part in self.nonempty():
            if part.box == box:
                return part.tensor.detach()
        raise KeyError(f"no {box} on this rank")


ShardedState = dict[str, ShardedTensor]
"""This rank's boxes by `model/<logical name>`, `optimizer/<state>/<logical name>`, where
`<state>` is the optimizer's name for it, such as exp_avg."""


def whole_tensor(tensor: torch.Tensor) -> ShardedTensor:
    """Describes a tensor that is complete on a rank."""
    shape = tuple(tensor.shape)
    return ShardedTensor(shape, [TensorBox(Box((0,) * len(shape), shape), tensor)])

"""What a rank holds of logical tensors, as boxes over live memory.

Owns: the state's types. Must not know: files, layouts, what the tensors mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ray.sharding.boxes import Box


@dataclass
class TensorBox:
    """A box of a logical tensor and the memory that holds it."""

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
    """The boxes of one logical tensor that this rank holds; boxes of all ranks together
    cover it, replicas are equal boxes.
    """

    shape: tuple[int, ...]
    boxes: list[TensorBox]

    def held(self) -> Iterator[TensorBox]:
        """Boxes with elements in them."""
        return (held for held in self.boxes if held.box.num_elements)

    def memory(self, box: Box) -> torch.Tensor:
        """The live memory of a box held here, without gradient history.

        Raises KeyError when it is not.
        """
        for held in self.held():
            if held.box == box:
                return held.tensor.detach()
        raise KeyError(f"no {box} on this rank")


ShardedState = dict[str, ShardedTensor]
"""`model/<logical name>`, `optimizer/exp_avg/<logical name>`,
`optimizer/exp_avg_sq/<logical name>` -> what this rank holds."""


def whole_tensor(tensor: torch.Tensor) -> ShardedTensor:
    """Of a tensor that a rank holds whole."""
    shape = tuple(tensor.shape)
    return ShardedTensor(shape, [TensorBox(Box((0,) * len(shape), shape), tensor)])

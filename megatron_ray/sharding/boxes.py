"""Defines boxes: n-dimensional blocks of logical tensors. Pure Python."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """An n-dimensional block of a logical tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements inside."""
        return prod(self.size)

    def intersection(self, other: "Box") -> "Box | None":
        """Returns the intersection of two boxes of the same tensor.

        None when they are disjoint.
        """
        offset = []
        size = []
        for dim in range(len(self.size)):
            start = max(self.offset[dim], other.offset[dim])
            own_end = self.offset[dim] + self.size[dim]
            end = min(own_end, other.offset[dim] + other.size[dim])
            if start >= end:
                return None
            offset.append(start)
            size.append(end - start)
        return Box(tuple(offset), tuple(size))

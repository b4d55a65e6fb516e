"""Boxes: n-dimensional blocks of logical tensors.

Pure. Must not know: who holds which.
"""

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
        """What lies in both; None when they have no element in common.

        Both are of the same tensor.
        """
        spans = list(zip(self.offset, self.size, other.offset, other.size, strict=True))
        start = tuple(max(mine, theirs) for mine, _, theirs, _ in spans)
        end = tuple(
            min(mine + length, theirs + extent) for mine, length, theirs, extent in spans
        )
        size = tuple(high - low for low, high in zip(start, end, strict=True))
        return Box(start, size) if all(length > 0 for length in size) else None

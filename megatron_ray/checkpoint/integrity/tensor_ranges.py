"""Names the tensors in a range of a checkpoint file's bytes.

Torch-free. Must not know: dtypes, how files are read.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

_MAX_NAMED = 3


class TensorRanges:
    """Where tensors begin in the files of a checkpoint."""

    def __init__(self, index: Mapping[str, Any]) -> None:
        """Takes the content of index.json."""
        starts_by_rank: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for name, entry in index["tensors"].items():
            for _, _, rank, start in entry["chunks"]:
                starts_by_rank[rank].append((start, name))
        self._starts: dict[str, list[int]] = {}
        self._names: dict[str, list[str]] = {}
        for rank, starts in starts_by_rank.items():
            ordered = sorted(starts)
            file = f"data/rank-{rank:05d}.bin"
            self._starts[file] = [start for start, _ in ordered]
            self._names[file] = [name for _, name in ordered]

    def between(self, file: str, first: int, end: int) -> list[str]:
        """Returns the tensors with bytes from `first` to before `end`, in their order."""
        starts = self._starts.get(file, [])
        names = self._names.get(file, [])
        low = max(0, bisect_right(starts, first) - 1)
        return list(dict.fromkeys(names[low : bisect_left(starts, end)]))

    def words(self, file: str, first: int, end: int) -> str:
        """Returns such tensors as part of a sentence; empty for a file without tensors."""
        names = self.between(file, first, end)
        if not names:
            return ""
        shown = ", ".join(names[:_MAX_NAMED])
        if len(names) > _MAX_NAMED:
            shown += f" and {len(names) - _MAX_NAMED} more"
        return f", in {shown}"

"""Splits sequences over context-parallel ranks in a zig-zag.

The cost of causal attention grows with a token's position, so with cp equal parts in
order the first rank would be idle. Sequences are split into 2 cp chunks instead, and
rank r has chunks r and 2 cp - 1 - r (as in Llama 3 and Megatron-LM): a cheap and an
expensive one. Torch-free. Must not know: batches, groups.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SequenceCut:
    """The part of every sequence on one of `cp` ranks, in memory order."""

    cp: int = 1
    rank: int = 0

    @property
    def chunks(self) -> tuple[int, int]:
        """Indices of its two chunks, out of 2 cp."""
        return self.rank, 2 * self.cp - 1 - self.rank

    def positions(self, length: int) -> npt.NDArray[np.int64]:
        """Returns the rank's indices into a sequence of `length` tokens.

        Raises ValueError when 2 cp does not divide the length.
        """
        if self.cp == 1:
            return np.arange(length, dtype=np.int64)
        chunk, rest = divmod(length, 2 * self.cp)
        if rest:
            raise ValueError(
                f"a sequence of {length} tokens is no multiple of 2 x cp = {2 * self.cp}"
            )
        in_chunk = np.arange(chunk, dtype=np.int64)
        first, second = self.chunks
        return np.concatenate([first * chunk + in_chunk, second * chunk + in_chunk])

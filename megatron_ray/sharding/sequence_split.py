"""Cuts sequences among context-parallel ranks, in a zig-zag.

Causal attention costs a token as much as it has before it, so cutting a sequence into cp
equal parts in order would leave the first rank idle. It is cut into 2 cp chunks instead,
and rank r has chunks r and 2 cp - 1 - r (as in Llama 3 and Megatron-LM): a cheap one and
a dear one. Torch-free. Must not know: batches, groups.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SequenceCut:
    """The part of every sequence that one of `cp` ranks has, in the order in memory."""

    cp: int = 1
    rank: int = 0

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of its two chunks, of 2 cp."""
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

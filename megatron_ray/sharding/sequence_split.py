"""Which tokens of a sequence a context-parallel rank has.

Owns: the zig-zag cut. Torch-free. Must not know: batches, groups.

Causal attention costs a token as much as it has before it, so cutting a sequence into
cp equal parts in order would leave the first rank idle. It is cut into 2 cp chunks
instead, and rank r has chunks r and 2 cp - 1 - r (Llama 3 and Megatron-LM do so): one
cheap, one dear.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SequenceCut:
    """The part of every sequence that one of `cp` ranks has, in the order in which it
    lies there.
    """

    cp: int = 1
    rank: int = 0

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of its two chunks, of 2 cp."""
        return self.rank, 2 * self.cp - 1 - self.rank

    def positions(self, length: int) -> npt.NDArray[np.int64]:
        """Indices into a sequence of `length` tokens.

        Raises ValueError when 2 cp does not divide it.
        """
        if self.cp == 1:
            return np.arange(length, dtype=np.int64)
        chunk, rest = divmod(length, 2 * self.cp)
        if rest:
            raise ValueError(
                f"a sequence of {length} tokens is no multiple of 2 x cp = {2 * self.cp}"
            )
        return np.concatenate(
            [
                np.arange(number * chunk, (number + 1) * chunk, dtype=np.int64)
                for number in self.chunks
            ]
        )

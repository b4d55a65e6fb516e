"""Serves the samples of a run that was lengthened, none of them twice in a pass.

Owns: the order over several datasets of one corpus. Must not know: files, blends, ranks.

The order of a GPTDataset depends on its number of samples, so a run that asks for more of
them would get another order, and with it samples again that it has used. Instead the
first order is used up, which contains every sample of its passes once, and another one,
drawn for what is missing, follows it.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megatron_ray.data.blend import SampleDataset


class LengthenedDataset:
    """Datasets one after another."""

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Returns sample `index` as [seq_length + 1] token ids. Raises IndexError."""
        part, sample = self._locate(index)
        return part[sample]

    def document_starts(self, index: int) -> npt.NDArray[np.bool_]:
        """Returns [seq_length + 1], which tokens of sample `index` begin a document.

        Raises IndexError.
        """
        part, sample = self._locate(index)
        return part.document_starts(sample)

    def _locate(self, index: int) -> tuple[SampleDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        start = self._ends[number] - len(self._parts[number])
        return self._parts[number], index - start


def build_lengthened(
    sizes: Sequence[int], build_part: Callable[[int, int], SampleDataset]
) -> SampleDataset:
    """Returns a dataset of at least the last of `sizes`, which grow.

    `build_part(number, size)` returns part `number` with at least `size` samples.
    """
    parts = [build_part(0, sizes[0])]
    num_samples = len(parts[0])
    for size in sizes[1:]:
        # The rest of the passes so far may be enough.
        if size > num_samples:
            parts.append(build_part(len(parts), size - num_samples))
            num_samples += len(parts[-1])
    if len(parts) == 1:
        return parts[0]
    return LengthenedDataset(parts)

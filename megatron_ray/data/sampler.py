"""Which samples a rank takes in a step.

Owns: the order over ranks. Must not know: datasets, tensors.
"""

import numpy as np
import numpy.typing as npt


def sample_ids(
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp: int,
    num_microbatches: int,
) -> npt.NDArray[np.int64]:
    """[num_microbatches, micro_batch_size] ids of one replica for the step that starts
    after `consumed_samples`.

    A step takes the ids from `consumed_samples` on, in order; microbatch m of replica r is block m
    * dp + r of them, as in Megatron. So the set a step consumes, and the blocks it is cut into, do
    not depend on dp: resume and resize see the same data. Raises ValueError when an argument is out
    of range.
    """
    if (
        consumed_samples < 0
        or micro_batch_size < 1
        or num_microbatches < 1
        or not 0 <= dp_rank < dp
    ):
        raise ValueError(
            f"{consumed_samples=} {micro_batch_size=} {dp_rank=} {dp=} {num_microbatches=}"
        )
    blocks = np.arange(num_microbatches, dtype=np.int64) * dp + dp_rank
    return (
        consumed_samples + blocks[:, None] * micro_batch_size + np.arange(micro_batch_size)
    )

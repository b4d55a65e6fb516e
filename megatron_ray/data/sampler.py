"""Chooses the samples that a rank takes in a step.

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
    """Returns [num_microbatches, micro_batch_size] ids of one replica for one step.

    A step takes the ids from `consumed_samples` on, in order; microbatch m of replica r
    is block m * dp + r of them, as in Megatron. So the set a step consumes, and the
    blocks it is cut into, do not depend on dp: resume and resize use the same data.
    Raises ValueError when an argument is out of range.
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
    # Blocks of micro_batch_size samples are dealt to the replicas in turn.
    blocks = np.arange(num_microbatches, dtype=np.int64) * dp + dp_rank
    first_ids = consumed_samples + blocks * micro_batch_size
    return first_ids[:, None] + np.arange(micro_batch_size)

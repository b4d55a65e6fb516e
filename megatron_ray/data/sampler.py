"""Chooses the samples of a rank in a step.

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

    A step uses the ids from `consumed_samples` on, in order; microbatch m of replica r
    is block m * dp + r of them, as in Megatron. So the samples of a step, and its
    blocks, do not depend on dp: a run that resumes with another dp uses the same data.
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
    # Blocks of micro_batch_size samples are assigned to the replicas round-robin.
    blocks = np.arange(num_microbatches, dtype=np.int64) * dp + dp_rank
    first_ids = consumed_samples + blocks * micro_batch_size
    return first_ids[:, None] + np.arange(micro_batch_size)

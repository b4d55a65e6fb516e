"""Compares the bytes that a run's checkpoints need with the free space of its storage.

Pure. Must not know: storage, how free space is measured.
"""

from megatron_ray.config.optimizer_kinds import state_bytes
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.parameters import freeze, local_parameters

_FP32_BYTES = 4
_COUNT_BYTES = 8
_BYTES_TOKENIZER = 257


def checkpoint_bytes(config: TrainConfig) -> int:
    """Returns the bytes of all tensors of one checkpoint.

    Main parameters are in fp32 whatever the precision; frozen parameters have no state
    and the precision of the model. Without the small files beside the tensors, which take
    some hundred kilobytes. A vocabulary that is not known before the data are prepared
    counts as small as it can be.
    """
    model = config.model
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": _least_vocabulary(config)})
    frozen_bytes = _FP32_BYTES
    if config.training.precision != "fp32":
        frozen_bytes = 2
    # Each replica group has weights and moments of its own; the first one has the outer
    # optimizer's state for all of them.
    groups = config.parallel.replica_groups
    outer_width = _FP32_BYTES * config.parallel.outer_copies
    num_bytes = 0
    table = freeze(local_parameters(model, ParallelDims(), 0), config.optimizer.freeze)
    for local in table:
        for part in local.parts:
            width = frozen_bytes * groups
            if local.trainable:
                is_matrix = part.logical.is_matrix
                width = _FP32_BYTES + state_bytes(config.optimizer, of_matrix=is_matrix)
                width = width * groups + outer_width
            num_bytes += part.logical.num_elements * width
    if config.callbacks.unigram is not None:
        num_bytes += model.vocabulary * _COUNT_BYTES
    return num_bytes


def _least_vocabulary(config: TrainConfig) -> int:
    if config.data.tokenizer.kind == "bytes":
        return _BYTES_TOKENIZER
    # A tokenizer that is trained, or read from a file, may have any size.
    return 2


def num_checkpoints(config: TrainConfig) -> int:
    """Returns how many checkpoints the storage contains at once, at most.

    One more than are kept: an old one is deleted once a newer one is committed.
    """
    every = config.checkpoint.every_steps
    steps = config.training.known_steps
    if every is None:
        return 1
    most = config.checkpoint.keep_last + 1
    if steps is None:
        return most
    # The last step is saved too.
    return min(most, -(-steps // every))


def space_problems(
    config: TrainConfig, path: str, free_bytes: int | None, existing_bytes: int = 0
) -> list[Problem]:
    """Returns a problem when the checkpoints do not fit the free space of `path`.

    `free_bytes` is None where the storage does not limit it; `existing_bytes` are those
    of the run's own checkpoints, which later ones replace.
    """
    one = checkpoint_bytes(config)
    count = num_checkpoints(config)
    needed = one * count - existing_bytes
    if free_bytes is None or needed <= free_bytes:
        return []
    demand = f"a checkpoint needs {_megabytes(needed)}"
    if count > 1:
        demand = (
            f"{count} checkpoints of {_megabytes(one)} each need {_megabytes(needed)} "
            f"(checkpoint.keep_last={config.checkpoint.keep_last}, and the next one before the "
            "oldest is deleted)"
        )
    remedy = "free some space, or use another folder"
    if count > 1 and config.checkpoint.keep_last > 1:
        remedy = "free some space, lower checkpoint.keep_last, or use another folder"
    detail = f"{path} has {_megabytes(free_bytes)} free, but {demand}; {remedy}"
    return [Problem("/storage/path", "disk_space", detail)]


def _megabytes(num_bytes: int) -> str:
    return f"{max(num_bytes, 0) / 1e6:,.1f} MB"

"""Checks that a run's storage can be written and has room for its checkpoints.

Owns: measuring both. Torch-free. Must not know: how much a checkpoint needs.
"""

from megatron_ray.checkpoint.directory import list_checkpoints
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.files import check_writable, free_bytes
from megatron_ray.storage.location import parse_location
from megatron_ray.validation.storage.disk_space import space_problems


def writable_problems(storage_path: str) -> list[Problem]:
    """Returns a problem when a path cannot be written."""
    try:
        check_writable(parse_location(storage_path))
    except StorageError as error:
        return [_not_usable(storage_path, error)]
    return []


def room_problems(config: TrainConfig, storage_path: str) -> list[Problem]:
    """Returns a problem when a run's checkpoints do not fit under a path."""
    try:
        existing_bytes = 0
        for info in list_checkpoints(storage_path):
            # Damaged ones are not replaced by newer ones.
            if info.committed:
                existing_bytes += info.bytes
        free = free_bytes(parse_location(storage_path))
    except StorageError as error:
        return [_not_usable(storage_path, error)]
    return space_problems(config, storage_path, free, existing_bytes)


def _not_usable(storage_path: str, error: StorageError) -> Problem:
    detail = (
        f"{storage_path} cannot be written where the job runs: {error.cause}; give a folder "
        "or URI that it may write"
    )
    return Problem("/storage/path", "not_writable", detail)

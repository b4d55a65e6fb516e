"""Checks that a run's storage can be written and has room for its checkpoints.

Owns: measuring both. Torch-free. Must not know: how much a checkpoint needs.
"""

from megatron_ray.checkpoint.directory import list_checkpoints
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.files import check_writable, free_bytes
from megatron_ray.storage.location import parse_location
from megatron_ray.validation.disk_space import space_problems


def storage_problems(config: TrainConfig, storage_path: str) -> list[Problem]:
    """Returns why a run cannot write its checkpoints under a path, if so."""
    try:
        location = parse_location(storage_path)
        check_writable(location)
        existing_bytes = 0
        for info in list_checkpoints(storage_path):
            # Damaged ones are not replaced by newer ones.
            if info.committed:
                existing_bytes += info.bytes
        return space_problems(config, storage_path, free_bytes(location), existing_bytes)
    except StorageError as error:
        detail = (
            f"{storage_path} cannot be written where the job runs: {error.cause}; give a "
            "folder or URI that it may write"
        )
        return [Problem("/storage/path", "not_writable", detail)]

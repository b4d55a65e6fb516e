"""What a checkpoint says beside its tensors: the run's progress, its config, its
tokenizer's name.

Owns: those files. Torch-free.

Must not know: tensors, what a run does with it.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_ray.checkpoint.directory import (
    CheckpointError,
    check_format_version,
    read_manifest,
)
from megatron_ray.config.model import ModelConfig
from megatron_ray.storage.storage import open_storage

TRAIN_STATE = "train_state.json"
TOKENIZER = "tokenizer.json"
"""Put beside the tensors by a run that trains on text, so that a checkpoint can speak
by itself."""


def rank_state_file(rank: int) -> str:
    """What only one rank knows, inside a checkpoint."""
    return f"train_state/rank-{rank:05d}.json"


def read_train_state(path: str, rank: int) -> dict[str, Any]:
    """What the run saved beside the tensors, with this rank's own part (`rng`) where
    the saving layout had such a rank.

    Raises CheckpointError when the checkpoint is not committed, torn, or newer.
    """
    files = read_manifest(path)["files"]
    storage = open_storage(path)
    parts = (
        [TRAIN_STATE, rank_state_file(rank)]
        if rank_state_file(rank) in files
        else [TRAIN_STATE]
    )
    state: dict[str, Any] = {}
    for part in parts:
        try:
            state.update(json.loads(storage.read_bytes(part)))
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise CheckpointError(
                "load", path, f"{part} is not readable: {error}"
            ) from error
    check_format_version(path, state)
    return state


def saved_model(path: str, train_state: Mapping[str, Any]) -> ModelConfig:
    """The model of a checkpoint of ours.

    Raises CheckpointError when it does not say.
    """
    try:
        return ModelConfig.model_validate(train_state["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "read", path, f"it does not say which model it holds: {error}"
        ) from error

"""Reads the parts of a checkpoint that are not tensors.

Owns: the files with the run's progress, config and tokenizer. Torch-free. Must not
know: tensors, how a run uses these files.
"""

import codecs
import json
from collections.abc import Mapping
from typing import Any

from megatron_ray.checkpoint.directory import (
    CheckpointError,
    DamagedCheckpointError,
    check_format_version,
    read_manifest,
)
from megatron_ray.checkpoint.integrity.digests import CheckedFiles
from megatron_ray.config.model import ModelConfig
from megatron_ray.storage.errors import MissingFileError
from megatron_ray.storage.storage import open_storage

TRAIN_STATE = "train_state.json"
TOKENIZER = "tokenizer.json"
"""Written by a run that trains on text, so that generation needs only the checkpoint."""


def rank_state_file(rank: int) -> str:
    """Returns the name of the file with the state of one rank, inside a checkpoint."""
    return f"train_state/rank-{rank:05d}.json"


def read_train_state(path: str, rank: int) -> dict[str, Any]:
    """Returns the saved state of the run other than tensors.

    It contains this rank's own part (`rng`) if the saving layout had such a rank.
    Raises CheckpointError when the checkpoint is not committed or newer,
    DamagedCheckpointError when it is incomplete or has other bytes than were written.
    """
    all_names = tuple(read_manifest(path)["files"])
    files = CheckedFiles(open_storage(path), path, all_names)
    names = [TRAIN_STATE]
    # More ranks may load a checkpoint than have saved it.
    if rank_state_file(rank) in all_names:
        names.append(rank_state_file(rank))
    state: dict[str, Any] = {}
    for name in names:
        try:
            state.update(json.loads(files.read_bytes(name)))
        except (TypeError, ValueError) as error:
            cause = f"{name} is not readable: {error}"
            raise DamagedCheckpointError("load", path, cause) from error
    # The manifest's version is checked already; this one covers the fields read here.
    check_format_version(path, state)
    return state


def read_tokenizer(path: str) -> str | None:
    """Returns the tokenizer.json of a checkpoint; None when it was written without one.

    Raises CheckpointError when the checkpoint is not committed or newer,
    DamagedCheckpointError when it is incomplete or has other bytes than were written.
    """
    names = tuple(read_manifest(path)["files"])
    try:
        content = CheckedFiles(open_storage(path), path, names).read_bytes(TOKENIZER)
        # In checkpoints without digests an editor may have added a byte order mark.
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except MissingFileError:
        return None
    except UnicodeDecodeError as error:
        cause = f"{TOKENIZER} is not readable: {error}"
        raise DamagedCheckpointError("load", path, cause) from error


def saved_model(path: str, train_state: Mapping[str, Any]) -> ModelConfig:
    """Returns the model of a native checkpoint.

    Raises CheckpointError when its train state has no valid model.
    """
    try:
        return ModelConfig.model_validate(model_values(train_state))
    except (KeyError, TypeError, ValueError) as error:
        cause = f"it does not say which model it holds: {error}"
        raise CheckpointError("read", path, cause) from error


def model_values(train_state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a saved model as this version reads them.

    Raises KeyError, TypeError or ValueError for a train state without a model.
    """
    values = dict(train_state["config"]["model"])
    # Earlier versions had one eps for all norms.
    if values.get("mla") is not None:
        values["mla"] = {"norm_eps": values["norm_eps"], **values["mla"]}
    return values

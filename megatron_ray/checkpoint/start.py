"""Weights that a new run begins with: a committed checkpoint of ours or a Hugging Face folder. Owns: telling the two apart.

Must not know: optimizers, layouts, the run.
"""

from typing import Protocol

from megatron_ray.checkpoint.directory import COMMITTED, CheckpointError
from megatron_ray.checkpoint.hf.exporting import saved_model
from megatron_ray.checkpoint.hf.files import is_hf_folder
from megatron_ray.checkpoint.hf.weights import HfWeights
from megatron_ray.checkpoint.load import SavedCheckpoint, read_train_state
from megatron_ray.checkpoint.sharded_state import ShardedState
from megatron_ray.checkpoint.storage import open_storage
from megatron_ray.config.model import ModelConfig


class StartingWeights(Protocol):
    """The weights of a model, read box by box."""

    @property
    def model(self) -> ModelConfig:
        """What they were made for."""

    def load_into(self, state: ShardedState) -> None:
        """Fills every `model/...` box of `state`. Raises CheckpointError."""


class SavedWeights:
    """The weights of a checkpoint of ours, its moments and progress left alone."""

    def __init__(self, path: str) -> None:
        self.model = saved_model(path, read_train_state(path, 0))
        self._saved = SavedCheckpoint(path)

    def load_into(self, state: ShardedState) -> None:
        """Fills every `model/...` box of `state`."""
        self._saved.load_into(state)


def open_weights(path: str) -> StartingWeights:
    """Whatever of the two lies at a path or URI. Raises CheckpointError for what is damaged, ConfigProblem for what is not supported."""
    if open_storage(path).exists(COMMITTED):
        return SavedWeights(path)
    if is_hf_folder(path):
        return HfWeights(path)
    text = "it is neither a committed checkpoint (no COMMITTED marker) nor a folder in Hugging Face's format (no config.json)"
    raise CheckpointError("read", path, text)

"""What a run begins with, as far as that is known without reading a tensor.

Owns: telling a checkpoint of ours from a Hugging Face folder, and whether a run's model
is the one that the weights were made for. Torch-free. Must not know: tensors,
optimizers.
"""

from megatron_ray.checkpoint.directory import COMMITTED, CheckpointError
from megatron_ray.checkpoint.hf.files import is_hf_folder
from megatron_ray.checkpoint.hf.folder import HfFolder
from megatron_ray.checkpoint.train_state import read_train_state, saved_model
from megatron_ray.config.checkpoint import CheckpointConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError, Problem
from megatron_ray.storage.storage import open_storage
from megatron_ray.validation.initial_weights import contradictions, with_vocabulary_of


def is_native_checkpoint(path: str) -> bool:
    """Whether a committed checkpoint of ours lies at a path or URI, or else a Hugging
    Face folder.

    Raises CheckpointError for neither.
    """
    if open_storage(path).exists(COMMITTED):
        return True
    if is_hf_folder(path):
        return False
    text = (
        "it is neither a committed checkpoint (no COMMITTED marker) nor a folder in Hugging "
        "Face's format (no config.json)"
    )
    raise CheckpointError("read", path, text)


def initial_model(path: str) -> ModelConfig:
    """The model of the weights at a path or URI. Raises CheckpointError for what is
    damaged, ConfigError for what is not supported.
    """
    return (
        saved_model(path, read_train_state(path, 0))
        if is_native_checkpoint(path)
        else HfFolder(path).model
    )


def begin(
    checkpoint: CheckpointConfig, model: ModelConfig
) -> tuple[ModelConfig, list[Problem]]:
    """A run's model with the vocabulary of the weights that it begins with, and what
    contradicts them. As it is without such weights.
    """
    if checkpoint.start_from is None:
        return model, []
    try:
        weights = initial_model(checkpoint.start_from)
    except (CheckpointError, ConfigError) as error:
        return model, [Problem("/checkpoint/start_from", "start_from", str(error))]
    model = with_vocabulary_of(model, weights)
    return model, contradictions(model, weights)

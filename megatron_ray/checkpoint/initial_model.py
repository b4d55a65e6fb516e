"""Resolves the model of a run that starts from given weights, without loading them.

Owns: telling native checkpoints from Hugging Face folders, and checking a run's model
against the weights. Torch-free; `initial_weights` loads the tensors. Must not know:
optimizers.
"""

from dataclasses import replace

from megatron_ray.checkpoint.directory import (
    COMMITTED,
    CheckpointError,
    contained_checkpoint,
)
from megatron_ray.checkpoint.hf.files import is_hf_folder
from megatron_ray.checkpoint.hf.folder import HfFolder
from megatron_ray.checkpoint.train_state import read_train_state, saved_model
from megatron_ray.config.checkpoint import CheckpointConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import ConfigError, Problem
from megatron_ray.storage.storage import open_storage
from megatron_ray.validation.initial_weights import contradictions, with_vocabulary_of


def is_native_checkpoint(path: str) -> bool:
    """Returns True for a committed native checkpoint, False for a Hugging Face folder.

    Raises CheckpointError when neither is at the path or URI.
    """
    # An uncommitted checkpoint has no config.json either, so it raises the error below.
    if open_storage(path).exists(COMMITTED):
        return True
    if is_hf_folder(path):
        return False
    cause = contained_checkpoint(path) or (
        "it is neither a committed checkpoint (no COMMITTED marker) nor a folder in Hugging "
        "Face's format (no config.json); give the folder that holds one of the two"
    )
    raise CheckpointError("read", path, cause)


def initial_model(path: str) -> ModelConfig:
    """Returns the model of the weights at a path or URI.

    Raises CheckpointError for damaged files, ConfigError for unsupported models.
    """
    if is_native_checkpoint(path):
        return saved_model(path, read_train_state(path, 0))
    return HfFolder(path).model


def resolve_initial_model(
    checkpoint: CheckpointConfig, model: ModelConfig, *, compare_copies: bool = False
) -> tuple[ModelConfig, list[Problem]]:
    """Resolves a run's model against the weights of `checkpoint.start_from`.

    Returns the model with the vocabulary of the weights, and a problem for each field
    that contradicts them. Without such weights the model is returned as it is.
    `compare_copies` reads tensors that the files have twice, which a loading rank does
    for its part of them.
    """
    if checkpoint.start_from is None:
        return model, []
    try:
        weights_model, notes = _read_model(checkpoint.start_from, compare_copies)
    except (CheckpointError, ConfigError) as error:
        problem = Problem("/checkpoint/start_from", "start_from", str(error))
        return model, [problem]
    # The vocabulary comes first: the config may omit it, and it is compared too.
    model = with_vocabulary_of(model, weights_model)
    problems = []
    for problem in contradictions(model, weights_model):
        # Such a folder contradicts its own config.json, which the user has read.
        if problem.pointer == "/model/tie_embeddings" and notes:
            detail = f"{problem.detail}. {' '.join(notes)}"
            problem = replace(problem, detail=detail)
        problems.append(problem)
    return model, problems


def weights_left_out(checkpoint: CheckpointConfig, model: ModelConfig) -> list[str]:
    """Returns notes about initial weights that a run's model has no place for.

    Raises CheckpointError, ConfigError.
    """
    path = checkpoint.start_from
    if path is None or model.mtp is not None or initial_model(path).mtp is None:
        return []
    return [
        f"the multi-token prediction layers of {path} are left out; set model.mtp to train "
        "them too"
    ]


def _read_model(path: str, compare_copies: bool) -> tuple[ModelConfig, list[str]]:
    """Returns the model of the weights, and notes about their folder."""
    if is_native_checkpoint(path):
        return initial_model(path), []
    folder = HfFolder(path)
    if compare_copies:
        folder.check_copies()
    return folder.model, folder.notes

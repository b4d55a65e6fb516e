"""Reads the tokenizer that given weights were made with.

Owns: where a checkpoint and a Hugging Face folder keep it. Torch-free. Must not know:
how text becomes tokens.
"""

from megatron_ray.checkpoint.hf.published.tokenizer import read_published_tokenizer
from megatron_ray.checkpoint.initial_model import is_native_checkpoint
from megatron_ray.checkpoint.train_state import read_tokenizer, read_train_state
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.storage.storage import open_storage


def initial_tokenizer(path: str) -> ModelTokenizer:
    """Returns the tokenizer of the weights at a path or URI.

    Raises CheckpointError for damaged files.
    """
    if not is_native_checkpoint(path):
        return read_published_tokenizer(open_storage(path), path)
    train_state = read_train_state(path, 0)
    return ModelTokenizer(
        path,
        # A checkpoint that was imported without one has none.
        read_tokenizer(path),
        train_state.get("end_of_document"),
        train_state.get("begin_of_document"),
        train_state.get("tokenizer_file"),
    )

"""Reads the tokenizer of a folder in Hugging Face format.

Owns: which files are read. Torch-free. Must not know: how text becomes tokens.
"""

import json

import tokenizers

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.files import TOKENIZER, read_objects, read_text_file
from megatron_ray.config.model_tokenizer import (
    END_FILES,
    ModelTokenizer,
    begin_note,
    declared_begin,
    declared_end,
    end_candidates,
    end_note,
    other_form,
    token_ids,
)
from megatron_ray.storage.errors import MissingFileError
from megatron_ray.storage.storage import Storage


def read_published_tokenizer(storage: Storage, source: str) -> ModelTokenizer:
    """Returns the tokenizer of the folder `source`, with the tokens that its files declare.

    Raises CheckpointError for files that are not readable.
    """
    files = read_objects(storage, END_FILES)
    content = _read_text(storage)
    if content is None:
        names = [entry.name for entry in storage.list()]
        end = next(iter(end_candidates(files)), None)
        return ModelTokenizer(source, None, end, None, other_form(names))
    try:
        tokenizers.Tokenizer.from_str(content)
    # The library raises plain Exception.
    except Exception as error:
        raise CheckpointError(
            "read",
            storage.uri(TOKENIZER),
            f"it is not a tokenizer.json: {error}; download it again, or save one with "
            "save_pretrained()",
        ) from error
    parsed = json.loads(content)
    ids = token_ids(parsed)
    begin = declared_begin(parsed, files)
    # A template may be left from another tokenizer.
    if begin not in ids:
        begin = None
    return ModelTokenizer(
        source,
        content,
        declared_end(files, ids, parsed),
        begin,
        end_note=end_note(files, ids),
        begin_note=begin_note(parsed),
    )


def _read_text(storage: Storage) -> str | None:
    try:
        return read_text_file(storage, TOKENIZER).decode()
    except MissingFileError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "read", storage.uri(TOKENIZER), "it is not a text file"
        ) from error

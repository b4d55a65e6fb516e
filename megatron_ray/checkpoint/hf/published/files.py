"""Carries the small files of a published model from checkpoint to checkpoint.

Training does not change them: settings, templates, special tokens. A checkpoint has
them in a folder of its own, and an export puts them back. Torch-free. Must not know: what
is in them.
"""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from megatron_ray.checkpoint.directory import COMMITTED, CheckpointError
from megatron_ray.checkpoint.hf.families.registry import FAMILIES
from megatron_ray.checkpoint.hf.files import (
    CONFIG,
    TOKENIZER,
    read_objects,
    read_text_file,
)
from megatron_ray.checkpoint.train_state import read_train_state, saved_model
from megatron_ray.config.model_tokenizer import OTHER_FORMS, TIKTOKEN
from megatron_ray.storage.storage import Storage, open_storage

FOLDER = "published"
"""Name of the folder inside a checkpoint."""
_TEMPLATES = "additional_chat_templates"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_TEXTS = (".json", ".jinja")
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*")
"""Licences ask to be passed on with the weights. Their names may have small letters."""
_PATTERNS = (
    CONFIG,
    GENERATION_CONFIG,
    "chat_template.jinja",
    "chat_template.json",
    f"{_TEMPLATES}/*.jinja",
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    # Vocabularies of tokenizers that are not written in Rust, and code that reads them.
    *OTHER_FORMS,
    f"*{TIKTOKEN}",
    "merges.txt",
    "tokenization_*.py",
)
"""Names of the files that are carried along."""

PublishedFiles = Mapping[str, bytes]
"""Content of each file by its name in the published folder."""


def read_published(path: str) -> dict[str, bytes]:
    """Returns the published files of a Hugging Face folder or a committed checkpoint.

    A model that was never published has none. Raises StorageError.
    """
    storage = open_storage(path)
    if not storage.exists(COMMITTED):
        return _read(storage, "")
    files = _read(storage, f"{FOLDER}/")
    if CONFIG not in files:
        files |= _of_earlier_import(path)
    return files


def published_end_tokens(path: str) -> frozenset[int]:
    """Returns the ids that the published config of a checkpoint's model ends texts with.

    A model that was never published has none. Raises StorageError.
    """
    names = [f"{FOLDER}/{CONFIG}", f"{FOLDER}/{GENERATION_CONFIG}"]
    ids: set[int] = set()
    for values in read_objects(open_storage(path), names).values():
        ids.update(end_token_ids(values))
    return frozenset(ids)


def end_token_ids(values: Mapping[str, Any]) -> list[int]:
    """Returns eos_token_id of a config.json or generation_config.json as a list."""
    tokens = values.get("eos_token_id")
    if not isinstance(tokens, list):
        tokens = [tokens]
    return [token for token in tokens if isinstance(token, int)]


def is_licence(name: str) -> bool:
    """Returns whether a file holds terms of use and nothing of the tokenizer."""
    return _matches(name.upper(), _LICENCES)


def parsed(files: PublishedFiles, name: str) -> dict[str, Any]:
    """Returns the values of a JSON file; none where it does not exist.

    Raises CheckpointError when it is not readable.
    """
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError("read", name, f"it is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError("read", name, "it does not hold a JSON object")
    return values


def inside_checkpoint(files: PublishedFiles) -> dict[str, bytes]:
    """Returns the files by their names in a checkpoint."""
    return {f"{FOLDER}/{name}": content for name, content in files.items()}


def _read(storage: Storage, prefix: str) -> dict[str, bytes]:
    """Returns the files below a folder, which is named with its slash at the end."""
    names = []
    for folder in ("", f"{_TEMPLATES}/"):
        for entry in storage.list((prefix + folder).rstrip("/")):
            if not entry.is_folder:
                names.append(folder + entry.name)
    files = {}
    for name in names:
        if not is_licence(name) and not _matches(name, _PATTERNS):
            continue
        if name.endswith(_TEXTS):
            files[name] = read_text_file(storage, prefix + name)
        else:
            files[name] = storage.read_bytes(prefix + name)
    return files


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _of_earlier_import(path: str) -> dict[str, bytes]:
    """Returns the config.json of a checkpoint that was imported by an earlier version.

    Such a checkpoint has only the family and the ids of the tokens.
    """
    train_state = read_train_state(path, 0)
    family = FAMILIES.get(str(train_state.get("family")))
    if family is None:
        return {}
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(saved_model(path, train_state)),
        **train_state.get("token_ids", {}),
    }
    return {CONFIG: json.dumps(values).encode()}

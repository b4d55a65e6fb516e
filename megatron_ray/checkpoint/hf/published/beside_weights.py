"""Decides which files an export has beside its weights, and the ids of its tokens.

Published settings hold for the ids of the published tokenizer, so they are only put back
where the run's tokenizer has the same ids; it may have more. Torch-free. Must not know:
weights, families.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from megatron_ray.checkpoint.hf.files import CONFIG, TOKENIZER
from megatron_ray.checkpoint.hf.published.config import is_token_id
from megatron_ray.checkpoint.hf.published.files import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    PublishedFiles,
    end_token_ids,
    is_licence,
    parsed,
)
from megatron_ray.config.model_tokenizer import (
    END_FILES,
    SPECIAL_TOKENS,
    declared_begin,
    declared_end,
    end_candidates,
)
from megatron_ray.config.model_tokenizer import token_ids as ids_by_name

_VOCABULARIES = ("vocab.json", "added_tokens.json")
"""Files with the id of each token, besides tokenizer.json."""
_SETTINGS = (TOKENIZER_CONFIG, SPECIAL_TOKENS)
"""Files that name the special tokens."""
_COMPARED = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
"""Parts of a tokenizer.json that determine tokens and text."""

Ids = dict[str, int]


@dataclass(frozen=True)
class FilesBesideWeights:
    """What an export has besides weights and the model's config."""

    files: Mapping[str, bytes]
    """Content of each file by name, without config.json."""
    token_ids: Mapping[str, Any]
    """Values of config.json."""
    notes: tuple[str, ...]
    """What a user may not expect of them, in sentences."""


def files_beside_weights(
    published: PublishedFiles,
    tokenizer: bytes | None,
    end_of_document: int | None,
    begin_of_document: int | None = None,
) -> FilesBesideWeights:
    """Returns the published files, or those of the run where they contradict it.

    `tokenizer` is the run's tokenizer.json, if it trained on text; the other two are the
    ids of the tokens around its documents.
    """
    own = _tokenizer_files(tokenizer, end_of_document, begin_of_document)
    if published and _has_published_ids(published, tokenizer, end_of_document):
        return _as_published(published, tokenizer, own, end_of_document)
    licences = {name: content for name, content in published.items() if is_licence(name)}
    # A model that was not published may have the end of a document for both.
    begin = begin_of_document
    if begin is None:
        begin = end_of_document
    token_ids = {
        "bos_token_id": begin,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
    }
    notes = []
    if published:
        left_out = sorted(published.keys() - licences.keys() - {CONFIG})
        notes.append(
            "the run's tokenizer is not the published one, so published ids of tokens and "
            f"{', '.join(left_out) or 'settings'} are left out"
        )
    return FilesBesideWeights(licences | own, token_ids, tuple(notes))


def _as_published(
    published: PublishedFiles,
    tokenizer: bytes | None,
    own: dict[str, bytes],
    end_of_document: int | None,
) -> FilesBesideWeights:
    """Returns the published files, and those of the run's `own` that they lack."""
    token_ids = {}
    for name, value in parsed(published, CONFIG).items():
        if is_token_id(name):
            token_ids[name] = value
    files = dict(published)
    del files[CONFIG]
    # The published file has settings for other programs, which the run's lacks.
    if TOKENIZER in files and _is_same_tokenizer(published, tokenizer):
        own.pop(TOKENIZER, None)
    if not files.keys().isdisjoint(_SETTINGS):
        own.pop(TOKENIZER_CONFIG, None)
    files |= own
    if end_of_document is None or _is_published_end(published, end_of_document):
        return FilesBesideWeights(files, token_ids, ())
    # Generation must know the token with which documents of the run ended.
    token_ids["eos_token_id"] = _with_end(published, end_of_document)
    if GENERATION_CONFIG in files:
        values = parsed(files, GENERATION_CONFIG)
        values["eos_token_id"] = token_ids["eos_token_id"]
        files[GENERATION_CONFIG] = _json_bytes(values)
    note = (
        f"documents of the run ended with token {end_of_document}, which is no end token of "
        "the published model, so eos_token_id has it too"
    )
    return FilesBesideWeights(files, token_ids, (note,))


def _is_published_end(published: PublishedFiles, token_id: int) -> bool:
    """Returns whether the published files declare a token as one that ends texts."""
    ids = _published_ids(published)
    files = {name: parsed(published, name) for name in END_FILES}
    tokens = end_candidates(files)
    end = declared_end(files, ids, parsed(published, TOKENIZER))
    if end is not None:
        tokens.append(end)
    return any(token_id in (token, ids.get(str(token))) for token in tokens)


def _with_end(published: PublishedFiles, token_id: int) -> int | list[int]:
    """Returns eos_token_id with another token, a list only for several."""
    tokens = dict.fromkeys([*_end_tokens(published), token_id])
    if len(tokens) == 1:
        return token_id
    return list(tokens)


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _tokenizer_files(
    tokenizer: bytes | None, end_of_document: int | None, begin_of_document: int | None
) -> dict[str, bytes]:
    """Returns the files of a tokenizer that was not published."""
    if tokenizer is None:
        return {}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ids = ids_by_name(json.loads(tokenizer))
    names = {token_id: name for name, token_id in ids.items()}
    tokens = {"bos_token": begin_of_document, "eos_token": end_of_document}
    for key, token_id in tokens.items():
        if token_id in names:
            settings[key] = names[token_id]
    return {TOKENIZER: tokenizer, TOKENIZER_CONFIG: _json_bytes(settings)}


def _is_same_tokenizer(published: PublishedFiles, tokenizer: bytes | None) -> bool:
    """Returns whether the run's tokenizer makes the published tokens; it may have none."""
    if tokenizer is None:
        return True
    settings = {name: parsed(published, name) for name in _SETTINGS}
    begin = declared_begin(parsed(published, TOKENIZER), settings)
    # Documents of the run may have begun with another token, or with none.
    if begin != declared_begin(json.loads(tokenizer), {}):
        return False
    return _tokenization(published[TOKENIZER]) == _tokenization(tokenizer)


def _tokenization(tokenizer: bytes) -> dict[str, Any]:
    values = _normalized(tokenizer)
    return {name: values[name] for name in _COMPARED}


def _normalized(tokenizer: bytes) -> dict[str, Any]:
    """Returns a tokenizer.json as the library reads it.

    It fills in defaults, and gives added tokens that follow a gap other ids.
    """
    values: dict[str, Any] = json.loads(
        tokenizers.Tokenizer.from_str(tokenizer.decode()).to_str()
    )
    return values


def _has_published_ids(
    published: PublishedFiles, tokenizer: bytes | None, end_of_document: int | None
) -> bool:
    """Returns whether the run's tokenizer gives the published tokens their ids.

    Where no ids are published, the run's end token must be one of those of the model.
    """
    if tokenizer is None:
        return True
    expected = _published_ids(published)
    if not expected:
        return end_of_document in _end_tokens(published)
    own = ids_by_name(json.loads(tokenizer))
    return all(own.get(token) == number for token, number in expected.items())


def _published_ids(published: PublishedFiles) -> Ids:
    ids: Ids = {}
    if TOKENIZER in published:
        ids |= ids_by_name(_normalized(published[TOKENIZER]))
    for name in _VOCABULARIES:
        ids |= parsed(published, name)
    decoder = parsed(published, TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
    for number, token in decoder.items():
        ids[token["content"]] = int(number)
    return ids


def _end_tokens(published: PublishedFiles) -> list[int]:
    end_tokens = end_token_ids(parsed(published, CONFIG))
    return end_tokens + end_token_ids(parsed(published, GENERATION_CONFIG))

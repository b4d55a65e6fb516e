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
    is_licence,
    parsed,
)
from megatron_ray.config.model_tokenizer import token_ids as ids_by_name

_VOCABULARIES = ("vocab.json", "added_tokens.json")
"""Files with the id of each token, besides tokenizer.json."""
_SETTINGS = (TOKENIZER_CONFIG, "special_tokens_map.json")
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
    if published and _has_published_ids(published, tokenizer, end_of_document):
        return _as_published(published, tokenizer, end_of_document)
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
    files = licences | _tokenizer_files(tokenizer, end_of_document)
    return FilesBesideWeights(files, token_ids, tuple(notes))


def _as_published(
    published: PublishedFiles, tokenizer: bytes | None, end_of_document: int | None
) -> FilesBesideWeights:
    token_ids = {}
    for name, value in parsed(published, CONFIG).items():
        if is_token_id(name):
            token_ids[name] = value
    files = dict(published)
    del files[CONFIG]
    own = _tokenizer_files(tokenizer, end_of_document)
    # The published file has settings for other programs, which the run's lacks.
    if TOKENIZER in files and _is_same_tokenizer(files[TOKENIZER], tokenizer):
        own.pop(TOKENIZER, None)
    if not files.keys().isdisjoint(_SETTINGS):
        own.pop(TOKENIZER_CONFIG, None)
    return FilesBesideWeights(files | own, token_ids, ())


def _tokenizer_files(
    tokenizer: bytes | None, end_of_document: int | None
) -> dict[str, bytes]:
    """Returns the files of a tokenizer that was not published."""
    if tokenizer is None:
        return {}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for token in json.loads(tokenizer).get("added_tokens", []):
        if token["id"] == end_of_document:
            settings.setdefault("eos_token", token["content"])
    raw = json.dumps(settings, indent=2) + "\n"
    return {TOKENIZER: tokenizer, TOKENIZER_CONFIG: raw.encode()}


def _is_same_tokenizer(original: bytes, tokenizer: bytes | None) -> bool:
    """Returns whether two files make the same tokens; a run may have none."""
    if tokenizer is None:
        return True
    return _tokenization(original) == _tokenization(tokenizer)


def _tokenization(tokenizer: bytes) -> dict[str, Any]:
    # Through the library, which writes every default.
    values = json.loads(tokenizers.Tokenizer.from_str(tokenizer.decode()).to_str())
    return {name: values[name] for name in _COMPARED}


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
        ids |= ids_by_name(parsed(published, TOKENIZER))
    for name in _VOCABULARIES:
        ids |= parsed(published, name)
    decoder = parsed(published, TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
    for number, token in decoder.items():
        ids[token["content"]] = int(number)
    return ids


def _end_tokens(published: PublishedFiles) -> list[int]:
    end_tokens: list[int] = []
    for name in (CONFIG, GENERATION_CONFIG):
        value = parsed(published, name).get("eos_token_id")
        if isinstance(value, list):
            end_tokens += value
        elif value is not None:
            end_tokens.append(value)
    return end_tokens

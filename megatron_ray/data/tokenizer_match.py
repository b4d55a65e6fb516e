"""Compares two tokenizers by their contents.

Owns: when weights made with one tokenizer can be trained with another. Must not know:
where tokenizers come from.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_ray.config.model_tokenizer import token_ids
from megatron_ray.data.tokenizer import parse_tokenizer

_TEXT_PARTS = ("normalizer", "pre_tokenizer")
_MODEL_FIELDS = ("type", "byte_fallback", "ignore_merges", "continuing_subword_prefix")
_MAX_CHARS = 40


def find_difference(original: str, other: str) -> str | None:
    """Returns why `other` cannot replace the tokenizer that weights were made with.

    Both are contents of a tokenizer.json. None when text becomes the same tokens, however
    the files are written. The other one may have further tokens, and other names for
    special tokens (reserved ones are there to be renamed). Raises TokenizerError.
    """
    if original == other:
        return None
    before = _parsed(original)
    after = _parsed(other)
    for part in _TEXT_PARTS:
        if before.get(part) != after.get(part):
            return f"its {part} differs"
    for field in _MODEL_FIELDS:
        # Absent, null and false are the same.
        if (before["model"].get(field) or None) != (after["model"].get(field) or None):
            return f"its model has another {field}"
    difference = _id_difference(before, after)
    if difference is not None:
        return difference
    lost = _merges(before) - _merges(after)
    if lost:
        return f"its merges differ, such as {_shown(' '.join(min(lost)))}"
    return None


def _parsed(content: str) -> dict[str, Any]:
    # Through the library, so that files of different versions of it look alike.
    values: dict[str, Any] = json.loads(parse_tokenizer(content).to_str())
    return values


def _id_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Returns a token that has another id, or that is missing."""
    ids = token_ids(after)
    added_tokens = before["added_tokens"]
    special = {added["content"] for added in added_tokens if added["special"]}
    for name, token_id in token_ids(before).items():
        if name not in ids and name in special:
            continue
        if ids.get(name) != token_id:
            return (
                f"token {_shown(name)} is {ids.get(name, 'missing')} instead of {token_id}"
            )
    return None


def _merges(values: Mapping[str, Any]) -> set[tuple[str, ...]]:
    return {tuple(pair) for pair in values["model"].get("merges") or ()}


def _shown(text: str) -> str:
    return repr(text[:_MAX_CHARS])

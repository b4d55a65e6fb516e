"""Finds the tokenizer of a config that needs no training.

Owns: reading the user's tokenizer.json, the tokens around a document, and the rule that
weights are trained with the tokenizer they were made with. Must not know: caches, how
weights are stored.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from megatron_ray.config.data import TokenizerConfig
from megatron_ray.config.model_tokenizer import (
    END_FILES,
    ModelTokenizer,
    Token,
    declared_begin,
    declared_end,
    token_ids,
)
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.errors import UnusableDataError, cause
from megatron_ray.data.tokenizer import (
    END_OF_DOCUMENT,
    Tokenizer,
    TokenizerError,
    parse_tokenizer,
)
from megatron_ray.data.tokenizer_match import find_difference
from megatron_ray.storage.files import read_bytes
from megatron_ray.storage.location import Location, parse_location

_POINTER = "/data/tokenizer"


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer, and what was decided about it for the user."""

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()


def given_tokenizer(
    config: TokenizerConfig, weights: ModelTokenizer | None
) -> GivenTokenizer | None:
    """Returns the tokenizer of a config, or None when it is to be trained on the corpus.

    `weights` is the tokenizer of the weights that the run begins with, if any. Raises
    UnusableDataError below /data/tokenizer.
    """
    if config.kind == "bpe" and weights is None:
        return None
    content = _content(config, weights)
    with _tokenizer_errors(config, weights):
        inner = parse_tokenizer(content)
    ids = inner.get_vocab(with_added_tokens=True)
    if weights is not None:
        _check_match(config, weights, content)
    end = config.end_of_document or _declared_end(config, weights, ids, content)
    begin = config.begin_of_document
    if begin is None and weights is not None:
        begin = _declared_begin(config, weights, ids, content)
    with _tokenizer_errors(config, weights):
        tokenizer = Tokenizer.of(inner, end, begin, config.special_tokens_in_text)
    return GivenTokenizer(tokenizer, tuple(_notes(config, weights, tokenizer, end)))


def _notes(
    config: TokenizerConfig,
    weights: ModelTokenizer | None,
    tokenizer: Tokenizer,
    end: str | None,
) -> Iterator[str]:
    if config.kind == "bpe" and weights is not None and not weights.is_of_run:
        yield f"using the tokenizer that the weights of {weights.source} were made with"
    if config.kind == "file" and weights is not None and weights.content is None:
        yield (
            f"the weights of {weights.source} come without a tokenizer.json, so nothing shows "
            f"whether they were made with {config.path}"
        )
    if weights is not None and config.end_of_document is None and weights.end_note:
        yield weights.end_note
    if weights is not None and config.begin_of_document is None and weights.begin_note:
        yield weights.begin_note
    if end is None:
        name = tokenizer.name_of(tokenizer.end_of_document)
        yield (
            f"the end token {name!r} is a guess, as no file declares one; set "
            "data.tokenizer.end_of_document if documents end with another one"
        )


def special_tokens_to_train(config: TokenizerConfig) -> list[str]:
    """Returns the special tokens that a tokenizer trained here needs beside its own."""
    named = [config.end_of_document, config.begin_of_document]
    if not isinstance(config.special_tokens_in_text, str):
        named += config.special_tokens_in_text
    # Each once, in their order.
    distinct = dict.fromkeys(name for name in named if name)
    distinct.pop(END_OF_DOCUMENT, None)
    return list(distinct)


def trained_tokenizer(config: TokenizerConfig, content: str) -> Tokenizer:
    """Returns a tokenizer that was trained here, from its tokenizer.json.

    Raises UnusableDataError below /data/tokenizer.
    """
    end = config.end_of_document or END_OF_DOCUMENT
    with _tokenizer_errors(config):
        return Tokenizer.from_json(
            content, end, config.begin_of_document, config.special_tokens_in_text
        )


def check_rows(
    tokenizer: Tokenizer, rows: int | None, weights: ModelTokenizer | None
) -> None:
    """Raises UnusableDataError when a model of `rows` tokens lacks one that may occur.

    None stands for a model whose vocabulary will be that of the tokenizer.
    """
    needed = tokenizer.rows_needed
    if rows is None or needed <= rows:
        return
    remedy = "raise it, or leave it out"
    if weights is not None:
        remedy = f"set it to {needed} or more: rows that the weights lack are added"
    detail = (
        f"model.vocab_size={rows} is smaller than the tokenizer's {needed}, whose last token "
        f"is {tokenizer.name_of(needed - 1)!r}; {remedy}"
    )
    raise UnusableDataError([Problem("/model/vocab_size", "vocab_fits", detail)])


def _content(config: TokenizerConfig, weights: ModelTokenizer | None) -> str:
    """Returns the tokenizer.json of a job.

    Raises UnusableDataError when there is none that its weights may have been made with.
    """
    if config.kind == "file":
        return _read(config.path or "")
    if weights is not None and weights.content is None:
        _check_unknown(config, weights)
    if config.kind == "bpe" and weights is not None and weights.content is not None:
        return weights.content
    return Tokenizer.of_bytes().to_json()


def _check_match(config: TokenizerConfig, weights: ModelTokenizer, content: str) -> None:
    """Raises UnusableDataError when the job's tokenizer is not that of its weights."""
    if weights.content is None:
        return
    with _tokenizer_errors(config, weights):
        difference = find_difference(weights.content, content)
    if difference is None:
        return
    field = "kind"
    if config.kind == "file":
        field = "path"
    detail = (
        f"{config.path or config.kind} is not the tokenizer that the weights of "
        f"{weights.source} were made with: {difference}; {weights.remedy}"
    )
    raise _problem(field, "tokenizer_of_weights", detail)


def _check_unknown(config: TokenizerConfig, weights: ModelTokenizer) -> None:
    """Refuses a made-up tokenizer for weights that come without tokenizer.json."""
    # Bytes may be what they were made with.
    if config.kind == "bytes" and weights.other_form is None:
        return
    form = ""
    if weights.other_form is not None:
        form = f" (its tokenizer is in {weights.other_form}, which is not read)"
    detail = (
        f"the weights of {weights.source} come without a tokenizer.json{form}, and a new "
        f"tokenizer would give their tokens other meanings; {weights.remedy}"
    )
    raise _problem("kind", "tokenizer_of_weights", detail)


def _declared_end(
    config: TokenizerConfig,
    weights: ModelTokenizer | None,
    ids: Mapping[str, int],
    content: str,
) -> str | None:
    """Returns the end token that the weights were made with, or else a file declares.

    `content` is the job's tokenizer.json.

    Raises UnusableDataError when the job's tokenizer lacks that of the weights.
    """
    if config.kind == "bytes" and (weights is None or weights.content is None):
        return END_OF_DOCUMENT
    if weights is None or weights.end_of_document is None:
        return _end_beside(config, ids, content)
    name = _token_of_weights(weights, weights.end_of_document, ids, "end")
    return name or _end_beside(config, ids, content)


def _token_of_weights(
    weights: ModelTokenizer, token: Token | None, ids: Mapping[str, int], position: str
) -> str | None:
    """Returns the name of the token that began or ended (`position`) their documents.

    Raises UnusableDataError when the job's tokenizer lacks it.
    """
    name = _name_in(weights, token, ids)
    if token is None or name is not None or weights.content is None:
        return name
    original = token_ids(json.loads(weights.content))
    lost = _name_in(weights, token, original)
    detail = (
        f"the tokenizer lacks {lost!r}, the {position} of documents of {weights.source}; "
        f"{weights.remedy}, or name the token that {position}s a document"
    )
    raise _problem(f"{position}_of_document", f"no_{position}_token", detail)


def _name_in(
    weights: ModelTokenizer, token: Token | None, ids: Mapping[str, int]
) -> str | None:
    """Returns the name of a token of the weights if it has the same id in `ids`."""
    original = ids
    if weights.content is not None:
        original = token_ids(json.loads(weights.content))
    for name, token_id in original.items():
        if token in (name, token_id) and ids.get(name) == token_id:
            return name
    return None


def _declared_begin(
    config: TokenizerConfig,
    weights: ModelTokenizer,
    ids: Mapping[str, int],
    content: str,
) -> str | None:
    """Returns the begin token that the weights were made with.

    Weights without a tokenizer.json were made with that of the job, `content`. Raises
    UnusableDataError when the job's tokenizer lacks that of the weights.
    """
    is_known = weights.content is not None or weights.is_of_run
    if is_known or config.path is None:
        return _token_of_weights(weights, weights.begin_of_document, ids, "begin")
    begin = declared_begin(json.loads(content), _files_beside(config.path))
    if begin in ids:
        return begin
    return None


def _end_beside(
    config: TokenizerConfig, ids: Mapping[str, int], content: str
) -> str | None:
    """Returns the end token that the user's tokenizer.json or files beside it declare."""
    if config.path is None:
        return None
    return declared_end(_files_beside(config.path), ids, json.loads(content))


def _files_beside(path: str) -> dict[str, dict[str, Any]]:
    """Returns the parsed files beside a tokenizer.json that declare its tokens."""
    location = parse_location(path)
    parent = str(PurePosixPath(location.path).parent)
    folder = Location(location.filesystem, parent, location.is_local)
    files: dict[str, dict[str, Any]] = {}
    for name in END_FILES:
        # Files that are missing or unreadable declare nothing.
        try:
            values = json.loads(read_bytes(folder / name))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict):
            files[name] = values
    return files


@contextmanager
def _tokenizer_errors(
    config: TokenizerConfig, weights: ModelTokenizer | None = None
) -> Iterator[None]:
    """Converts TokenizerError to UnusableDataError at the field of the tokenizer."""
    try:
        yield
    except TokenizerError as error:
        origin = config.path or f"kind {config.kind}"
        if config.kind == "bpe" and weights is not None:
            origin = weights.path
        raise _problem(error.field, error.code, f"{origin}: {error.detail}") from error


def _read(path: str) -> str:
    """Returns the content of the user's tokenizer.json.

    Raises UnusableDataError.
    """
    try:
        # Editors may put a byte order mark before it.
        return read_bytes(parse_location(path)).decode("utf-8-sig")
    except FileNotFoundError as error:
        detail = f"{path} does not exist where the job runs; check the path"
        raise _problem("path", "not_found", detail) from error
    # ValueError: the file is not UTF-8.
    except (OSError, ValueError) as error:
        detail = f"{path} cannot be read: {cause(error)}; give the path of a tokenizer.json"
        raise _problem("path", "unreadable", detail) from error


def _problem(field: str, code: str, detail: str) -> UnusableDataError:
    return UnusableDataError([Problem(f"{_POINTER}/{field}", code, detail)])

"""Makes the tokenizer of a config.

Owns: reading the user's tokenizer.json, training one, the training sample. Must not
know: how corpora are built.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron_ray.config.data import TokenizerConfig
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.build_cache import get_or_build
from megatron_ray.data.preparation.cache_keys import digest
from megatron_ray.data.preparation.corpora import ProgressCallback
from megatron_ray.data.preparation.data_files import SourceAt
from megatron_ray.data.preparation.documents import fingerprint, read_file_chunks
from megatron_ray.data.preparation.errors import UnusableDataError, cause, errors_at
from megatron_ray.data.preparation.sources import SourceFiles, in_sampling_order
from megatron_ray.data.tokenizer import Tokenizer, TokenizerError
from megatron_ray.storage.files import read_bytes
from megatron_ray.storage.location import Location, parse_location

_FILE_NAME = "tokenizer.json"
_SAMPLE_CHARS = 32 << 20


def make_tokenizer(
    config: TokenizerConfig,
    train: Sequence[SourceAt],
    cache: Location,
    progress: ProgressCallback,
) -> tuple[Tokenizer, str]:
    """Returns the tokenizer and the name of its tokenizer.json in the cache.

    Raises UnusableDataError, OSError.
    """
    if config.kind == "bpe":
        name = _train(config.vocab_size, train, cache, progress)
    elif config.kind == "bytes":
        name = _keep(Tokenizer.of_bytes(), config.kind, cache)
    else:
        name = _keep(read_tokenizer(config), config.kind, cache)
    file_name = f"{name}/{_FILE_NAME}"
    # Read from the cache, because another process may have trained it first.
    content = read_bytes(cache / file_name).decode()
    return Tokenizer.from_json(content, config.end_of_document), file_name


def _train(
    vocab_size: int,
    train: Sequence[SourceAt],
    cache: Location,
    progress: ProgressCallback,
) -> str:
    # The trainer's version is part of the key, because it may affect the merges.
    parts = [(fingerprint(source), source.source.weight) for _, source in train]
    name = f"tokenizers/bpe-{digest(parts, vocab_size, tokenizers.__version__)}"

    def build(work: Path) -> dict[str, Any]:
        progress(f"training a tokenizer of {vocab_size} tokens")
        _write(work, Tokenizer.train_bpe(sample_text(train), vocab_size))
        return {}

    get_or_build(cache, name, build)
    return name


def _keep(tokenizer: Tokenizer, kind: str, cache: Location) -> str:
    # Copied to the cache, because the user may move or change the file while the job runs.
    name = f"tokenizers/{kind}-{digest(tokenizer.to_json())}"

    def build(work: Path) -> dict[str, Any]:
        _write(work, tokenizer)
        return {}

    get_or_build(cache, name, build)
    return name


def _write(work: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(work / _FILE_NAME)


def read_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Reads the user's tokenizer.json.

    Raises UnusableDataError below /data/tokenizer.
    """
    path = config.path or ""
    try:
        content = read_bytes(parse_location(path)).decode()
        return Tokenizer.from_json(content, config.end_of_document)
    except TokenizerError as error:
        problem = Problem(
            f"/data/tokenizer/{error.field}", error.code, f"{path}: {error.detail}"
        )
        raise UnusableDataError([problem]) from error
    except FileNotFoundError as error:
        detail = f"{path} does not exist where the job runs; check the path"
        problem = Problem("/data/tokenizer/path", "not_found", detail)
        raise UnusableDataError([problem]) from error
    # ValueError: the file is not UTF-8.
    except (OSError, ValueError) as error:
        detail = f"{path} cannot be read: {cause(error)}; give the path of a tokenizer.json"
        problem = Problem("/data/tokenizer/path", "unreadable", detail)
        raise UnusableDataError([problem]) from error


def sample_text(train: Sequence[SourceAt]) -> Iterator[str]:
    """Yields at most 32 Mi characters to train a tokenizer on.

    Each source contributes its weight's share, as whole files in a fixed mixed order.
    Raises UnusableDataError.
    """
    total_weight = sum(source.source.weight for _, source in train)
    for pointer, source in train:
        num_chars = int(_SAMPLE_CHARS * source.source.weight / total_weight)
        with errors_at(pointer):
            yield from _first_chars(source, num_chars)


def _first_chars(source_files: SourceFiles, num_chars: int) -> Iterator[str]:
    # Not in order of names, since the first files may all have the same language or year.
    for file in in_sampling_order(source_files):
        for chunk in read_file_chunks(source_files, file):
            yield chunk.text[:num_chars]
            num_chars -= len(chunk.text)
            if num_chars <= 0:
                return

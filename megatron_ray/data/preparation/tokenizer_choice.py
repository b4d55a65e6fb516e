"""Makes the tokenizer of a config.

Owns: training one, the training sample, the tokenizer's file in the cache. Must not know:
how corpora are built.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron_ray.config.data import TokenizerConfig
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.data.preparation.build_cache import get_or_build
from megatron_ray.data.preparation.cache_keys import digest
from megatron_ray.data.preparation.corpora import ProgressCallback
from megatron_ray.data.preparation.data_files import SourceAt
from megatron_ray.data.preparation.documents import fingerprint, read_file_chunks
from megatron_ray.data.preparation.errors import errors_at
from megatron_ray.data.preparation.given_tokenizer import (
    GivenTokenizer,
    given_tokenizer,
    special_tokens_to_train,
    trained_tokenizer,
)
from megatron_ray.data.preparation.sources import SourceFiles, in_sampling_order
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.storage.files import read_bytes
from megatron_ray.storage.location import Location

_FILE_NAME = "tokenizer.json"
_SAMPLE_CHARS = 32 << 20


def make_tokenizer(
    config: TokenizerConfig,
    weights: ModelTokenizer | None,
    train: Sequence[SourceAt],
    cache: Location,
    progress: ProgressCallback,
) -> tuple[GivenTokenizer, str]:
    """Returns the tokenizer and the name of its tokenizer.json in the cache.

    `weights` is the tokenizer of the weights that the run begins with, if any. Raises
    UnusableDataError, OSError.
    """
    given = given_tokenizer(config, weights)
    if given is not None:
        name = _keep(given.tokenizer, config.kind, cache)
        return given, f"{name}/{_FILE_NAME}"
    file_name = f"{_train(config, train, cache, progress)}/{_FILE_NAME}"
    # Read from the cache, because another process may have trained it first.
    content = read_bytes(cache / file_name).decode()
    return GivenTokenizer(trained_tokenizer(config, content)), file_name


def _train(
    config: TokenizerConfig,
    train: Sequence[SourceAt],
    cache: Location,
    progress: ProgressCallback,
) -> str:
    # The trainer's version is part of the key, because it may affect the merges.
    parts = [(fingerprint(source), source.source.weight) for _, source in train]
    inputs: list[Any] = [parts, config.vocab_size, tokenizers.__version__]
    special_tokens = special_tokens_to_train(config)
    if special_tokens:
        inputs.append(special_tokens)
    name = f"tokenizers/bpe-{digest(*inputs)}"

    def build(work: Path) -> dict[str, Any]:
        progress(f"training a tokenizer of {config.vocab_size} tokens")
        texts = sample_text(train)
        _write(work, Tokenizer.train_bpe(texts, config.vocab_size, special_tokens))
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

"""From data config to manifest.

Owns: tokenizer choice, cache keys, the split's rules, the unigram baseline. Must not
know: jobs, ranks.

Everything made is an artifact named by a hash of what it is made from (`artifacts`), so
a second run with the same content reads a few small files, and a change of one source
redoes that source only.
"""

import errno
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers

from megatron_ray.config.data import DataConfig, DataSource, TokenizerConfig
from megatron_ray.config.problem import Problem
from megatron_ray.data.artifacts import produce
from megatron_ray.data.corpora import COUNTS, Progress, make_corpus
from megatron_ray.data.prepared import PreparedCorpus, PreparedData
from megatron_ray.data.sources import (
    DataError,
    FoundSource,
    file_pieces,
    find_all,
    fingerprint,
    in_sampling_order,
)
from megatron_ray.data.tokenizer import Tokenizer, TokenizerError
from megatron_ray.exceptions import InputError
from megatron_ray.storage.files import Place, place, read_bytes

# Part of every cache key: raise it when the same input would be turned into something
# else.
_FORMAT = 1
_SAMPLE_CHARS = 32 << 20

_Owned = tuple[str, FoundSource]
"""A source and its JSON pointer."""


class UnusableDataError(InputError):
    """The data cannot be prepared as asked; `problems` say which fields to change and
    how.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(
            "; ".join(f"{problem.pointer}: {problem.detail}" for problem in problems)
        )
        self.problems = problems


def silent(message: str) -> None:
    """Reports no progress."""


def prepare(
    data: DataConfig, cache: str, *, seq_length: int, progress: Progress = silent
) -> PreparedData:
    """Tokenizes what is not in `cache` (path or URI of a folder) yet and describes it
    all.

    `progress` gets short lines for people. Safe to run twice at once, and to kill.
    Raises UnusableDataError for whatever the user can mend, at JSON pointers below
    /data (or /storage/path when the default cache cannot be written).
    """
    with _cache_errors(data, cache):
        where = _open_cache(cache)
        found = find_all(data)
        if found.problems:
            raise UnusableDataError(found.problems)
        tokenizer, tokenizer_path = _tokenizer(
            data.tokenizer, found.train, where, cache, progress
        )
        maker = _Maker(where, cache, tokenizer, progress)
        fraction = 0.0 if data.validation else data.validation_fraction
        train = [maker.make(owner, source, fraction) for owner, source in found.train]
        validation = [maker.make(owner, source, None) for owner, source in found.validation]
    needed = seq_length + 1
    _require_length(train, "train", needed)
    _require_length(validation, "validation", needed)
    held_out = validation or (_long_enough(train, needed, progress) if fraction else [])
    return PreparedData(
        train=tuple(part.corpus("train") for part in train),
        validation=tuple(part.corpus("validation") for part in held_out),
        tokenizer_path=tokenizer_path,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        unigram_nats=unigram_nats(
            [(part.source.weight, part.counts()) for part in held_out]
        ),
    )


def unigram_nats(blend: Sequence[tuple[float, npt.NDArray[np.int64]]]) -> float | None:
    """Entropy in nats per token of a blend of (weight, token counts): what always
    predicting the frequencies would cost.
    """
    if not blend:
        return None
    share = sum(weight * counts / counts.sum() for weight, counts in blend) / sum(
        weight for weight, _ in blend
    )
    used = np.asarray(share)[np.asarray(share) > 0]
    # Plus zero: the entropy of a single token is 0.0, not -0.0.
    return float(-(used * np.log(used)).sum()) + 0.0


class _Made:
    """A source's artifact."""

    def __init__(
        self,
        owner: str,
        source: DataSource,
        folder: Place,
        uri: str,
        description: dict[str, Any],
    ) -> None:
        self.owner = owner
        self.source = source
        self._folder = folder
        self._uri = uri
        self._description = description

    def tokens(self, split: str) -> int:
        return int(self._description[split]["num_tokens"])

    def corpus(self, split: str) -> PreparedCorpus:
        part = self._description[split]
        # A bare name is a file of the artifact; a path is a prepared source used where
        # it lies.
        prefix = (
            part["prefix"] if "/" in part["prefix"] else f"{self._uri}/{part['prefix']}"
        )
        return PreparedCorpus(
            prefix=prefix,
            weight=self.source.weight,
            num_tokens=part["num_tokens"],
            num_documents=part["num_documents"],
        )

    def counts(self) -> npt.NDArray[np.int64]:
        counts: npt.NDArray[np.int64] = np.load(
            io.BytesIO(read_bytes(self._folder / COUNTS))
        )
        return counts


class _Maker:
    """Makes artifacts of one cache with one tokenizer."""

    def __init__(
        self, cache: Place, uri: str, tokenizer: Tokenizer, progress: Progress
    ) -> None:
        self._cache = cache
        self._uri = _root(cache, uri)
        self._tokenizer = tokenizer
        self._progress = progress
        self._digest = _digest(tokenizer.to_json(), tokenizer.end_of_document)

    def make(self, owner: str, found: FoundSource, held_out: float | None) -> _Made:
        """Raises UnusableDataError at `owner`."""
        with _pointing(owner):
            name = f"corpora/{_digest(fingerprint(found), self._digest, held_out)}"

            def fill(work: Path) -> dict[str, Any]:
                return make_corpus(
                    work,
                    found,
                    self._tokenizer,
                    held_out,
                    self._cache.local,
                    self._progress,
                )

            description = produce(self._cache, name, fill)
        return _Made(
            owner, found.source, self._cache / name, f"{self._uri}/{name}", description
        )


def _tokenizer(
    config: TokenizerConfig,
    train: Sequence[_Owned],
    cache: Place,
    uri: str,
    progress: Progress,
) -> tuple[Tokenizer, str]:
    """The tokenizer and the path of its tokenizer.json in the cache."""
    if config.kind == "bpe":
        parts = [(fingerprint(source), source.source.weight) for _, source in train]
        name = f"tokenizers/bpe-{_digest(parts, config.vocab_size, tokenizers.__version__)}"

        def text() -> str:
            progress(f"training a tokenizer of {config.vocab_size} tokens")
            return Tokenizer.train_bpe(_sample(train), config.vocab_size).to_json()
    else:
        given = (
            Tokenizer.of_bytes() if config.kind == "bytes" else read_tokenizer(config)
        ).to_json()
        name = f"tokenizers/{config.kind}-{_digest(given)}"

        def text() -> str:
            return given

    def fill(work: Path) -> dict[str, Any]:
        (work / "tokenizer.json").write_text(text(), encoding="utf-8")
        return {}

    produce(cache, name, fill)
    content = read_bytes(cache / name / "tokenizer.json").decode()
    return Tokenizer.from_json(
        content, config.end_of_document
    ), f"{_root(cache, uri)}/{name}/tokenizer.json"


def read_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The user's tokenizer.json. Raises UnusableDataError below /data/tokenizer."""
    path = config.path or ""
    try:
        return Tokenizer.from_json(read_bytes(place(path)).decode(), config.end_of_document)
    except TokenizerError as error:
        raise UnusableDataError(
            [
                Problem(
                    f"/data/tokenizer/{error.field}", error.code, f"{path}: {error.detail}"
                )
            ]
        ) from error
    except FileNotFoundError as error:
        text = f"{path} does not exist where the job runs; check the path"
        raise UnusableDataError(
            [Problem("/data/tokenizer/path", "not_found", text)]
        ) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        text = f"{path} cannot be read: {error}; give the path of a tokenizer.json"
        raise UnusableDataError(
            [Problem("/data/tokenizer/path", "unreadable", text)]
        ) from error


def _sample(train: Sequence[_Owned]) -> Iterator[str]:
    """At most 32 Mi characters to train a tokenizer on: each source its weight's share,
    whole files in a fixed mixed order.
    """
    total = sum(source.source.weight for _, source in train)
    for owner, source in train:
        with _pointing(owner):
            yield from _head(source, int(_SAMPLE_CHARS * source.source.weight / total))


def _head(source: FoundSource, chars: int) -> Iterator[str]:
    for file in in_sampling_order(source):
        for piece in file_pieces(source, file):
            yield piece.text[:chars]
            chars -= len(piece.text)
            if chars <= 0:
                return


def _require_length(made: Sequence[_Made], split: str, needed: int) -> None:
    problems = [
        Problem(
            f"{part.owner}/path",
            "too_short",
            f"{part.source.path} has {part.tokens(split)} {split} tokens, but one sample "
            f"needs seq_length + 1 = {needed};"
            " give more text or lower training.seq_length",
        )
        for part in made
        if part.tokens(split) < needed
    ]
    if problems:
        raise UnusableDataError(problems)


def _long_enough(train: Sequence[_Made], needed: int, progress: Progress) -> list[_Made]:
    """The corpora whose held-out documents give a sample; a small one may sit out, but
    not all of them.
    """
    kept = [part for part in train if part.tokens("validation") >= needed]
    for part in train:
        if part not in kept:
            progress(
                f"{part.source.path}: {part.tokens('validation')} held-out tokens are too "
                "few to evaluate on"
            )
    if not kept:
        most = max(part.tokens("validation") for part in train)
        text = (
            f"the held-out documents have {most} tokens, but one sample needs seq_length + "
            f"1 = {needed}; raise validation_fraction,"
            " lower training.seq_length, name data.validation sources, or set 0 to evaluate nothing"
        )
        raise UnusableDataError([Problem("/data/validation_fraction", "too_short", text)])
    return kept


@contextmanager
def _pointing(owner: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise UnusableDataError([error.problem(owner)]) from error


def _open_cache(cache: str) -> Place:
    try:
        return place(cache)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error


@contextmanager
def _cache_errors(data: DataConfig, cache: str) -> Iterator[None]:
    """Sources and tokenizer have turned their errors into problems; what the disk still
    says is about the cache.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        pointer = "/storage/path" if data.cache is None else "/data/cache"
        text = (
            f"prepared data cannot be kept in {cache}: {error}; give a folder that the job may "
            "write and that has room"
        )
        raise UnusableDataError([Problem(pointer, "not_writable", text)]) from error


def _root(cache: Place, uri: str) -> str:
    return cache.path if cache.local else uri.rstrip("/")


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]

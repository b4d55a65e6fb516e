"""Prepares the data of a config, from sources to the manifest of token files.

Owns: the order of preparation, the rules of the split, the unigram baseline. Must not
know: jobs, ranks.

Every result is a cache entry named by a hash of its inputs, so a second run with the
same content reads a few small files, and a change of one source rebuilds that source
only.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megatron_ray.config.data import DataConfig, DataSource, source_names
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.build_cache import get_or_build
from megatron_ray.data.preparation.cache_keys import digest
from megatron_ray.data.preparation.corpora import (
    COUNTS,
    RECORDS,
    Borders,
    ProgressCallback,
    build_corpus,
)
from megatron_ray.data.preparation.data_files import SourceAt, find_data
from megatron_ray.data.preparation.documents import fingerprint
from megatron_ray.data.preparation.errors import UnusableDataError, cause, errors_at
from megatron_ray.data.preparation.formats.records import tally_of_json
from megatron_ray.data.preparation.formats.suffixes import file_format
from megatron_ray.data.preparation.sources import SourceFiles
from megatron_ray.data.preparation.split import is_near_share
from megatron_ray.data.preparation.tokenizer_choice import make_tokenizer
from megatron_ray.data.prepared import PreparedCorpus, PreparedData
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.storage.files import read_bytes
from megatron_ray.storage.location import Location, parse_location

_DEFAULT_TEXT_KEY = DataSource.model_fields["text_key"].default


def no_progress(message: str) -> None:
    """Reports no progress."""


def prepare(
    data: DataConfig,
    cache: str,
    *,
    seq_length: int,
    progress: ProgressCallback = no_progress,
) -> PreparedData:
    """Tokenizes data that `cache` (path or URI) lacks and returns the manifest.

    `progress` receives short messages for users. Safe to run concurrently and to kill.
    Raises UnusableDataError for errors that the user can fix, at JSON pointers below
    /data (or /storage/path when the default cache cannot be written).
    """
    with _cache_errors(data, cache):
        location = parse_location(cache)
        data_files = find_data(data)
        # All problems are reported at once, before anything is built.
        if data_files.problems:
            raise UnusableDataError(data_files.problems)
        tokenizer, tokenizer_file = make_tokenizer(
            data.tokenizer, data_files.train, location, progress
        )
        builder = _CorpusBuilder(location, cache, tokenizer, progress)
        # Explicit validation sources replace the split.
        held_out_fraction = data.validation_fraction
        if data.validation:
            held_out_fraction = 0.0
        train = builder.build_all(data_files.train, held_out_fraction)
        validation = builder.build_all(data_files.validation, None)
    # Checked last: the length is not part of a cache key, so that jobs with another
    # seq_length use the same tokens.
    required = seq_length + 1
    _require_length(train, "train", required)
    notes = data_files.notes
    for built in [*train, *validation]:
        notes.extend(built.record_notes())
    notes += _key_notes([*data_files.train, *data_files.validation])
    notes += _border_notes([*train, *validation], tokenizer.end_of_document)
    if data.separate_documents:
        _require_borders(train, tokenizer.end_of_document)
    if data.validation:
        _require_length(validation, "validation", required)
    elif held_out_fraction:
        held_out = [built for built in train if built.has("validation")]
        notes += _share_notes(held_out, held_out_fraction)
        validation, omissions = _long_enough([*validation, *held_out], required)
        notes += omissions
    # A source may be both trained and evaluated on.
    notes = list(dict.fromkeys(notes))
    for note in notes:
        progress(note)
    return PreparedData(
        train=_manifests(train, "train"),
        validation=_manifests(validation, "validation"),
        tokenizer_path=f"{builder.cache_uri}/{tokenizer_file}",
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        unigram_nats=unigram_nats(_counts_by_weight(validation)),
        notes=tuple(notes),
    )


def unigram_nats(blend: Sequence[tuple[float, npt.NDArray[np.int64]]]) -> float | None:
    """Returns the entropy in nats per token of a blend of (weight, token counts).

    It is the loss of a model that always predicts the tokens' frequencies. None for an
    empty blend.
    """
    if not blend:
        return None
    total_weight = 0.0
    # Averages frequencies, not counts, because a blend samples by weight, whatever the
    # sizes of its corpora.
    weighted = np.zeros(len(blend[0][1]))
    for weight, counts in blend:
        total_weight += weight
        weighted = weighted + weight * counts / counts.sum()
    frequencies = weighted / total_weight
    # 0 log 0 counts as 0.
    used = frequencies[frequencies > 0]
    # Adding zero turns the -0.0 of a single token into 0.0.
    return float(-(used * np.log(used)).sum()) + 0.0


class _BuiltCorpus:
    """A source's entry in the cache."""

    def __init__(
        self,
        pointer: str,
        source: DataSource,
        entry: Location,
        entry_uri: str,
        description: dict[str, Any],
    ) -> None:
        self.pointer = pointer
        self.source = source
        self._entry = entry
        self._entry_uri = entry_uri
        self._description = description

    @property
    def borders(self) -> Borders | None:
        """The ends of documents in prepared tokens; None for text."""
        # Earlier entries of text have none either.
        borders = self._description.get("borders")
        return borders and Borders(**borders)

    def has(self, split: str) -> bool:
        return self._description[split] is not None

    def num_tokens(self, split: str) -> int:
        return int(self._description[split]["num_tokens"])

    def manifest(self, split: str, name: str) -> PreparedCorpus:
        part = self._description[split]
        prefix = part["prefix"]
        # A bare name is a file of the entry; a path belongs to a prepared source, which is
        # used in place.
        if "/" not in prefix:
            prefix = f"{self._entry_uri}/{prefix}"
        return PreparedCorpus(
            prefix=prefix,
            weight=self.source.weight,
            num_tokens=part["num_tokens"],
            num_documents=part["num_documents"],
            name=name,
        )

    def record_notes(self) -> list[str]:
        """Returns sentences about records that are left out."""
        # Only sources of text have records.
        if RECORDS not in self._description["files"]:
            return []
        tally = tally_of_json(json.loads(read_bytes(self._entry / RECORDS)))
        return tally.notes(self.source.path)

    def read_counts(self) -> npt.NDArray[np.int64]:
        content = read_bytes(self._entry / COUNTS)
        counts: npt.NDArray[np.int64] = np.load(io.BytesIO(content))
        return counts


class _CorpusBuilder:
    """Builds the entries of one cache with one tokenizer."""

    def __init__(
        self,
        cache: Location,
        cache_path: str,
        tokenizer: Tokenizer,
        progress: ProgressCallback,
    ) -> None:
        self.cache_uri = cache_path.rstrip("/")
        if cache.is_local:
            # An absolute path and no file:// URI, because ranks may run in another working
            # directory.
            self.cache_uri = cache.path
        self._cache = cache
        self._tokenizer = tokenizer
        self._progress = progress
        # The end token is part of the key, because it is appended to every document.
        self._tokenizer_digest = digest(tokenizer.to_json(), tokenizer.end_of_document)

    def build_all(
        self, sources: Sequence[SourceAt], held_out_fraction: float | None
    ) -> list[_BuiltCorpus]:
        """Builds each source. Raises UnusableDataError at its JSON pointer."""
        return [self._build(source_at, held_out_fraction) for source_at in sources]

    def _build(self, source_at: SourceAt, held_out_fraction: float | None) -> _BuiltCorpus:
        pointer, source_files = source_at
        # Files of validation data replace a share of the documents.
        if held_out_fraction and source_files.validation_files:
            held_out_fraction = 0.0

        def build(work: Path) -> dict[str, Any]:
            return build_corpus(
                work,
                source_files,
                self._tokenizer,
                held_out_fraction,
                self._cache.is_local,
                self._progress,
            )

        with errors_at(pointer):
            # The inputs that determine the token files; weight and seq_length do not.
            key = digest(
                fingerprint(source_files),
                self._tokenizer_digest,
                held_out_fraction,
                *_formats(source_files, held_out_fraction),
            )
            entry = f"corpora/{key}"
            description = get_or_build(self._cache, entry, build)
        return _BuiltCorpus(
            pointer,
            source_files.source,
            self._cache / entry,
            f"{self.cache_uri}/{entry}",
            description,
        )


def _formats(source_files: SourceFiles, held_out_fraction: float | None) -> list[str]:
    """Returns what changed since earlier entries, which have no such part in their key."""
    formats = []
    if held_out_fraction:
        formats.append("split 2")
    if source_files.kind == "prepared":
        formats.append("borders")
    return formats


def _manifests(corpora: Sequence[_BuiltCorpus], split: str) -> tuple[PreparedCorpus, ...]:
    names = source_names([built.source for built in corpora])
    manifests = []
    for built, name in zip(corpora, names, strict=True):
        manifests.append(built.manifest(split, name))
    return tuple(manifests)


def _counts_by_weight(
    corpora: Sequence[_BuiltCorpus],
) -> list[tuple[float, npt.NDArray[np.int64]]]:
    return [(built.source.weight, built.read_counts()) for built in corpora]


def _require_length(corpora: Sequence[_BuiltCorpus], split: str, required: int) -> None:
    problems = []
    for built in corpora:
        num_tokens = built.num_tokens(split)
        if num_tokens >= required:
            continue
        detail = (
            f"{built.source.path} has {num_tokens} {split} tokens, but one sample needs "
            f"seq_length + 1 = {required}; give more text or lower training.seq_length"
        )
        problems.append(Problem(f"{built.pointer}/path", "too_short", detail))
    if problems:
        raise UnusableDataError(problems)


def _key_notes(sources: Sequence[SourceAt]) -> list[str]:
    """Returns notes on sources that have no fields and name one."""
    notes = []
    for _, source_files in sources:
        source = source_files.source
        formats = {file_format(file.path) for file in source_files.files}
        kinds = {form.kind for form in formats if form is not None}
        if source.text_key != _DEFAULT_TEXT_KEY and not kinds & {"json_lines", "parquet"}:
            notes.append(
                f"{source.path} has no fields, so text_key={source.text_key!r} has no effect"
            )
    return notes


def _border_notes(corpora: Sequence[_BuiltCorpus], end_of_document: int) -> list[str]:
    """Returns notes on prepared tokens without the tokenizer's end token."""
    notes = []
    for built in corpora:
        borders = built.borders
        if borders is None or borders.num_end_tokens:
            continue
        note = (
            f"{built.source.path} holds no end token {end_of_document}, so a model that is "
            "trained on it does not learn where documents end"
        )
        if borders.last_token is not None and borders.num_documents > 1:
            note += (
                f"; its documents end with token {borders.last_token}: if that is their end "
                "token, set data.tokenizer.end_of_document"
            )
        notes.append(note)
    return notes


def _require_borders(corpora: Sequence[_BuiltCorpus], end_of_document: int) -> None:
    """Raises UnusableDataError when no source shows where documents begin or end."""
    paths = []
    for built in corpora:
        if built.borders is None or built.borders.can_be_separated:
            return
        paths.append(built.source.path)
    detail = (
        f"{', '.join(paths)} holds no end token {end_of_document}, and its index is of a "
        "single document, so separate_documents cannot see where documents end; name the "
        "end token of the data as data.tokenizer.end_of_document, prepare the data with an "
        "index of every document, or set separate_documents to false"
    )
    raise UnusableDataError([Problem("/data/separate_documents", "no_borders", detail)])


def _share_notes(train: Sequence[_BuiltCorpus], fraction: float) -> list[str]:
    """Returns notes on sources of which another share is held out than was asked for."""
    notes = []
    for built in train:
        held_out = built.num_tokens("validation")
        share = held_out / (held_out + built.num_tokens("train"))
        if not is_near_share(share, fraction):
            notes.append(
                f"{built.source.path}: {share:.1%} of the tokens are held out instead of "
                f"{fraction:.1%}, because no choice of texts, with all copies of each on "
                "one side, is nearer"
            )
    return notes


def _long_enough(
    train: Sequence[_BuiltCorpus], required: int
) -> tuple[list[_BuiltCorpus], list[str]]:
    """Returns the corpora with enough held-out tokens for a sample, and notes on others.

    Small corpora are left out of the evaluation, unless all are too small. Raises
    UnusableDataError.
    """
    long_enough = []
    notes = []
    most_tokens = 0
    for built in train:
        num_tokens = built.num_tokens("validation")
        most_tokens = max(most_tokens, num_tokens)
        if num_tokens >= required:
            long_enough.append(built)
        else:
            notes.append(
                f"{built.source.path}: {num_tokens} held-out tokens are too few to evaluate "
                "on"
            )
    if not long_enough:
        detail = (
            f"the held-out documents have {most_tokens} tokens, but one sample needs "
            f"seq_length + 1 = {required}; raise validation_fraction, lower "
            "training.seq_length, name data.validation sources, or set 0 to evaluate nothing"
        )
        raise UnusableDataError([Problem("/data/validation_fraction", "too_short", detail)])
    return long_enough, notes


@contextmanager
def _cache_errors(data: DataConfig, cache: str) -> Iterator[None]:
    """Converts errors of the cache's disk to UnusableDataError.

    Errors of sources and of the tokenizer already are UnusableDataError.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        pointer = "/data/cache"
        if data.cache is None:
            pointer = "/storage/path"
        detail = (
            f"prepared data cannot be kept in {cache}: {cause(error)}; give a folder that "
            "the job may write and that has room"
        )
        raise UnusableDataError([Problem(pointer, "not_writable", detail)]) from error

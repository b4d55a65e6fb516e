"""Builds the corpus of each source once, as an entry of the cache.

Owns: what determines an entry, and what is known of a finished one. Must not know: blends,
seq_length, which splits are long enough.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ray.config.data import DataSource
from megatron_ray.data.preparation.build_cache import get_or_build
from megatron_ray.data.preparation.cache_keys import digest
from megatron_ray.data.preparation.corpora import (
    COUNTS,
    RECORDS,
    Borders,
    ProgressCallback,
    build_corpus,
)
from megatron_ray.data.preparation.data_files import SourceAt
from megatron_ray.data.preparation.documents import fingerprint
from megatron_ray.data.preparation.errors import errors_at
from megatron_ray.data.preparation.formats.records import tally_of_json
from megatron_ray.data.preparation.sources import SourceFiles
from megatron_ray.data.prepared import PreparedCorpus
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.storage.files import read_bytes
from megatron_ray.storage.location import Location


class BuiltCorpus:
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
        """Returns whether there are documents of a split."""
        return self._description[split] is not None

    def num_tokens(self, split: str) -> int:
        """Returns the tokens of a split."""
        return int(self._description[split]["num_tokens"])

    def first_tokens(self, split: str) -> list[int]:
        """Returns the beginning of the split's first document, if it was kept."""
        return list(self._description[split].get("first_tokens", ()))

    def manifest(self, split: str, name: str) -> PreparedCorpus:
        """Returns the split's token files, for the source called `name`."""
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
        """Returns the number of held-out occurrences of each token, [vocab_size]."""
        content = read_bytes(self._entry / COUNTS)
        counts: npt.NDArray[np.int64] = np.load(io.BytesIO(content))
        return counts


class CorpusBuilder:
    """Builds the entries of one cache with one tokenizer."""

    def __init__(
        self,
        cache: Location,
        cache_path: str,
        tokenizer: Tokenizer,
        rows: int | None,
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
        # Includes the tokens around a document, because they are part of the corpus.
        self._tokenizer_digest = digest(*tokenizer.identity)
        # Prepared tokens may be among those that no text becomes and the model lacks.
        self._vocab_size = tokenizer.vocab_size
        if rows is not None:
            self._vocab_size = min(rows, tokenizer.vocab_size)

    def build_all(
        self, sources: Sequence[SourceAt], held_out_fraction: float | None
    ) -> list[BuiltCorpus]:
        """Builds each source. Raises UnusableDataError at its JSON pointer."""
        return [self._build(source_at, held_out_fraction) for source_at in sources]

    def _build(self, source_at: SourceAt, held_out_fraction: float | None) -> BuiltCorpus:
        pointer, source_files = source_at
        # Files of validation data replace a share of the documents.
        if held_out_fraction and source_files.validation_files:
            held_out_fraction = 0.0

        def build(work: Path) -> dict[str, Any]:
            return build_corpus(
                work,
                source_files,
                self._tokenizer,
                self._vocab_size,
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
                *self._formats(source_files, held_out_fraction),
            )
            entry = f"corpora/{key}"
            description = get_or_build(self._cache, entry, build)
        return BuiltCorpus(
            pointer,
            source_files.source,
            self._cache / entry,
            f"{self.cache_uri}/{entry}",
            description,
        )

    def _formats(
        self, source_files: SourceFiles, held_out_fraction: float | None
    ) -> list[str]:
        """Returns what earlier entries lack, which have no such part in their key."""
        formats = []
        if held_out_fraction:
            formats.append("split 2")
        if source_files.kind == "prepared":
            formats.append("borders 2")
            if self._vocab_size < self._tokenizer.vocab_size:
                formats.append(f"below {self._vocab_size}")
        return formats

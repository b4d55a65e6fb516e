"""Finds the files of all sources of a config.

Owns: that no file is trained on and held out at once. Must not know: the contents of
files.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ray.config.data import DataConfig, DataSource
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.errors import DataError
from megatron_ray.data.preparation.file_selection import Role, named_files
from megatron_ray.data.preparation.sources import SourceFiles, find_source
from megatron_ray.storage.files import FileStat, file_identity

SourceAt = tuple[str, SourceFiles]
"""The JSON pointer of a source in the spec, and its files."""
_FileKeys = set[tuple[str, str]]
"""Files of a source, each with the field of its text."""


@dataclass(frozen=True)
class DataFiles:
    """The files of all sources of a config."""

    train: list[SourceAt]
    validation: list[SourceAt]
    """Sources to evaluate on: those of the config, else validation files beside training
    files, at the pointers of the latter."""
    problems: list[Problem]
    """What makes the sources unusable."""

    @property
    def notes(self) -> list[str]:
        """Sentences about files that are left out."""
        notes: list[str] = []
        for _, source in [*self.train, *self.validation]:
            notes.extend(source.notes)
        return notes


def find_data(data: DataConfig, weights: ModelTokenizer | None = None) -> DataFiles:
    """Finds the files of every source; a source without files is a problem.

    `weights` is the tokenizer of the weights that the run begins with, if any.
    """
    problems: list[Problem] = []
    train = _find_each(data.train, "train", problems)
    validation = _find_each(data.validation, "validation", problems)
    if data.validation:
        train = _without_evaluated(train, validation, problems)
        validation = _without_trained(train, validation, problems)
    elif data.validation_fraction:
        train = _with_validation(_without_repeated(train))
        validation = _validation_beside(train)
    # Prepared tokens determine the vocabulary.
    prepared_at = _first_prepared(train + validation)
    is_trained = data.tokenizer.kind == "bpe" and weights is None
    if prepared_at is not None and is_trained:
        detail = (
            f"{prepared_at}/path is already tokenized and a tokenizer trained now would not "
            "fit; use kind `file` with the one it was made with"
        )
        problems.append(Problem("/data/tokenizer/kind", "tokenizer_needed", detail))
    return DataFiles(train, validation, problems)


def _find_each(
    sources: Sequence[DataSource], role: Role, problems: list[Problem]
) -> list[SourceAt]:
    sources_at = []
    for number, source in enumerate(sources):
        pointer = f"/data/{role}/{number}"
        try:
            sources_at.append((pointer, find_source(source, role)))
        except DataError as error:
            problems.append(error.problem(pointer))
    return sources_at


def _first_prepared(sources_at: Sequence[SourceAt]) -> str | None:
    for pointer, source in sources_at:
        if source.kind == "prepared":
            return pointer
    return None


def _without_evaluated(
    train: Sequence[SourceAt], validation: Sequence[SourceAt], problems: list[Problem]
) -> list[SourceAt]:
    """Leaves out of training folders and patterns what the validation sources read."""
    evaluated = _all_keys(validation)
    remaining = []
    for pointer, source in train:
        shared = _shared(source, evaluated)
        if not shared:
            remaining.append((pointer, source))
        elif source.is_named:
            # Named by itself in both lists, it is meant for both.
            note = f"{source.source.path} is both trained on and evaluated on"
            remaining.append((pointer, _with_note(source, note)))
        elif len(shared) == len(source.files):
            problems.append(_nothing_left(pointer, source))
        else:
            reason = "of data.validation: not trained on"
            remaining.append((pointer, _without(source, shared, reason)))
    return remaining


def _without_trained(
    train: Sequence[SourceAt], validation: Sequence[SourceAt], problems: list[Problem]
) -> list[SourceAt]:
    """Leaves out of validation folders and patterns the files that are trained on."""
    trained = _all_keys(train)
    remaining = []
    for pointer, source in validation:
        shared = _shared(source, trained)
        if not shared or source.is_named:
            remaining.append((pointer, source))
        elif len(shared) == len(source.files):
            problems.append(_nothing_left(pointer, source))
        else:
            reason = "of data.train: not evaluated on"
            remaining.append((pointer, _without(source, shared, reason)))
    return remaining


def _nothing_left(pointer: str, source: SourceFiles) -> Problem:
    detail = (
        f"all files of {source.source.path} are both in data.train and in data.validation; "
        "give other files in one of them, or leave data.validation out, and a share of the "
        "documents is held out"
    )
    return Problem(f"{pointer}/path", "shared_files", detail)


def _without_repeated(train: Sequence[SourceAt]) -> list[SourceAt]:
    """Leaves files that two sources read out of the one that has more files.

    Each source holds out documents of its own, which the other would train on.
    """
    remaining = list(train)
    for first, second in _overlapping(train):
        larger, smaller = second, first
        if len(remaining[first][1].files) > len(remaining[second][1].files):
            larger, smaller = first, second
        pointer, source = remaining[larger]
        shared = _shared(source, _keys(remaining[smaller][1]))
        # Of equal sources the same documents are held out.
        if shared and len(shared) < len(source.files):
            reason = f"of {remaining[smaller][0]}: read there only"
            remaining[larger] = (pointer, _without(source, shared, reason))
    return remaining


def _overlapping(train: Sequence[SourceAt]) -> list[tuple[int, int]]:
    """Returns the pairs of numbers of sources that share a file."""
    if len(train) < 2:
        return []
    readers: dict[tuple[str, str], list[int]] = {}
    for number, (_, source) in enumerate(train):
        for key in _keys(source):
            readers.setdefault(key, []).append(number)
    pairs: set[tuple[int, int]] = set()
    for numbers in readers.values():
        pairs.update(itertools.combinations(numbers, 2))
    return sorted(pairs)


def _with_validation(train: Sequence[SourceAt]) -> list[SourceAt]:
    """Restricts the validation files of each source to those that can be evaluated on."""
    result = []
    for pointer, source in train:
        files = source.validation_files
        if files:
            # Another source may name them to train on.
            trained = _all_keys(train)
            files = tuple(file for file in files if _key(source, file) not in trained)
        if not sum(file.size for file in files):
            files = ()
        result.append((pointer, replace(source, validation_files=files)))
    return result


def _validation_beside(train: Sequence[SourceAt]) -> list[SourceAt]:
    """Returns the validation files beside training files, as sources."""
    beside = []
    for pointer, source in train:
        files = source.validation_files
        if files:
            note = f"{source.source.path}: {named_files(files, source.folder)} evaluated on"
            own = replace(source, files=files, validation_files=(), notes=(note,))
            beside.append((pointer, own))
    return beside


def _all_keys(sources_at: Sequence[SourceAt]) -> _FileKeys:
    keys: _FileKeys = set()
    for _, source in sources_at:
        keys |= _keys(source)
    return keys


def _keys(source: SourceFiles) -> _FileKeys:
    return {_key(source, file) for file in source.files}


def _key(source: SourceFiles, file: FileStat) -> tuple[str, str]:
    path = file.path
    # A file may be reached by several paths.
    if source.root.is_local:
        path = file_identity(path)
    return path, source.source.text_key


def _shared(source: SourceFiles, keys: _FileKeys) -> list[FileStat]:
    if not keys:
        return []
    return [file for file in source.files if _key(source, file) in keys]


def _without(source: SourceFiles, files: Sequence[FileStat], reason: str) -> SourceFiles:
    left_out = {file.path for file in files}
    remaining = tuple(file for file in source.files if file.path not in left_out)
    note = f"{source.source.path}: {named_files(files, source.folder)} {reason}"
    return _with_note(replace(source, files=remaining), note)


def _with_note(source: SourceFiles, note: str) -> SourceFiles:
    return replace(source, notes=(*source.notes, note))

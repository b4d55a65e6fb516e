"""Chooses the files of a folder or pattern that a source reads.

Owns: the names that mark splits and descriptions, and the sentences about files left
out. Pure. Must not know: the contents of files.

Published data sets keep all splits in one folder, beside a description and a licence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from megatron_ray.data.preparation.errors import DataError
from megatron_ray.data.preparation.formats.suffixes import (
    TYPES,
    file_format,
    remedy_of,
    unpacked_path,
)
from megatron_ray.storage.files import FileStat

Split = Literal["train", "validation", "test"]
Role = Literal["train", "validation"]
"""The list of the spec that names a source."""

_MAX_NAMES_SHOWN = 5
# A word of a name: `test` in `test-0.jsonl` and `my_testset2.txt`, not in `latest.txt`.
_SPLIT_WORD = re.compile(
    r"(?<![a-z])(?:"
    r"(?P<train>train|training)"
    r"|(?P<validation>validations?|validate|valid|val|dev|devel|development"
    r"|evals?|evaluations?)"
    r"|(?P<test>tests?|testing|h[eo]ld[-_. ]?outs?)"
    r")(?:[-_]?(?:sets?|splits?|data|dev))?(?![a-z])"
)
# Where such a word begins or ends in names like myTest.jsonl and testA.jsonl.
_CAPITAL = re.compile(
    r"(?<=[a-z0-9])(?=Train|Val|Eval|Test|Held|Hold)"
    r"|(?<=[Tt]est|[Ee]val)(?=[A-Z])|(?<=[Dd]ev|[Vv]al)(?=[A-Z])|(?<=[Tt]rain|[Vv]alid)(?=[A-Z])"
)
_DESCRIPTION = re.compile(
    r"(?:readme|licen[cs]e|copying)(?![a-z])"
    r"|(?:notice|authors|contributors|contributing|changelog|citation|code_of_conduct"
    r"|requirements|datasheet|data(?:set)?_card)\."
    # What libraries write beside the data.
    r"|(?:dataset_infos?|dataset_dict|state|metadata|manifest|index|config|tokenizer"
    r"|tokenizer_config|special_tokens_map|generation_config|croissant|package)\.json$"
)


_CACHE = re.compile(r"(?:cache|tmp)[-_]?[^/]*\.arrow$")
"""What Hugging Face's datasets keeps beside a set: results of its own functions."""


@dataclass(frozen=True)
class Selection:
    """The files of a folder or pattern, by what becomes of them."""

    files: list[FileStat]
    """Files that the source consists of."""
    validation: list[FileStat]
    """Of a source to train on: the files that are named as validation data."""
    notes: list[str]
    """Sentences about files that are left out."""


@dataclass
class _Groups:
    """Files by the meaning of their names."""

    train: list[FileStat] = field(default_factory=list)
    validation: list[FileStat] = field(default_factory=list)
    test: list[FileStat] = field(default_factory=list)
    unmarked: list[FileStat] = field(default_factory=list)
    descriptions: list[FileStat] = field(default_factory=list)
    unreadable: list[FileStat] = field(default_factory=list)
    """Data in formats that are not read."""
    hidden: list[FileStat] = field(default_factory=list)
    """Data in files or folders whose names begin with `.` or `_`."""
    caches: list[FileStat] = field(default_factory=list)
    packed: list[FileStat] = field(default_factory=list)
    """Compressed files beside the same files unpacked."""
    others: list[FileStat] = field(default_factory=list)

    def readable(self) -> list[FileStat]:
        """Returns the files that a source may consist of."""
        return [*self.train, *self.validation, *self.test, *self.unmarked]


def select_files(
    path: str, root: str, files: Sequence[FileStat], role: Role, *, is_folder: bool
) -> Selection:
    """Chooses the files that a source reads among those in its folder or pattern.

    `root` is the folder that names in messages are relative to. Text that is named as
    held out is not trained on, and text for training is not evaluated on, unless the
    path means nothing else, as `set/test-*` does. Raises DataError when no file is
    left, or when data are in a format that is not read.
    """
    groups = _grouped(files, root, skips_hidden=is_folder)
    readable = groups.readable()
    if not readable and not is_folder:
        # A pattern that matches nothing but descriptions means them.
        readable = [file for file in groups.descriptions if file_format(file.path)]
        groups.descriptions = _without(groups.descriptions, readable)
    if groups.unreadable:
        pattern = None
        if is_folder and readable:
            pattern = _pattern(path, readable)
        raise _unreadable(path, root, groups.unreadable, pattern)
    chosen = _for_evaluation(groups)
    if role == "train":
        chosen = [*groups.train, *groups.unmarked]
    if readable and not chosen:
        if is_folder and split_of(PurePosixPath(root).name) is None:
            raise _other_split(path, root, readable, role)
        chosen = readable
    notes = []
    for reason, left_out in _left_out(groups, chosen, role):
        if left_out:
            notes.append(f"{path}: {named_files(left_out, root)} {reason}")
    notes += _hidden_notes(path, root, chosen)
    return Selection(chosen, _without(groups.validation, chosen), notes)


def _hidden_notes(path: str, root: str, chosen: Sequence[FileStat]) -> list[str]:
    """Returns a sentence about chosen files that a user may not expect to be read.

    Shells leave them out of patterns, and programs keep copies of files in such folders.
    """
    hidden = [file for file in chosen if "/." in f"/{_relative_name(file, root)}"]
    if not hidden:
        return []
    return [f"{path}: {named_files(hidden, root)} with names that begin with .: read"]


def split_of(name: str) -> Split | None:
    """Returns the split that a relative path is marked as, by its first part that is.

    A folder thus decides for the files in it.
    """
    for part in PurePosixPath(_CAPITAL.sub("_", name).lower()).parts:
        match = _SPLIT_WORD.search(part)
        if match is None:
            continue
        if match["train"]:
            return "train"
        if match["validation"]:
            return "validation"
        return "test"
    return None


def named_files(files: Sequence[FileStat], root: str) -> str:
    """Returns the number of files and the names of the first, below `root`."""
    names = sorted(_relative_name(file, root) for file in files)
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    if len(names) > _MAX_NAMES_SHOWN:
        shown += ", ..."
    if len(names) == 1:
        return f"1 file ({shown})"
    return f"{len(names)} files ({shown})"


def _relative_name(file: FileStat, root: str) -> str:
    return file.path.removeprefix(root).lstrip("/")


def _grouped(files: Sequence[FileStat], root: str, *, skips_hidden: bool) -> _Groups:
    groups = _Groups()
    paths = {file.path for file in files}
    for file in files:
        name = _relative_name(file, root)
        unpacked = unpacked_path(file.path)
        is_read = file_format(name) is not None
        is_data = is_read or remedy_of(name) is not None
        split = split_of(name)
        if skips_hidden and _is_hidden(name):
            # What programs keep in their own folders is not mentioned, unless it is data.
            if is_data:
                groups.hidden.append(file)
        elif unpacked != file.path and unpacked in paths:
            groups.packed.append(file)
        elif _DESCRIPTION.match(PurePosixPath(name.lower()).name):
            groups.descriptions.append(file)
        elif skips_hidden and _CACHE.match(PurePosixPath(name).name):
            groups.caches.append(file)
        elif is_read:
            getattr(groups, split or "unmarked").append(file)
        # What is held out is not trained on in any format.
        elif is_data and split in (None, "train"):
            groups.unreadable.append(file)
        else:
            groups.others.append(file)
    return groups


def _is_hidden(name: str) -> bool:
    # `_` as in Spark's _SUCCESS and _logs.
    return any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def _for_evaluation(groups: _Groups) -> list[FileStat]:
    # A set without validation files may have test files to evaluate on.
    chosen = groups.validation or groups.test
    if groups.train and chosen:
        return chosen
    return [*chosen, *groups.unmarked]


def _without(files: Sequence[FileStat], chosen: Sequence[FileStat]) -> list[FileStat]:
    paths = {file.path for file in chosen}
    return [file for file in files if file.path not in paths]


def _left_out(
    groups: _Groups, chosen: Sequence[FileStat], role: Role
) -> list[tuple[str, list[FileStat]]]:
    """Returns each reason to leave files out, with its files."""
    use = "not trained on"
    if role == "validation":
        use = "not evaluated on"
    return [
        (f"of training data: {use}", _without(groups.train, chosen)),
        (f"of validation data: {use}", _without(groups.validation, chosen)),
        (f"of test data: {use}", _without(groups.test, chosen)),
        (f"without a mark of held-out data: {use}", _without(groups.unmarked, chosen)),
        ("describing the data: not read", groups.descriptions),
        ("that a library keeps as its cache: not read", groups.caches),
        ("beside the same file unpacked: not read", groups.packed),
        ("with names that begin with . or _: not read", groups.hidden),
        (f"of other types: not read; convert them to {TYPES} to use them", groups.others),
    ]


def _unreadable(
    path: str, root: str, unreadable: Sequence[FileStat], pattern: str | None
) -> DataError:
    """Returns the error for data in a format that is not read."""
    detail = (
        f"{path} has {named_files(unreadable, root)} of a type that cannot be read; "
        f"{remedy_of(unreadable[0].path)}"
    )
    if pattern is not None:
        detail += f", or give only the files to read, for example {pattern}"
    return DataError("file_type", detail)


def _other_split(
    path: str, root: str, readable: Sequence[FileStat], role: Role
) -> DataError:
    """Returns the error for a folder whose files are all named as another split."""
    use = "held-out data, and there is none to train on"
    if role == "validation":
        use = "training data, and there is none to evaluate on"
    detail = (
        f"{path} has {named_files(readable, root)} named as {use}; to use these files "
        f"nevertheless, give a pattern: {_pattern(path, readable)}"
    )
    return DataError("other_split", detail)


def _pattern(folder: str, files: Sequence[FileStat]) -> str:
    """Returns a pattern for the files in a folder that have the suffix of the first."""
    name = PurePosixPath(files[0].path)
    suffix = name.suffix
    form = file_format(files[0].path)
    if form is not None and form.compression is not None:
        suffix = name.with_suffix("").suffix + suffix
    return f"{folder.rstrip('/')}/**/*{suffix}"

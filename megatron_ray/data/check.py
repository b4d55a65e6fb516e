"""A look at the data before a job is accepted.

Owns: what can be told in a second. Must not know: tokenizing, caches, jobs.
"""

from megatron_ray.config.data import DataConfig
from megatron_ray.config.problem import Problem
from megatron_ray.data.indexed import IndexedDataset
from megatron_ray.data.prepare import UnusableDataError, read_tokenizer
from megatron_ray.data.sources import DataError, FoundSource, file_pieces, find_all
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.files import check_writable
from megatron_ray.storage.location import parse_location


def check_data(data: DataConfig, seq_length: int, storage_path: str) -> list[Problem]:
    """What is surely wrong: paths, the first document of each source, the tokenizer,
    too little text, storage that refuses a file.

    Reads a few kilobytes and tokenizes nothing, so an empty list is no promise:
    `prepare` sees the rest. Writes and deletes one small file below `storage_path` (and
    data.cache), and creates no folder on a local disk.
    """
    found = find_all(data)
    problems = list(found.problems)
    # Held-out documents come out of the same text: a lone source must be long enough
    # for both.
    samples = (
        2
        if len(data.train) == 1 and not data.validation and data.validation_fraction
        else 1
    )
    for owner, source in found.train:
        problems += _source_problems(owner, source, data, samples * (seq_length + 1))
    for owner, source in found.validation:
        problems += _source_problems(owner, source, data, seq_length + 1)
    if data.tokenizer.kind == "file":
        try:
            read_tokenizer(data.tokenizer)
        except UnusableDataError as error:
            problems += error.problems
    problems += _storage_problems("/storage/path", storage_path)
    if data.cache is not None:
        problems += _storage_problems("/data/cache", data.cache)
    return problems


def _source_problems(
    owner: str, found: FoundSource, data: DataConfig, needed: int
) -> list[Problem]:
    try:
        most = _most_tokens(found, data)
    except DataError as error:
        return [error.problem(owner)]
    if most is None or most >= needed:
        return []
    text = (
        f"{found.source.path} has at most {most} tokens, but at least {needed} are needed "
        "for samples of seq_length + 1;"
        " give more text or lower training.seq_length"
    )
    return [Problem(f"{owner}/path", "too_short", text)]


def _most_tokens(found: FoundSource, data: DataConfig) -> int | None:
    """An upper bound of the tokens; None when size alone does not tell.

    Raises DataError when the first document is unreadable.
    """
    if found.kind == "prepared":
        if not found.root.is_local:
            return None  # the index of a large remote corpus takes long to fetch
        try:
            return IndexedDataset(found.root.path).num_tokens
        except (OSError, ValueError) as error:
            raise DataError("bad_corpus", f"{error}; prepare the data again") from error
    if next(file_pieces(found, found.files[0]), None) is None and len(found.files) == 1:
        raise DataError(
            "empty", f"{found.source.path} holds no text; give files with text in them"
        )
    packed = any(file.path.lower().endswith(".parquet") for file in found.files)
    if packed or data.tokenizer.kind == "file":
        return None
    # A byte-level token is at least one byte, and each file's last document has an end
    # mark; jsonl has more syntax than marks.
    return found.size + len(found.files)


def _storage_problems(pointer: str, path: str) -> list[Problem]:
    try:
        check_writable(parse_location(path))
    except StorageError as error:
        text = (
            f"{path} cannot be written where the job runs: {error.cause}; give a folder or URI that "
            "it may write"
        )
        return [Problem(pointer, "not_writable", text)]
    return []

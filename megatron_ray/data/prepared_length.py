"""Keeps the number of training tokens of prepared data, for plans.

Owns: the entries of lengths. Must not know: how data are prepared.
"""

import pyarrow as pa

from megatron_ray.config.data import DataConfig
from megatron_ray.data.preparation.build_cache import get_or_build, read_description
from megatron_ray.data.preparation.cache_keys import digest
from megatron_ray.data.preparation.data_files import DataFiles, find_data
from megatron_ray.data.preparation.documents import fingerprint
from megatron_ray.exceptions import InputError
from megatron_ray.storage.location import Location, parse_location


def keep_length(
    cache: Location, data: DataConfig, data_files: DataFiles, num_tokens: int
) -> None:
    """Stores the number of training tokens. Raises OSError."""
    entry = _entry(data, data_files)
    get_or_build(cache, entry, lambda _: {"num_tokens": num_tokens})


def num_prepared_tokens(data: DataConfig, cache: str) -> int | None:
    """Returns the training tokens of data that `cache` has; None when it lacks them.

    Looks at names, sizes and times of files only, and writes nothing.
    """
    try:
        data_files = find_data(data)
        if data_files.problems:
            return None
        entry = parse_location(cache) / _entry(data, data_files)
        description = read_description(entry)
    except (InputError, OSError, pa.ArrowException):
        # Whatever is wrong is a problem of the preparation.
        return None
    if description is None:
        return None
    return int(description["num_tokens"])


def _entry(data: DataConfig, data_files: DataFiles) -> str:
    """Returns the name of an entry, which has what determines the number."""
    sources = [*data_files.train, *data_files.validation]
    prints = [fingerprint(source_files) for _, source_files in sources]
    fields = {"train", "validation", "validation_fraction", "tokenizer"}
    return f"lengths/{digest(data.model_dump(mode='json', include=fields), prints)}"

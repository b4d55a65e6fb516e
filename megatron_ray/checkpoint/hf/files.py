"""Reads the files of a model in Hugging Face format: config.json and safetensors headers.

The safetensors format (8 bytes of length, a JSON header, row-major tensors) is read here
and not by its library, which maps whole files into memory and supports local paths
only.

Owns: files, headers and their errors. Torch-free. Must not know: families, the meaning
of tensors.
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.storage.errors import MissingFileError
from megatron_ray.storage.storage import Storage, open_storage

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
SINGLE = "model.safetensors"
SHARDS = "model.safetensors.index.json"
FP8 = "F8_E4M3"
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, FP8: 1}
"""Bytes per element of the types of weights."""
_OTHER_BYTES = {"F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element of types that only computed buffers have."""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""Largest header in bytes, as in the safetensors library."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    file: str
    dtype: str
    """Type as named by the format, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


@dataclass(frozen=True)
class StoredModel:
    """The contents of a folder."""

    path: str
    storage: Storage
    config: Mapping[str, Any]
    """Values of config.json."""
    tensors: Mapping[str, StoredTensor]
    """Tensors of all files by name."""


def is_hf_folder(path: str) -> bool:
    """Returns whether a folder has a config.json, as every published model does.

    Raises StorageError.
    """
    return open_storage(path).exists(CONFIG)


def open_folder(path: str) -> StoredModel:
    """Reads config.json and the headers of all files.

    Raises CheckpointError when the folder or a file in it is missing, truncated or
    unreadable.
    """
    storage = open_storage(path)
    sizes = {entry.name: entry.size for entry in storage.list() if not entry.is_folder}
    if not sizes:
        raise CheckpointError(
            "read",
            path,
            "it is not a folder with files in it; give the folder that holds config.json",
        )
    if CONFIG not in sizes:
        raise CheckpointError(
            "read",
            path,
            f"it holds no {CONFIG}; give the folder of a model in Hugging Face's format",
        )
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(storage, path, sizes):
        tensors |= _read_header(storage, file, sizes[file])
    return StoredModel(path, storage, _read_json(storage, CONFIG), tensors)


def read_text_file(storage: Storage, name: str) -> bytes:
    """Returns a text file without the byte order mark that an editor may have added.

    Other programs do not expect one in the files of a model. Raises StorageError.
    """
    return storage.read_bytes(name).removeprefix(codecs.BOM_UTF8)


def _weight_files(storage: Storage, path: str, sizes: Mapping[str, int]) -> list[str]:
    """Returns the safetensors files of a folder whose files have these sizes."""
    # A single file counts before an index, as in transformers.
    if SINGLE in sizes:
        return [SINGLE]
    if SHARDS not in sizes:
        reason = f"it holds neither {SINGLE} nor {SHARDS}"
        if any(name.endswith((".bin", ".pt", ".pth")) for name in sizes):
            reason += "; weights in torch's own format are not read, "
            reason += "save them with safetensors first"
        raise CheckpointError("read", path, reason)
    weight_map = _read_json(storage, SHARDS).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("read", storage.uri(SHARDS), "it has no weight_map")
    # Only the file names are needed: the headers contain the location of each tensor.
    files = sorted(set(map(str, weight_map.values())))
    missing = [file for file in files if file not in sizes]
    if missing:
        raise CheckpointError(
            "read",
            path,
            f"{len(missing)} of {len(files)} files that {SHARDS} names are missing: "
            f"{', '.join(missing[:3])}; download them again",
        )
    return files


def read_objects(storage: Storage, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the JSON objects in those of a folder's files that exist, by file name.

    Raises CheckpointError for a file that is no JSON object.
    """
    objects = {}
    for name in names:
        try:
            objects[name] = _read_json(storage, name)
        except MissingFileError:
            continue
    return objects


def _read_json(storage: Storage, name: str) -> dict[str, Any]:
    try:
        values = json.loads(storage.read_bytes(name))
    except MissingFileError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "read", storage.uri(name), f"it is not valid JSON: {error}"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError("read", storage.uri(name), "it does not hold a JSON object")
    return values


def _read_header(storage: Storage, file: str, size: int) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file of `size` bytes by name."""
    path = storage.uri(file)
    raw = _header_bytes(storage, file, size)
    first_byte = _LENGTH_BYTES + len(raw)
    tensors = dict[str, StoredTensor]()
    try:
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            tensor = StoredTensor(
                name, file, entry["dtype"], tuple(entry["shape"]), first_byte + start
            )
            _check_extent(path, tensor, end - start, size)
            tensors[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "read", path, f"its header is not readable: {error}"
        ) from error
    return tensors


def _header_bytes(storage: Storage, file: str, size: int) -> bytearray:
    path = storage.uri(file)
    if size < _LENGTH_BYTES:
        raise CheckpointError(
            "read",
            path,
            f"it has {size} bytes, which is no safetensors file; download it again",
        )
    length = bytearray(_LENGTH_BYTES)
    with storage.open_input(file) as source:
        source.read_into(0, memoryview(length))
        header_size = int.from_bytes(length, "little")
        # The number is read from the file, so it is checked before memory is allocated.
        if header_size > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise CheckpointError(
                "read",
                path,
                f"its header would be {header_size} bytes long and the file has {size}: it is "
                "cut short or no safetensors file",
            )
        raw = bytearray(header_size)
        source.read_into(_LENGTH_BYTES, memoryview(raw))
    return raw


def _check_extent(path: str, tensor: StoredTensor, num_bytes: int, size: int) -> None:
    element = (ELEMENT_BYTES | _OTHER_BYTES)[tensor.dtype]
    if prod(tensor.shape) * element != num_bytes or num_bytes < 0:
        raise ValueError(
            f"{tensor.name} has shape {tensor.shape} of {tensor.dtype}, but {num_bytes} bytes"
        )
    if tensor.start + num_bytes > size:
        raise CheckpointError(
            "read",
            path,
            f"it is cut short: tensor {tensor.name!r} ends at byte {tensor.start + num_bytes}, "
            f"the file at {size}; download it again",
        )

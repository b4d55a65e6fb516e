"""A folder of safetensors as Hugging Face publishes models.

Owns: its files, headers and what can be wrong with them.

The format (8 bytes of length, a JSON header, row-major tensors) is read here and not by
its library, which maps whole files into memory and knows local paths only. Torch-free.
Must not know: families, what tensors mean.
"""

import json
from collections.abc import Mapping
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
"""Of types that weights have."""
_OTHER_BYTES = {"F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Of types that only computed buffers have."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the library's own bound."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    file: str
    dtype: str
    """As the format spells it."""
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""


@dataclass(frozen=True)
class StoredModel:
    """What a folder holds."""

    path: str
    storage: Storage
    config: Mapping[str, Any]
    """config.json."""
    tensors: Mapping[str, StoredTensor]


def is_hf_folder(path: str) -> bool:
    """Whether there is a config.json, as in every published model.

    Raises StorageError.
    """
    return open_storage(path).exists(CONFIG)


def open_folder(path: str) -> StoredModel:
    """Reads config.json and all headers.

    Raises CheckpointError when the folder or a file in it is missing, torn or
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
    for file in _files(storage, path, sizes):
        tensors |= _header(storage, file, sizes[file])
    return StoredModel(path, storage, _json(storage, CONFIG), tensors)


def _files(storage: Storage, path: str, sizes: Mapping[str, int]) -> list[str]:
    if SHARDS not in sizes:
        if SINGLE in sizes:
            return [SINGLE]
        text = f"it holds neither {SINGLE} nor {SHARDS}"
        if any(name.endswith((".bin", ".pt", ".pth")) for name in sizes):
            text += "; weights in torch's own format are not read, save them with safetensors first"
        raise CheckpointError("read", path, text)
    listed = _json(storage, SHARDS).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError("read", storage.uri(SHARDS), "it has no weight_map")
    files = sorted(set(map(str, listed.values())))
    if missing := [file for file in files if file not in sizes]:
        text = (
            f"{len(missing)} of {len(files)} files that {SHARDS} names are missing: "
            f"{', '.join(missing[:3])}; download them again"
        )
        raise CheckpointError("read", path, text)
    return files


def _json(storage: Storage, name: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(name))
    except MissingFileError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "read", storage.uri(name), f"it is not valid JSON: {error}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError("read", storage.uri(name), "it does not hold a JSON object")
    return found


def _header(storage: Storage, file: str, size: int) -> dict[str, StoredTensor]:
    path = storage.uri(file)
    found = dict[str, StoredTensor]()
    if size < 8:
        raise CheckpointError(
            "read",
            path,
            f"it has {size} bytes, which is no safetensors file; download it again",
        )
    with storage.open_input(file) as source:
        source.read_into(0, memoryview(length := bytearray(8)))
        header_bytes = int.from_bytes(length, "little")
        if header_bytes > min(size - 8, _LONGEST_HEADER):
            text = (
                f"its header would be {header_bytes} bytes long and the file has {size}: it is "
                "cut short or no safetensors file"
            )
            raise CheckpointError("read", path, text)
        source.read_into(8, memoryview(raw := bytearray(header_bytes)))
    try:
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            tensor = StoredTensor(
                name, file, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + first
            )
            _check_extent(path, tensor, last - first, size)
            found[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "read", path, f"its header is not readable: {error}"
        ) from error
    return found


def _check_extent(path: str, tensor: StoredTensor, num_bytes: int, size: int) -> None:
    element = (ELEMENT_BYTES | _OTHER_BYTES)[tensor.dtype]
    if prod(tensor.shape) * element != num_bytes or num_bytes < 0:
        raise ValueError(
            f"{tensor.name} has shape {tensor.shape} of {tensor.dtype}, but {num_bytes} bytes"
        )
    if tensor.start + num_bytes > size:
        text = (
            f"it is cut short: tensor {tensor.name!r} ends at byte {tensor.start + num_bytes}, "
            f"the file at {size}; download it again"
        )
        raise CheckpointError("read", path, text)

"""Compares two stored tensors without torch.

Must not know: models, names.
"""

from math import prod

import numpy as np
import numpy.typing as npt

from megatron_ray.checkpoint.hf.files import ELEMENT_BYTES, FP8, StoredTensor
from megatron_ray.storage.storage import Storage

_CHUNK_ELEMENTS = 4 * 1024 * 1024
"""Elements that are read at once, which bounds memory."""
_NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def have_equal_values(storage: Storage, one: StoredTensor, other: StoredTensor) -> bool:
    """Returns whether two tensors of a folder are equal, up to their types.

    Stops reading at the first difference. Raises StorageError.
    """
    if one.shape != other.shape or not {one.dtype, other.dtype} <= ELEMENT_BYTES.keys():
        return False
    # Values of fp8 need factors, which only a reader with torch applies.
    if FP8 in (one.dtype, other.dtype) and one.dtype != other.dtype:
        return False
    num_elements = prod(one.shape)
    for start in range(0, num_elements, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, num_elements - start)
        left = _read(storage, one, start, count)
        right = _read(storage, other, start, count)
        if one.dtype == other.dtype:
            is_equal = bool(np.array_equal(left, right))
        else:
            is_equal = bool(np.array_equal(_values(one, left), _values(other, right)))
        if not is_equal:
            return False
    return True


def _read(
    storage: Storage, tensor: StoredTensor, start: int, count: int
) -> npt.NDArray[np.uint8]:
    """Returns the bytes of `count` elements."""
    width = ELEMENT_BYTES[tensor.dtype]
    raw = np.empty(count * width, np.uint8)
    with storage.open_input(tensor.file) as source:
        source.read_into(tensor.start + start * width, raw.data)
    return raw


def _values(tensor: StoredTensor, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    if tensor.dtype != "BF16":
        return raw.view(_NUMPY_TYPES[tensor.dtype]).astype(np.float64)
    # A bf16 number is the upper half of an fp32 number.
    wide = raw.view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).astype(np.float64)

"""Reads the weights of a Hugging Face folder by logical name.

Only the bytes of the requested boxes are read, row by row if necessary. Weights in fp8
are multiplied by the factors of their blocks.

Must not know: optimizers, layouts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.files import FP8, StoredTensor
from megatron_ray.checkpoint.hf.folder import SCALES, HfFolder
from megatron_ray.checkpoint.hf.tensor_locations import TensorLocation
from megatron_ray.checkpoint.index import Slot
from megatron_ray.checkpoint.load import Read, read_all
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor, whole_tensor

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    FP8: torch.float8_e4m3fn,
}
_CHUNK_ELEMENTS = 4 * 1024 * 1024
"""Elements that are dequantized or compared at once, which bounds memory."""


class HfWeights(HfFolder):
    """An opened folder with methods to read its tensors.

    Raises CheckpointError and ConfigError as HfFolder does.
    """

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type in which a logical tensor is loaded.

        It is the stored type, or bf16 for fp8 with factors (as DeepSeek converts them).
        """
        stored = DTYPES[self.tensors[self.locations[name].name].dtype]
        if stored.itemsize == 1:
            return torch.bfloat16
        return stored

    def load_into(self, state: ShardedState) -> None:
        """Fills every `model/...` box of `state`, converting types where they differ.

        Raises CheckpointError, ConfigError.
        """
        reads_by_file = defaultdict[str, list[Read]](list)
        fp8_reads = list[Read]()
        for fqn, tensor in state.items():
            name = fqn.removeprefix("model/")
            if self.shapes.get(name) != tensor.shape:
                raise CheckpointError(
                    "read",
                    self.path,
                    f"its tensor {name!r} has shape {self.shapes.get(name)}, the model needs "
                    f"{tensor.shape}",
                )
            location = self.locations[name]
            stored = self.tensors[location.name]
            reads = _reads(location, stored, tensor)
            if stored.dtype == FP8:
                fp8_reads += reads
            else:
                reads_by_file[stored.file] += reads
        read_all(self.storage.open_input, reads_by_file)
        for file_reads in reads_by_file.values():
            self._check_copies(file_reads)
        # fp8 boxes need several reads, of values and of factors.
        for read in fp8_reads:
            self._read_fp8(read)

    def _read_fp8(self, read: Read) -> None:
        """Reads an fp8 box as values x factor of their block, computed in fp32."""
        stored = self.tensors[read.slot.fqn]
        first_row, first_column = read.part.offset
        rows, columns = read.part.size
        # A few rows at once, because fp32 values need four times the memory.
        step = max(1, _CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            box = Box((first_row + start, first_column), (count, columns))
            values = torch.empty(count, columns)
            self._read_box(stored, box, values)
            values *= self._factors(stored, box)
            read.target.narrow(0, start, count).copy_(values)

    def _factors(self, stored: StoredTensor, box: Box) -> Tensor:
        """Returns the factor of every element of a box of an fp8 tensor."""
        # Blocks that the box touches, in rows and in columns.
        ranges = []
        for offset, size, block in zip(box.offset, box.size, self.block, strict=True):
            ranges.append((offset // block, -(-(offset + size) // block)))
        (top, bottom), (left, right) = ranges
        blocks = Box((top, left), (bottom - top, right - left))
        factors = torch.empty(blocks.size)
        self._read_box(self.tensors[stored.name + SCALES], blocks, factors)
        # Expand the factors to elements, one dimension after the other.
        row_blocks = _indices(box, 0) // self.block[0] - top
        column_blocks = _indices(box, 1) // self.block[1] - left
        return factors[row_blocks][:, column_blocks]

    def _read_box(self, stored: StoredTensor, box: Box, target: Tensor) -> None:
        read_all(self.storage.open_input, {stored.file: [Read(_slot(stored), box, target)]})

    def _check_copies(self, reads: Iterable[Read]) -> None:
        """Compares what was read with its copies in the files.

        Only these boxes are compared, so all ranks together read each copy once per
        reader of the original. Raises ConfigError where the two differ.
        """
        copies = defaultdict[str, list[StoredTensor]](list)
        for copy, original in self.copies.items():
            copies[original].append(self.tensors[copy])
        for read in reads:
            for stored in copies.get(read.slot.fqn, ()):
                if not self._is_equal(read, stored):
                    raise self.unequal(stored.name, read.slot.fqn)

    def _is_equal(self, read: Read, stored: StoredTensor) -> bool:
        """Returns whether a box that was read is the same in another stored tensor."""
        if self.tensors[read.slot.fqn].shape != stored.shape:
            return False
        first_row, *offsets = read.part.offset
        rows, *sizes = read.part.size
        # A few rows at once, which bounds memory.
        step = max(1, _CHUNK_ELEMENTS // prod(sizes))
        for start in range(0, rows, step):
            count = min(step, rows - start)
            own = read.target.narrow(0, start, count)
            other = torch.empty_like(own)
            box = Box((first_row + start, *offsets), (count, *sizes))
            self._read_box(stored, box, other)
            if not torch.equal(own, other):
                return False
        return True


def load_whole(weights: HfWeights, name: str) -> Tensor:
    """Returns one logical tensor, in its type from `HfWeights.dtype`."""
    tensor = torch.empty(weights.shapes[name], dtype=weights.dtype(name))
    weights.load_into({f"model/{name}": whole_tensor(tensor)})
    return tensor


def _reads(
    location: TensorLocation, stored: StoredTensor, tensor: ShardedTensor
) -> Iterator[Read]:
    """Yields the reads of a stored tensor that fill the boxes of a logical one."""
    for local in tensor.nonempty():
        for logical_box, stored_box in location.pieces(tensor.shape, local.box):
            # The view of the local tensor that this piece fills.
            target = local.tensor.detach()
            for dim, offset in enumerate(logical_box.offset):
                start = offset - local.box.offset[dim]
                target = target.narrow(dim, start, logical_box.size[dim])
            if location.transposed:
                target = target.t()
            yield Read(_slot(stored), stored_box, target)


def _slot(stored: StoredTensor) -> Slot:
    """Returns a stored tensor as a slot of a checkpoint's index."""
    shape = stored.shape
    # The matrices of several experts follow each other, as the rows of one matrix.
    if len(shape) > 2:
        shape = (prod(shape[:-1]), shape[-1])
    whole = Box((0,) * len(shape), shape)
    return Slot(stored.name, whole, DTYPES[stored.dtype], stored.start)


def _indices(box: Box, dim: int) -> Tensor:
    return torch.arange(box.offset[dim], box.offset[dim] + box.size[dim])

"""The weights of a Hugging Face folder by logical name.

Owns: reading boxes, undoing fp8 blocks.

A reader takes only the bytes of its boxes, row by row where it must. Must not know:
optimizers, layouts.
"""

from collections import defaultdict
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.hf.contents import SCALES, HfFolder
from megatron_ray.checkpoint.hf.files import FP8, StoredTensor
from megatron_ray.checkpoint.hf.places import Place
from megatron_ray.checkpoint.index import Slot
from megatron_ray.checkpoint.load import Read, read_all
from megatron_ray.config.problem import ConfigError
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


class HfWeights(HfFolder):
    """An opened folder whose tensors can be read.

    Raises CheckpointError and ConfigError as HfFolder does.
    """

    def dtype(self, name: str) -> torch.dtype:
        """In which a logical tensor is best kept: as stored, or bf16 where that was fp8
        with factors (DeepSeek's own conversion).
        """
        found = DTYPES[self.tensors[self.places[name].name].dtype]
        return torch.bfloat16 if found.itemsize == 1 else found

    def load_into(self, state: ShardedState) -> None:
        """Fills every `model/...` box of `state`, converting types where they differ.

        Raises CheckpointError, ConfigError.
        """
        work = defaultdict[str, list[Read]](list)
        scaled = list[Read]()
        for fqn, wanted in state.items():
            name = fqn.removeprefix("model/")
            if self.shapes.get(name) != wanted.shape:
                text = (
                    f"its tensor {name!r} has shape {self.shapes.get(name)}, the model needs "
                    f"{wanted.shape}"
                )
                raise CheckpointError("read", self.path, text)
            stored = self.tensors[self.places[name].name]
            reads = scaled if stored.dtype == FP8 else work[stored.file]
            reads += _reads(self.places[name], stored, wanted)
        read_all(self.storage, work)
        for read in scaled:
            self._read_scaled(read)

    def _read_scaled(self, read: Read) -> None:
        """Some rows at a time: values x the factor of their block, in fp32."""
        stored = self.tensors[read.slot.fqn]
        (first, left) = read.part.offset
        (rows, columns) = read.part.size
        tall, wide = self.block
        step = max(1, _CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            above = (first + start) // tall
            beside = left // wide
            factors = Box(
                (above, beside),
                (
                    -(-(first + start + count) // tall) - above,
                    -(-(left + columns) // wide) - beside,
                ),
            )
            values = torch.empty(count, columns)
            scales = torch.empty(factors.size)
            read_all(
                self.storage,
                {
                    stored.file: [
                        Read(
                            read.slot, Box((first + start, left), (count, columns)), values
                        )
                    ]
                },
            )
            source = self.tensors[stored.name + SCALES]
            read_all(self.storage, {source.file: [Read(_slot(source), factors, scales)]})
            by_row = scales[
                torch.arange(first + start, first + start + count) // tall - above
            ]
            values *= by_row[:, torch.arange(left, left + columns) // wide - beside]
            read.target.narrow(0, start, count).copy_(values)

    def check_copies(self) -> None:
        """Reads what the model has once and the files twice.

        Raises ConfigError where the two differ.
        """
        for name, original in self.copies.items():
            one = self.tensors[name]
            other = self.tensors[original]
            if one.shape != other.shape or not all(
                map(torch.equal, self._blocks(one), self._blocks(other))
            ):
                text = (
                    f"{self.path}: tensor {name!r} differs from {original!r}, but the model "
                    "has them once"
                )
                raise ConfigError(
                    f"{text} (config.json: tie_word_embeddings, num_nextn_predict_layers)"
                )

    def _blocks(self, stored: StoredTensor) -> Iterator[Tensor]:
        step = max(1, _CHUNK_ELEMENTS // prod(stored.shape[1:]))
        for start in range(0, stored.shape[0], step):
            size = (min(step, stored.shape[0] - start), *stored.shape[1:])
            block = torch.empty(size, dtype=DTYPES[stored.dtype])
            read_all(
                self.storage,
                {
                    stored.file: [
                        Read(
                            _slot(stored),
                            Box((start,) + (0,) * (len(size) - 1), size),
                            block,
                        )
                    ]
                },
            )
            yield block.float()


def load_whole(weights: HfWeights, name: str) -> Tensor:
    """One logical tensor in the type that it is best kept in."""
    tensor = torch.empty(weights.shapes[name], dtype=weights.dtype(name))
    weights.load_into({f"model/{name}": whole_tensor(tensor)})
    return tensor


def _reads(place: Place, stored: StoredTensor, wanted: ShardedTensor) -> Iterator[Read]:
    for held in wanted.nonempty():
        for here, there in place.pieces(wanted.shape, held.box):
            target = held.tensor.detach()
            for dim, (offset, length) in enumerate(
                zip(here.offset, here.size, strict=True)
            ):
                target = target.narrow(dim, offset - held.box.offset[dim], length)
            yield Read(_slot(stored), there, target.t() if place.transposed else target)


def _slot(stored: StoredTensor) -> Slot:
    """The whole tensor, as a reader of boxes wants it."""
    return Slot(
        stored.name,
        Box((0,) * len(stored.shape), stored.shape),
        DTYPES[stored.dtype],
        stored.start,
    )

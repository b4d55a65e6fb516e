"""Keeps the fp32 main parameters of a rank's shard, in one of four forms.

Owns: the forms, and how the model's weights are rounded from them. Must not know: the
optimizer's other state, other ranks, when weights are gathered.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.distributed.host_memory import allocate_lasting
from megatron_ray.optimizer.partition import Piece, Run, chunks

CHUNK = 1 << 24
"""Elements that are converted or brought to the device at once."""


class MainParameters(Protocol):
    """The fp32 values of this rank's runs. The model's weights are these, rounded.

    Between `begin_load` and `publish` they may be set through views.
    """

    @property
    def kept(self) -> Tensor | None:
        """The memory that they take beside the model's weights."""

    def load(self, flat: Run | Piece) -> Tensor:
        """Returns the values on the device: a view, or a copy for `store`."""

    def store(self, flat: Run | Piece, values: Tensor) -> None:
        """Sets the values; in forms whose `load` copies, this rank's weights too."""

    def view(self, flat: Run | Piece) -> Tensor:
        """Returns the values for a checkpoint.

        A live view, or a copy in host memory where they are not kept in fp32 and not being
        loaded.
        """

    def round_to(self, weights: Tensor, values: Tensor) -> None:
        """Sets weights of the model, as every replica does for these values."""

    def begin_load(self) -> None:
        """Makes all views live until the next `publish`."""

    def publish(self, runs: Sequence[Run]) -> None:
        """Sets this rank's weights, unless `store` has set them."""


class ModelWeights:
    """The weights of an fp32 model, which are the main parameters themselves."""

    kept: Tensor | None = None

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def load(self, flat: Run | Piece) -> Tensor:
        """Returns the weights."""
        return self._weights[flat.start : flat.end]

    def store(self, flat: Run | Piece, values: Tensor) -> None:
        """Sets the weights."""
        self.load(flat).copy_(values)

    def view(self, flat: Run | Piece) -> Tensor:
        """Returns the weights."""
        return self.load(flat)

    def round_to(self, weights: Tensor, values: Tensor) -> None:
        """Copies the values."""
        weights.copy_(values)

    def begin_load(self) -> None:
        """Does nothing."""

    def publish(self, runs: Sequence[Run]) -> None:
        """Does nothing."""


class MainShard:
    """Values in the memory of the device, next to a bf16 or fp16 model."""

    def __init__(self, weights: Tensor, num_elements: int) -> None:
        self._weights = weights
        self.kept = torch.zeros(num_elements, device=weights.device)

    def load(self, flat: Run | Piece) -> Tensor:
        """Returns a view."""
        return self.kept[flat.shard_range]

    def store(self, flat: Run | Piece, values: Tensor) -> None:
        """Sets the values; the weights follow when they are published."""
        self.load(flat).copy_(values)

    def view(self, flat: Run | Piece) -> Tensor:
        """Returns a view."""
        return self.load(flat)

    def round_to(self, weights: Tensor, values: Tensor) -> None:
        """Rounds to the nearest value, of two to the even one."""
        weights.copy_(values)

    def begin_load(self) -> None:
        """Does nothing."""

    def publish(self, runs: Sequence[Run]) -> None:
        """Rounds all values to the weights."""
        for run in runs:
            self.round_to(self._weights[run.start : run.end], self.load(run))


class OffloadedShard:
    """Values in host memory, next to a bf16 or fp16 model on the device."""

    def __init__(self, weights: Tensor, num_elements: int) -> None:
        self._weights = weights
        self.kept = allocate_lasting(num_elements, weights.device, torch.float32)
        self._is_loading = False

    def load(self, flat: Run | Piece) -> Tensor:
        """Returns a copy on the device."""
        return to_device(self.kept[flat.shard_range], self._weights.device)

    def store(self, flat: Run | Piece, values: Tensor) -> None:
        """Sets the values and rounds them to the weights."""
        self.kept[flat.shard_range].copy_(values, non_blocking=True)
        self.round_to(self._weights[flat.start : flat.end], values)

    def view(self, flat: Run | Piece) -> Tensor:
        """Returns a view in host memory, which copies of the device may still fill."""
        return self.kept[flat.shard_range]

    def round_to(self, weights: Tensor, values: Tensor) -> None:
        """Rounds to the nearest value, of two to the even one."""
        weights.copy_(values)

    def begin_load(self) -> None:
        """Has the next `publish` round all values."""
        self._is_loading = True

    def publish(self, runs: Sequence[Run]) -> None:
        """Rounds the values after a load."""
        if not self._is_loading:
            return
        self._is_loading = False
        for part in chunks(runs, CHUNK):
            self.store(part, self.load(part))


class Remainders:
    """16 bits per value, from which it is restored together with the bf16 weight.

    The weight is the upper half of the value's bits, rounded to the nearest, and of two to
    the larger in magnitude: with the lower half as a signed remainder, their sum is the
    value, bit for bit. Rounding to the even one, as torch does, would leave 2^16 + 1 values
    to some weights, one more than a remainder distinguishes.
    """

    def __init__(self, weights: Tensor, num_elements: int, *, offload: bool) -> None:
        self._weights = weights
        self.kept = zeros(num_elements, torch.int16, weights.device, offload=offload)
        self._loading: Tensor | None = None

    def load(self, flat: Run | Piece) -> Tensor:
        """Returns the values, restored."""
        return self._restored(flat, flat.start, flat.end)

    def store(self, flat: Run | Piece, values: Tensor) -> None:
        """Sets weights and remainders of some values."""
        if self._loading is not None:
            self._loading[flat.shard_range].copy_(values)
            return
        weights, remainders = split(values.to(self._weights.device))
        self._weights[flat.start : flat.end].copy_(weights)
        self.kept[flat.shard_range].copy_(remainders, non_blocking=True)

    def view(self, flat: Run | Piece) -> Tensor:
        """Returns a copy in host memory, live only while values are loaded."""
        if self._loading is not None:
            return self._loading[flat.shard_range]
        values = torch.empty(flat.end - flat.start)
        for start in range(flat.start, flat.end, CHUNK):
            end = min(flat.end, start + CHUNK)
            part = values[start - flat.start : end - flat.start]
            part.copy_(self._restored(flat, start, end))
        return values

    def _restored(self, flat: Run | Piece, start: int, end: int) -> Tensor:
        """Returns the values from `start` to `end` in the buffers."""
        shift = flat.shard_start - flat.start
        remainders = self.kept[start + shift : end + shift]
        remainders = remainders.to(self._weights.device, non_blocking=True)
        return joined(self._weights[start:end], remainders)

    def round_to(self, weights: Tensor, values: Tensor) -> None:
        """Rounds to the nearest value, of two to the larger in magnitude."""
        weights.copy_(split(values)[0])

    def begin_load(self) -> None:
        """Keeps the values in fp32 in host memory until they are published."""
        # Whatever a load leaves out is zero then: the gaps between parameters.
        self._loading = torch.zeros(self.kept.numel())

    def publish(self, runs: Sequence[Run]) -> None:
        """Sets weights and remainders after a load."""
        values = self._loading
        if values is None:
            return
        self._loading = None
        for part in chunks(runs, CHUNK):
            self.store(part, values[part.shard_range])


def main_parameters(
    config: OptimizerConfig, weights: Tensor, num_elements: int
) -> MainParameters:
    """Returns the form in which a shard of so many elements is kept."""
    if weights.dtype == torch.float32:
        return ModelWeights(weights)
    if config.store_param_remainders:
        return Remainders(weights, num_elements, offload=config.offload)
    if config.offload:
        return OffloadedShard(weights, num_elements)
    return MainShard(weights, num_elements)


def zeros(
    num_elements: int, dtype: torch.dtype, device: torch.device, *, offload: bool
) -> Tensor:
    """Returns zeros on the device, or with `offload` in host memory."""
    if offload:
        return allocate_lasting(num_elements, device, dtype)
    return torch.zeros(num_elements, dtype=dtype, device=device)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns fp32 values as bf16 weights and int16 remainders."""
    bits = values.view(torch.int32)
    # The lower half; as a signed number it is negative where the upper half is rounded up.
    remainders = bits.to(torch.int16)
    upper = ((bits - remainders) >> 16).to(torch.int16)
    return upper.view(torch.bfloat16), remainders


def joined(weights: Tensor, remainders: Tensor) -> Tensor:
    """Returns the fp32 values that `split` has made these of."""
    upper = weights.view(torch.int16).to(torch.int32) << 16
    return upper.add_(remainders).view(torch.float32)


def to_device(kept: Tensor, device: torch.device) -> Tensor:
    """Returns a copy on the device, also where that is the host's own memory."""
    return torch.empty_like(kept, device=device).copy_(kept, non_blocking=True)

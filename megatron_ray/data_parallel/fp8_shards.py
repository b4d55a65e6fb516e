"""Gathers the weights of ZeRO-3 as numbers of one byte.

A rank's rows are quantized before torch's fully_shard gathers them, with scales of whole
tensors: largest values are reduced over all ranks with other parts, once after each
update and for all weights together. Bytes are sent as uint8, because backends do not
send FP8. Must not know: products, which weights are multiplied in FP8.

Shapes: R rows of a weight on this rank, I inputs, E scales: one for a weight, or one for
each expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.fp8.quantize import E4M3, amax_of, quantize_tensor, scale_for
from megatron_ray.ops.fp8.weights import Fp8Weight


@dataclass(frozen=True)
class WeightRows:
    """This rank's rows of one weight."""

    rows_RI: Tensor
    """In fp32, live."""
    start: int
    """Number of the first one in the weight."""
    num_rows: int
    """Rows of the whole weight."""
    most_rows: int
    """Rows on the rank with most of them."""
    num_scales: int

    def parts(self) -> list[tuple[int, Tensor]]:
        """Returns the rows of each scale, by its index; scales without rows are left out."""
        each = self.num_rows // self.num_scales
        end = self.start + len(self.rows_RI)
        parts = []
        for index in range(self.num_scales):
            first = max(index * each, self.start)
            last = min((index + 1) * each, end)
            if first < last:
                parts.append((index, self.rows_RI[first - self.start : last - self.start]))
        return parts


@dataclass(frozen=True)
class ScaledRows:
    """This rank's rows of one weight, with the scales of the whole weight."""

    weight: WeightRows
    scale_E: Tensor
    inverse_E: Tensor

    def quantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the rows in FP8, filled up to the most rows of a rank: [R, I] of uint8.

        `dtype` is the type in which they would be gathered otherwise.
        """
        rows = self.weight.rows_RI
        shape = (self.weight.most_rows, rows.shape[1])
        values = torch.zeros(shape, dtype=torch.uint8, device=rows.device)
        first = 0
        for index, part in self.weight.parts():
            quantized = quantize_tensor(
                part.to(dtype), E4M3, self.scale_E[index], self.inverse_E[index]
            )
            last = first + len(part)
            values[first:last] = quantized.values.view(torch.uint8)
            first = last
        return values


class Fp8Shard(Tensor):
    """A shard of a weight, whose values torch's fully_shard gathers in FP8.

    torch calls its two hooks before and after a gather.
    """

    scaled: ScaledRows

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Hands the rows on: torch replaces shards that do not divide evenly by copies."""
        plain: Any = super().__torch_function__
        result = plain(func, types, args, kwargs or {})
        scaled = getattr(args[0], "scaled", None)
        if scaled is not None and isinstance(result, cls):
            result.scaled = scaled
        return result

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """Returns what this rank sends of the weight, and nothing else to remember."""
        return (self.scaled.quantize(policy.param_dtype),), None

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor],
        metadata: None,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Returns the weight in the memory of `outputs`, with the rows that fill it up.

        With `out`, the weight of an earlier gather, there is nothing to do: its memory is
        the same, and so is that of the scales.
        """
        if out is not None:
            return None
        (values,) = outputs
        return Fp8Weight(values.view(E4M3), self.scaled.inverse_E, dtype), ()


class Fp8Shards:
    """A rank's rows of the weights that are gathered in FP8, and all of their scales."""

    def __init__(
        self,
        weights: Mapping[str, WeightRows],
        groups: Sequence[Group],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Starts with scales of 1.

        Together the `groups` have all ranks with parts of the weights; `dtype` is the type
        in which weights would be gathered otherwise.
        """
        self._groups = groups
        self._dtype = dtype
        counts = [weight.num_scales for weight in weights.values()]
        self._scale = torch.ones(sum(counts), device=device)
        self._inverse = torch.ones(sum(counts), device=device)
        self._rows: dict[str, ScaledRows] = {}
        views = zip(self._scale.split(counts), self._inverse.split(counts), strict=True)
        for (name, weight), (scale, inverse) in zip(weights.items(), views, strict=True):
            self._rows[name] = ScaledRows(weight, scale, inverse)

    def shards(self) -> dict[str, Tensor]:
        """Returns what torch gathers of each weight, by name."""
        shards: dict[str, Tensor] = {}
        for name, scaled in self._rows.items():
            shard = scaled.weight.rows_RI.as_subclass(Fp8Shard)
            shard.scaled = scaled
            shards[name] = shard
        return shards

    @torch.no_grad()
    def update_scales(self) -> None:
        """Makes the scales of the current weights."""
        if not self._rows:
            return
        amax = torch.zeros_like(self._scale)
        start = 0
        for scaled in self._rows.values():
            for index, part in scaled.weight.parts():
                amax[start + index] = amax_of(part)
            start += scaled.weight.num_scales
        # Rounded as the weights are. A maximum over ranks can lose NaN, but not infinity.
        amax = amax.to(self._dtype).float()
        amax.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        for group in self._groups:
            collectives.all_reduce(amax, group, torch.distributed.ReduceOp.MAX)
        # In place, because gathered weights have views of them.
        self._scale.copy_(scale_for(amax, E4M3))
        torch.reciprocal(self._scale, out=self._inverse)

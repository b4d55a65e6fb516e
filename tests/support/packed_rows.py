"""Rows of documents as a loader packs them."""

from itertools import accumulate, chain

import torch

from megatron_ray.models.batch import Packed


def packed_rows(*lengths: tuple[int, ...], device: str = "cpu") -> Packed:
    """The documents of each row, by their lengths, which add up to the same."""
    rows = []
    for row in lengths:
        indices = torch.arange(len(row), dtype=torch.int32)
        rows.append(indices.repeat_interleave(torch.tensor(row)))
    ends = accumulate(chain.from_iterable(lengths), initial=0)
    cu_seqlens = torch.tensor(list(ends), dtype=torch.int32)
    return Packed(torch.stack(rows).to(device), lengths, cu_seqlens.to(device))

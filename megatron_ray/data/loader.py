"""Samples to tensors on the device. Owns: the batch type and which samples a rank turns into which microbatch.

The only file of this folder that sees torch. Must not know: the model, how corpora were made.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ray.data.blend import SampleDataset
from megatron_ray.data.sampler import sample_ids


@dataclass(frozen=True)
class Batch:
    """One microbatch. Shapes: B samples, S tokens."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    """fp32; 0 where a token does not count."""
    position_ids: Tensor
    """[B, S], or [1, S] for all rows alike."""
    num_tokens: int
    """Sum of the mask, known without asking the device."""
    expert_choices: Tensor | None = None
    """[B, S, layers, experts per token] int64: what routers are to take instead of choosing (replay)."""


def make_batch(samples: np.ndarray, device: torch.device, *, counted_rows: int | None = None) -> Batch:
    """[B, S + 1] token ids -> batch; only the first `counted_rows` samples count in the loss."""
    rows, length = samples.shape[0], samples.shape[1] - 1
    counted = rows if counted_rows is None else counted_rows
    tokens = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    mask = torch.ones(rows, length, device=device)
    if counted < rows:
        mask[counted:] = 0
    positions = torch.arange(length, device=device)[None]
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, positions, counted * length)


class StepLoader:
    """The microbatches of a step for one data-parallel rank; a pure function of the consumed samples."""

    def __init__(
        self, dataset: SampleDataset, micro_batch_size: int, global_batch_size: int, dp_rank: int, dp: int, device: torch.device
    ) -> None:
        self.dataset, self.micro_batch_size, self.device = dataset, micro_batch_size, device
        self.dp_rank, self.dp = dp_rank, dp
        self.num_microbatches = global_batch_size // (micro_batch_size * dp)

    def step(self, consumed_samples: int) -> list[Batch]:
        """Batches of the step that starts after `consumed_samples`."""
        ids = sample_ids(consumed_samples, self.micro_batch_size, self.dp_rank, self.dp, self.num_microbatches)
        return [make_batch(np.stack([self.dataset[int(index)] for index in row]), self.device) for row in ids]


def evaluation_batches(
    dataset: SampleDataset, num_samples: int, micro_batch_size: int, dp_rank: int, dp: int, device: torch.device
) -> Iterator[Batch]:
    """The first `num_samples` samples, dealt out over the replicas; every replica gets equally many batches, filled up with
    samples that do not count."""
    blocks = -(-num_samples // (micro_batch_size * dp))
    for block in range(blocks):
        start = (block * dp + dp_rank) * micro_batch_size
        ids = range(start, start + micro_batch_size)
        counted = max(0, min(micro_batch_size, num_samples - start))
        rows = np.stack([_sample_or_filler(dataset, index, num_samples) for index in ids])
        yield make_batch(rows, device, counted_rows=counted)


def _sample_or_filler(dataset: SampleDataset, index: int, num_samples: int) -> np.ndarray:
    """Sample `index`, or the first one as filler beyond the end."""
    return dataset[index if index < num_samples else 0]

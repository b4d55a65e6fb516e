"""Samples to tensors on the device.

Owns: the batch type and which samples a rank turns into which microbatch.

The only file of this folder that sees torch. Must not know: the model, how corpora were
made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ray.data.blend import SampleDataset
from megatron_ray.data.sampler import sample_ids
from megatron_ray.models.batch import Batch, MTPTargets, Packed
from megatron_ray.sharding.sequence_split import SequenceCut


@dataclass(frozen=True)
class BatchMaker:
    """Samples to batches: shifts labels, tells documents apart, and cuts sequences, in
    that order.
    """

    device: torch.device
    cut: SequenceCut = SequenceCut()
    """This rank's part of each sequence."""
    end_of_document: int | None = None
    """Given: documents are kept apart, positions count from 0 in each, and what follows
    its last token is no label."""
    num_mtp_layers: int = 0
    """Tokens beyond the next one that have labels too."""

    def __call__(self, samples: np.ndarray, counted_rows: int | None = None) -> Batch:
        """[B, S + 1] token ids -> batch; only the first `counted_rows` samples count in
        the loss.
        """
        rows = samples.shape[0]
        length = samples.shape[1] - 1
        mask = np.ones((rows, length), dtype=np.float32)
        mask[rows if counted_rows is None else counted_rows :] = 0
        positions = np.arange(length, dtype=np.int64)[None]
        packed = None
        if self.end_of_document is not None:
            ends = samples[:, :-1] == self.end_of_document
            mask[ends] = 0
            positions, packed = self._tell_apart(ends)
        tokens = np.asarray(samples, dtype=np.int64)
        mtp_targets = self._mtp_targets(tokens, mask) if self.num_mtp_layers else None
        if self.cut.cp == 1:
            whole = self._move(tokens)
            found = whole[:, :-1], whole[:, 1:]
        else:
            here = self.cut.positions(length)
            found = self._move(tokens[:, here]), self._move(tokens[:, here + 1])
            mask = mask[:, here]
            positions = positions[:, here]
        return Batch(
            *found,
            self._move(mask),
            self._move(positions),
            int(mask.sum()),
            packed,
            mtp_targets,
        )

    def _mtp_targets(self, tokens: np.ndarray, mask: np.ndarray) -> MTPTargets:
        """A label further on must lie in the sample and in the same document: no token
        up to it may be without a label of its own.
        """
        rows, length = mask.shape
        labels = np.empty((self.num_mtp_layers, rows, length), dtype=np.int64)
        masks = np.zeros((self.num_mtp_layers, rows, length), dtype=np.float32)
        before = mask
        here = self.cut.positions(length)
        for depth in range(self.num_mtp_layers):
            shift = depth + 1
            labels[depth] = tokens[:, np.minimum(np.arange(length) + shift + 1, length)]
            masks[depth, :, :-shift] = before[:, :-shift] * mask[:, shift:]
            before = masks[depth]
        return MTPTargets(self._move(labels[:, :, here]), self._move(masks[:, :, here]))

    def _tell_apart(self, ends: np.ndarray) -> tuple[np.ndarray, Packed]:
        """Positions [B, S] and documents, from where documents end [B, S]."""
        rows, length = ends.shape
        starts = np.zeros((rows, length), dtype=bool)
        starts[:, 0] = True
        starts[:, 1:] = ends[:, :-1]
        index = np.arange(length, dtype=np.int64)
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        lengths = tuple(
            tuple(np.diff(np.append(np.flatnonzero(row), length)).tolist())
            for row in starts
        )
        return positions, Packed(
            self._move(np.cumsum(starts, axis=1, dtype=np.int32)), lengths
        )

    def _move(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(
            self.device, non_blocking=True
        )


class StepLoader:
    """The microbatches of a step for one data-parallel rank; a pure function of the
    consumed samples.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp: int,
        make_batch: BatchMaker,
    ) -> None:
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.make_batch = make_batch
        self.dp_rank = dp_rank
        self.dp = dp
        self.num_microbatches = global_batch_size // (micro_batch_size * dp)

    def step(self, consumed_samples: int) -> list[Batch]:
        """Batches of the step that starts after `consumed_samples`."""
        ids = sample_ids(
            consumed_samples,
            self.micro_batch_size,
            self.dp_rank,
            self.dp,
            self.num_microbatches,
        )
        return [
            replace(
                self.make_batch(np.stack([self.dataset[int(index)] for index in row])),
                first_sample=int(row[0]),
            )
            for row in ids
        ]


def evaluation_batches(
    dataset: SampleDataset,
    num_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp: int,
    make_batch: BatchMaker,
) -> Iterator[Batch]:
    """The first `num_samples` samples, dealt out over the replicas; every replica gets
    equally many batches, filled up with samples that do not count.
    """
    blocks = -(-num_samples // (micro_batch_size * dp))
    for block in range(blocks):
        start = (block * dp + dp_rank) * micro_batch_size
        ids = range(start, start + micro_batch_size)
        counted = max(0, min(micro_batch_size, num_samples - start))
        rows = np.stack([_sample_or_filler(dataset, index, num_samples) for index in ids])
        yield make_batch(rows, counted)


def _sample_or_filler(dataset: SampleDataset, index: int, num_samples: int) -> np.ndarray:
    """Sample `index`, or the first one as filler beyond the end."""
    return dataset[index if index < num_samples else 0]

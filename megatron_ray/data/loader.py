"""Turns samples into tensors on the device.

Owns: the samples of each microbatch of a rank, and the tensors of a batch. The only
file of this folder that imports torch. Must not know: the model, how corpora were
prepared.

Shapes: B samples, S tokens of each (whole sequences, before context parallelism splits
them), D multi-token prediction layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ray.config.schedules.batch_sizes import BatchSizes, RampupConfig
from megatron_ray.data.ahead import Ahead
from megatron_ray.data.blend import SampleDataset
from megatron_ray.data.datasets import EvaluationSource
from megatron_ray.data.sampler import sample_ids
from megatron_ray.models.batch import Batch, MTPTargets, Packed
from megatron_ray.sharding.sequence_split import SequenceCut


@dataclass(frozen=True)
class HostBatch:
    """A batch on the host, in memory from which a GPU copies asynchronously."""

    tokens: tuple[Tensor, ...]
    """Tokens with the label of the last one, [B, S + 1]; under context parallelism this
    rank's tokens and, apart from them, their labels."""
    loss_mask_BS: Tensor
    position_ids: Tensor
    num_tokens: int
    packed: Packed | None
    mtp_targets: MTPTargets | None

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device, to which it is on its way."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        tokens, *labels = [moved(tensor) for tensor in self.tokens]
        if labels:
            tokens_BS = tokens
            labels_BS = labels[0]
        else:
            # One copy to the device; tokens and labels are views of it.
            tokens_BS = tokens[:, :-1]
            labels_BS = tokens[:, 1:]
        packed = self.packed
        if packed is not None:
            packed = replace(
                packed,
                documents_BS=moved(packed.documents_BS),
                cu_seqlens=moved(packed.cu_seqlens),
            )
        targets = self.mtp_targets
        if targets is not None:
            targets = MTPTargets(moved(targets.labels_DBS), moved(targets.loss_mask_DBS))
        return Batch(
            tokens_BS,
            labels_BS,
            moved(self.loss_mask_BS),
            moved(self.position_ids),
            self.num_tokens,
            packed,
            targets,
        )


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches of samples: shifts labels, separates documents, splits sequences.

    In that order, because the token after a rank's part may be on another
    context-parallel rank.
    """

    device: torch.device
    cut: SequenceCut = field(default_factory=SequenceCut)
    """This rank's part of each sequence."""
    end_of_document: int | None = None
    """The token that ends a document. When set, documents are separated, here and where
    the samples say that one begins: positions restart at 0 in each, and the first token
    of a document is not a label."""
    num_mtp_layers: int = 0
    """Number of tokens beyond the next one that are predicted."""

    def load(
        self,
        dataset: SampleDataset,
        indices: Sequence[int],
        counted_rows: int | None = None,
    ) -> Batch:
        """Returns the batch of samples of a dataset."""
        return self.read(dataset, indices, counted_rows).to(self.device)

    def read(
        self,
        dataset: SampleDataset,
        indices: Sequence[int],
        counted_rows: int | None = None,
    ) -> HostBatch:
        """Returns the batch of samples of a dataset on the host."""
        samples = np.stack([dataset[index] for index in indices])
        if self.end_of_document is None:
            return self._on_host(samples, counted_rows)
        starts = np.stack([dataset.document_starts(index) for index in indices])
        return self._on_host(samples, counted_rows, starts)

    def __call__(
        self,
        samples: np.ndarray,
        counted_rows: int | None = None,
        starts: np.ndarray | None = None,
    ) -> Batch:
        """Returns the batch of samples [B, S + 1].

        Only the first `counted_rows` samples (default: all) count in the loss. `starts`
        [B, S + 1] are first tokens of documents, beside those after an end token.
        """
        return self._on_host(samples, counted_rows, starts).to(self.device)

    def _on_host(
        self,
        samples: np.ndarray,
        counted_rows: int | None = None,
        starts: np.ndarray | None = None,
    ) -> HostBatch:
        rows = samples.shape[0]
        length = samples.shape[1] - 1
        mask_BS = np.ones((rows, length), dtype=np.float32)
        if counted_rows is not None:
            mask_BS[counted_rows:] = 0
        positions = np.arange(length, dtype=np.int64)[None]
        packed = None
        if self.end_of_document is not None:
            all_starts = _document_starts(samples, self.end_of_document, starts)
            # The first token of a document is not predicted from the one before.
            mask_BS[all_starts[:, 1:]] = 0
            starts_BS = all_starts[:, :-1]
            positions = _positions_in_documents(starts_BS)
            packed = self._packed(starts_BS)
        samples = np.asarray(samples, dtype=np.int64)
        mtp_targets = None
        if self.num_mtp_layers:
            mtp_targets = self._mtp_targets(samples, mask_BS)
        tokens = self._tokens_and_labels(samples)
        if self.cut.cp > 1:
            local = self.cut.positions(length)
            mask_BS = mask_BS[:, local]
            positions = positions[:, local]
        return HostBatch(
            tokens,
            self._in_memory(mask_BS),
            self._in_memory(positions),
            # Computed on the host: reading it from the device later would synchronize.
            int(mask_BS.sum()),
            packed,
            mtp_targets,
        )

    def _tokens_and_labels(self, samples: np.ndarray) -> tuple[Tensor, ...]:
        if self.cut.cp == 1:
            return (self._in_memory(samples),)
        local = self.cut.positions(samples.shape[1] - 1)
        return self._in_memory(samples[:, local]), self._in_memory(samples[:, local + 1])

    def _mtp_targets(self, samples: np.ndarray, mask_BS: np.ndarray) -> MTPTargets:
        """Returns the labels beyond the next token.

        Such a label must be in the same sample and document, so all tokens up to it
        must have labels themselves.
        """
        rows, length = mask_BS.shape
        labels_DBS = np.empty((self.num_mtp_layers, rows, length), dtype=np.int64)
        masks_DBS = np.zeros((self.num_mtp_layers, rows, length), dtype=np.float32)
        previous_mask_BS = mask_BS
        for depth in range(self.num_mtp_layers):
            shift = depth + 1
            # Past the end the token is arbitrary, since the mask is zero there.
            label_positions = np.minimum(np.arange(length) + shift + 1, length)
            labels_DBS[depth] = samples[:, label_positions]
            masks_DBS[depth, :, :-shift] = previous_mask_BS[:, :-shift] * mask_BS[:, shift:]
            previous_mask_BS = masks_DBS[depth]
        local = self.cut.positions(length)
        return MTPTargets(
            self._in_memory(labels_DBS[:, :, local]),
            self._in_memory(masks_DBS[:, :, local]),
        )

    def _packed(self, starts_BS: np.ndarray) -> Packed:
        rows, length = starts_BS.shape
        lengths = []
        for row in range(rows):
            boundaries = np.append(np.flatnonzero(starts_BS[row]), length)
            lengths.append(tuple(np.diff(boundaries).tolist()))
        # Of whole sequences, also if this rank has only a part, because keys come from
        # other ranks.
        documents_BS = np.cumsum(starts_BS, axis=1, dtype=np.int32)
        # A row's first token starts a document, so rows one after another need no more.
        cu_seqlens = np.append(np.flatnonzero(starts_BS), rows * length)
        return Packed(
            self._in_memory(documents_BS),
            tuple(lengths),
            self._in_memory(cu_seqlens.astype(np.int32)),
        )

    def _in_memory(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        # A copy to the device is asynchronous from pinned memory only.
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor


def _document_starts(
    samples: np.ndarray, end_of_document: int, starts: np.ndarray | None
) -> np.ndarray:
    """Returns [B, S + 1] whether a token is the first of its document in the sample."""
    all_starts = np.zeros(samples.shape, dtype=bool)
    ends = samples == end_of_document
    if starts is not None:
        all_starts |= starts
        # Some models begin documents with the token that ends them. Whether the first token
        # of a sample begins its document is not known.
        ends[:, 1:] &= ~starts[:, 1:]
    all_starts[:, 0] = True
    all_starts[:, 1:] |= ends[:, :-1]
    return all_starts


def _positions_in_documents(starts_BS: np.ndarray) -> np.ndarray:
    index = np.arange(starts_BS.shape[1], dtype=np.int64)
    # The running maximum of the starts is the start of each token's document.
    start_BS = np.maximum.accumulate(np.where(starts_BS, index, 0), axis=1)
    positions: np.ndarray = index - start_BS
    return positions


class StepLoader:
    """Loads the microbatches of one data-parallel rank.

    A pure function of the consumed samples, so a resumed run continues with the same
    data. Batches of the next step are read and put together on a thread, while the device
    computes. `job` is the index and the number of the jobs that train together: sizes and
    consumed samples are those of one of them, and each has the samples that its replicas
    would have in a single job.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp: int,
        make_batch: BatchMaker,
        rampup: RampupConfig | None = None,
        job: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.make_batch = make_batch
        self.dp_rank = dp_rank
        self.dp = dp
        self._job_index, self._num_jobs = job
        self._batch_sizes = BatchSizes(global_batch_size, rampup)
        self._ahead = Ahead(self._read)

    def num_microbatches(self, consumed_samples: int) -> int:
        """Returns the microbatches of the step that starts after `consumed_samples`."""
        batch_size = self._batch_sizes.at(consumed_samples)
        return batch_size // (self.micro_batch_size * self.dp)

    def step(self, consumed_samples: int) -> list[Batch]:
        """Returns the batches of the step that starts after `consumed_samples`."""
        following = consumed_samples + self._batch_sizes.at(consumed_samples)
        batches = []
        for first_sample, read in self._ahead.take(consumed_samples, following):
            batch = read.to(self.make_batch.device)
            # Dropout masks depend on the sample's number, and thus not on dp.
            batches.append(replace(batch, first_sample=first_sample))
        return batches

    def _read(self, consumed_samples: int) -> list[tuple[int, HostBatch]]:
        """Returns the microbatches of a step, each with the number of its first sample."""
        ids = sample_ids(
            consumed_samples * self._num_jobs,
            self.micro_batch_size,
            self._job_index * self.dp + self.dp_rank,
            self.dp * self._num_jobs,
            self.num_microbatches(consumed_samples),
        )
        batches = []
        for microbatch_ids in ids:
            batch = self.make_batch.read(self.dataset, microbatch_ids.tolist())
            batches.append((int(microbatch_ids[0]), batch))
        return batches


def evaluation_batches(
    sources: Sequence[EvaluationSource],
    micro_batch_size: int,
    dp_rank: int,
    dp: int,
    make_batch: BatchMaker,
) -> Iterator[tuple[int, Batch]]:
    """Yields this replica's part of the sources' samples, as (number of source, batch).

    A batch has samples of one source only. Every replica gets the same number of
    batches, because collectives would otherwise hang; batches are padded with samples
    that do not count.
    """
    blocks = []
    for number, source in enumerate(sources):
        for start in range(0, source.num_samples, micro_batch_size):
            blocks.append((number, start))
    while len(blocks) % dp:
        # Past the end of the source, so that none of its samples count.
        blocks.append((0, sources[0].num_samples))
    for number, start in blocks[dp_rank::dp]:
        source = sources[number]
        counted_rows = max(0, min(micro_batch_size, source.num_samples - start))
        # The first sample is used as padding.
        padding = [0] * (micro_batch_size - counted_rows)
        indices = [*range(start, start + counted_rows), *padding]
        yield number, make_batch.load(source.dataset, indices, counted_rows)

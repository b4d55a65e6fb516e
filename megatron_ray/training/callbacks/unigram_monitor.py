"""Compares the loss with that of a model that knows only how frequent each token is.

Owns: `callbacks.unigram`, and the counts of labels, which checkpoints have. Must not know:
how tokens come about.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.models.batch import Batch
from megatron_ray.optimizer.step_sums import StepSums
from megatron_ray.training.callbacks.protocol import Callback, CallbackContext, Partials


class UnigramMonitor(Callback):
    """Counts the labels of every step on this rank, and adds them up when due."""

    names = ("unigram_entropy", "unigram_normalized_loss", "unigram_tokens")

    def __init__(self, context: CallbackContext) -> None:
        mesh = context.mesh
        self._world_group = mesh.world_group
        # As for the tokens of the loss: all ranks of a tp group have the same labels, and
        # all stages of a pipeline.
        self._counts_here = mesh.tp_rank == 0 and context.model.has_loss
        vocabulary = context.config.model.vocabulary
        # fp64 has whole numbers up to 2**53.
        self._counts_V = torch.zeros(vocabulary, dtype=torch.float64, device=mesh.device)
        self._new_counts_V = torch.zeros_like(self._counts_V)
        self._loss = torch.zeros((), dtype=torch.float64, device=mesh.device)

    def observe(self, batches: Sequence[Batch]) -> None:
        """Counts the labels of this rank, by their weight in the loss."""
        if not self._counts_here:
            return
        for batch in batches:
            # Not bincount, for which the host waits.
            self._new_counts_V.index_add_(
                0, batch.labels_BS.reshape(-1), batch.loss_mask_BS.reshape(-1).double()
            )

    def after_backward(self, sums: StepSums) -> None:
        """Keeps the loss of the step."""
        self._loss = sums.values[0] / sums.num_tokens.clamp(min=1.0)

    def after_update(self) -> Partials:
        """Returns the labels counted here since they were last added up."""
        return Partials(self._new_counts_V.clone())

    def finish(self, reduced: Partials) -> Tensor:
        """Returns entropy, normalised loss and number of labels."""
        self._add_up(reduced.sums)
        num_tokens = self._counts_V.sum()
        divisor = num_tokens.clamp(min=1.0)
        # -sum p log p with p = count / number, which needs no quotient for each token.
        logs = torch.xlogy(self._counts_V, self._counts_V).sum() / divisor
        entropy = divisor.log() - logs
        return torch.stack([entropy, self._loss - entropy, num_tokens])

    def _add_up(self, new_counts_V: Tensor) -> None:
        # In place, because checkpoints have views of it.
        self._counts_V.add_(new_counts_V)
        self._new_counts_V.zero_()

    def before_save(self) -> None:
        """Adds up what all ranks have counted since the last due step."""
        self._add_up(collectives.all_reduce(self._new_counts_V.clone(), self._world_group))

    def state(self) -> Mapping[str, Tensor]:
        """Returns the counts of all ranks."""
        return {"counts": self._counts_V}

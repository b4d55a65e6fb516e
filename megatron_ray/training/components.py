"""Names what the training loop works with.

Owns: the set of components and the one interface that the loop defines itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.training.progress import Progress


class Saver(Protocol):
    """Writes checkpoints; see training.saving."""

    def save(self, progress: Progress) -> None:
        """Starts writing a checkpoint of the weights as they are."""

    def wait(self) -> None:
        """Blocks until this rank's part of the last checkpoint is durable."""


@dataclass(frozen=True)
class TrainingComponents:
    """Everything the loop works with, of one rank."""

    config: TrainConfig
    mesh: ParallelMesh
    model: ParallelModel
    optimizer: ShardedOptimizer
    loader: StepLoader
    evaluation_batches: Callable[[], Iterable[Batch]] | None
    """Returns the validation split's batches, anew for each evaluation; None without a
    validation split."""
    saver: Saver

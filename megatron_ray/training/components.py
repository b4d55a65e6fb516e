"""Defines the components of the training loop.

Owns: the set of components, and the interface of savers.
"""

from dataclasses import dataclass
from typing import Protocol

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.training.evaluate import Evaluation
from megatron_ray.training.progress import Progress


class Saver(Protocol):
    """Writes checkpoints; see training.saving."""

    def save(self, progress: Progress) -> None:
        """Starts writing a checkpoint of the current weights."""

    def wait(self) -> None:
        """Blocks until this rank's part of the last checkpoint is durable."""


@dataclass(frozen=True)
class TrainingComponents:
    """The components of the training loop on one rank."""

    config: TrainConfig
    mesh: ParallelMesh
    model: ParallelModel
    optimizer: ShardedOptimizer
    loader: StepLoader
    evaluation: Evaluation | None
    """The samples of the validation split; None without one."""
    saver: Saver

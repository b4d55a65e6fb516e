"""Defines the components of the training loop.

Owns: the set of components, and the interfaces of savers and copiers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from megatron_ray.config.schedules.batch_sizes import BatchSizes
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.optimizer.step_rates import RunRates
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.training.callbacks.runner import CallbackRunner
from megatron_ray.training.evaluate import Evaluation
from megatron_ray.training.graphs.passes import Passes, PlainPasses, RecordedPasses
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_numbers import StepNumbers
from megatron_ray.training.rules.injection import FaultInjector
from megatron_ray.training.rules.replicas import ReplicaCheck


class Saver(Protocol):
    """Writes checkpoints; see training.saving."""

    def save(self, progress: Progress) -> None:
        """Starts writing a checkpoint of the current weights."""

    def wait(self) -> None:
        """Blocks until this rank's part of the last checkpoint is durable."""


class Copier(Protocol):
    """Copies the state to host memory; see training.state_copy."""

    @property
    def is_sending(self) -> bool:
        """Whether this rank's last copy has not arrived yet."""

    def observe(self, steps: Sequence[StepNumbers]) -> None:
        """Takes the votes of steps."""

    def is_due(self, progress: Progress) -> bool:
        """Whether all ranks are to copy their state now."""

    def copy(self, progress: Progress) -> None:
        """Copies the state."""


class NoCopies:
    """Stands for the copier of a run that makes no copies."""

    is_sending = False

    def observe(self, steps: Sequence[StepNumbers]) -> None:
        """Does nothing."""

    def is_due(self, progress: Progress) -> bool:
        """Returns False."""
        return False

    def copy(self, progress: Progress) -> None:
        """Does nothing."""


class Exchange(Protocol):
    """Exchanges states with other jobs of a run; see training.replica_jobs."""

    @property
    def is_due(self) -> bool:
        """Whether this job has a state to give or to take, on all ranks."""

    def join(self, progress: Progress) -> Progress:
        """Waits for the other jobs before the first step; returns where to begin."""

    def exchange(self, progress: Progress) -> Progress:
        """Gives or takes the state after a step; returns where to go on."""


class NoExchange:
    """Stands for the exchange of a run that is a single job."""

    is_due = False

    def join(self, progress: Progress) -> Progress:
        """Returns the progress as it is."""
        return progress

    def exchange(self, progress: Progress) -> Progress:
        """Returns the progress as it is."""
        return progress


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
    copier: Copier = field(default_factory=NoCopies)
    callbacks: CallbackRunner = field(default_factory=CallbackRunner)
    exchange: Exchange = field(default_factory=NoExchange)

    @cached_property
    def passes(self) -> Passes:
        """The forward and backward passes of every step."""
        graph = self.config.training.cuda_graph
        if graph is None:
            return PlainPasses(self.model, self.mesh)
        return RecordedPasses(self.model, self.mesh, graph.warmup_steps)

    @cached_property
    def rates(self) -> RunRates:
        """The numbers of every step."""
        return RunRates(self.config)

    @cached_property
    def replicas(self) -> ReplicaCheck:
        """The comparison of this rank's weights with its replicas."""
        every_steps = self.config.training.check_replicas_every_steps
        return ReplicaCheck(every_steps, self.mesh, self.model.parameter_groups)

    @cached_property
    def faults(self) -> FaultInjector:
        """The faults that strike this rank's steps."""
        return FaultInjector(self.config.training, self.mesh.rank)

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        """The samples of every step."""
        return self.config.training.batch_sizes

    def finish(self) -> None:
        """Waits for the last checkpoint, and for weights that no forward pass will."""
        self.saver.wait()
        self.optimizer.wait_for_weights()

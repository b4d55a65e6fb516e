"""Updates this rank's part of all parameters, and keeps its state.

Owns: the order of update, synchronization of replica groups and publication. Must not
know: the model, microbatches, files, the arithmetic of the update.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.data_parallel.buffers import ParameterGroup
from megatron_ray.optimizer.loss_scale import LossScaler
from megatron_ray.optimizer.partition import Piece
from megatron_ray.optimizer.replica_groups.sync import GroupSync, SyncPlan
from megatron_ray.optimizer.shard import OptimizerShard
from megatron_ray.optimizer.step_rules import StepRules
from megatron_ray.sharding.sharded_state import ShardedState


class ShardedOptimizer:
    """The optimizer of this rank, with one shard per parameter group.

    Dense parameters and experts have replicas on different ranks, hence two groups.
    `loss_scaler` is None where the losses are not scaled, `rules` where a run has none,
    `sync` where there is a single replica group.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        groups: Sequence[ParameterGroup],
        *,
        sharded: bool,
        loss_scaler: LossScaler | None = None,
        rules: StepRules | None = None,
        sync: SyncPlan | None = None,
    ) -> None:
        self.loss_scaler = loss_scaler
        self.rules = rules
        self.shards = tuple(
            OptimizerShard(config, group, sharded=sharded) for group in groups
        )
        self.group_sync: GroupSync | None = None
        if sync is not None:
            parts = [shard.synced_pieces() for shard in self.shards]
            self.group_sync = GroupSync(sync, tuple(chain.from_iterable(parts)))

    def gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """Yields every piece that this rank updates and its flat main gradient.

        Pieces come in buffer order, gradients in the type in which they are reduced.
        """
        for shard in self.shards:
            for piece in shard.pieces:
                yield piece, shard.buffers.gradients[piece.start : piece.end]

    def copy_gradients(self) -> None:
        """Copies reduced gradients of a shorter type to fp32, for norm and update."""
        for shard in self.shards:
            shard.copy_gradients()

    @torch.no_grad()
    def step(
        self, lr: float, skip: Tensor | None = None, number: int | None = None
    ) -> None:
        """Updates with the current gradients, then publishes the new weights.

        Where the scalar `skip` is 1, weights and moments stay as they are. Replica groups
        synchronize what is due after the step with this `number`, from 1, if any.
        """
        for shard in self.shards:
            shard.step(lr, skip)
        if self.group_sync is not None and number is not None:
            self.group_sync.after_update(number)
        self.publish()

    def set_steps_taken(self, steps: int) -> None:
        """Sets the number of previous updates, for bias correction after a resume."""
        for shard in self.shards:
            shard.set_steps_taken(steps)

    def set_numbers(self, peak_lr: float, numbers: Mapping[str, float]) -> None:
        """Sets numbers of the optimizer that replace those of its config.

        They are as `StepRates.numbers`; `peak_lr` is the rate of which the schedule is a
        share.
        """
        for shard in self.shards:
            shard.set_numbers(peak_lr, numbers)

    def publish(self) -> None:
        """Copies main parameters into the model's weights on every rank.

        To be called after an update, a load, or initialisation of the shard.
        """
        for shard in self.shards:
            shard.publish()

    def begin_load(self) -> None:
        """Has main parameters set through `sharded_state`, until they are published."""
        for shard in self.shards:
            shard.main_parameters.begin_load()

    def wait_for_weights(self) -> None:
        """Waits until all published weights have arrived, for what is no forward pass."""
        for shard in self.shards:
            shard.wait_for_weights()

    def begin(self) -> None:
        """Begins a run with the current weights, which replica groups have in common."""
        if self.group_sync is not None:
            self.group_sync.begin()

    def initialise(self, name: str, value: Tensor) -> None:
        """Sets one parameter in the model and in this rank's main parameters.

        `value` is fp32, of the parameter's local shape.
        """
        for shard in self.shards:
            if shard.has_parameter(name):
                shard.initialise(name, value)

    def sharded_state(self) -> ShardedState:
        """Returns this rank's state as in OptimizerShard.sharded_state.

        A dynamic loss scale, the baselines of rules and the state of an outer optimizer are
        part of it.
        """
        state: ShardedState = {}
        if self.group_sync is not None:
            state |= self.group_sync.sharded_state()
        if self.rules is not None:
            state |= self.rules.sharded_state()
        if self.loss_scaler is not None:
            state |= self.loss_scaler.sharded_state()
        for shard in self.shards:
            state |= shard.sharded_state()
        return state

    def sharded_gradients(self) -> ShardedState:
        """Returns live views of the gradients this rank updates with, by logical name."""
        state: ShardedState = {}
        for shard in self.shards:
            state |= shard.sharded_gradients()
        return state

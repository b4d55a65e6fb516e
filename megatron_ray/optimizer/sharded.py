"""AdamW over this rank's shard of the flat buffers, with fp32 main parameters.

Owns: main parameters, moments, the update, the gather of updated weights. Must not
know: the model, microbatches, files.

ZeRO-1 (Rajbhandari et al. 2020): each data-parallel rank updates an equal part of every
bucket. In fp32 the main parameters are the model's own memory; in bf16 they are a
separate fp32 shard. The update is torch's functional AdamW: the class would import the
compiler, a second of every start.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.data_parallel.buffers import ParameterGroup
from megatron_ray.distributed import collectives
from megatron_ray.optimizer.partition import Piece, Run, flat_runs, owned_range, pieces
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.flat_boxes import flat_range_to_boxes
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor, TensorBox


@dataclass(frozen=True)
class Update:
    """What one fused call updates: runs with the same weight decay, as views of flat
    memory.
    """

    weight_decay: float
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    state_steps: list[Tensor]


class OptimizerShard:
    """What this rank updates of one family of parameters: runs of its flat buffers;
    `state` tensors are flat shards in run order.
    """

    def __init__(
        self, config: OptimizerConfig, family: ParameterGroup, *, sharded: bool
    ) -> None:
        """With `sharded` each of those that have the same buffers updates its own part."""
        self.buffers = family.buffers
        self.group = family.group
        self.sharded = sharded and self.group is not None
        self._adopt = family.sync_model
        buffers = self.buffers
        group = self.group
        dp_rank = collectives.rank(group)
        dp = collectives.size(group)
        self.runs = flat_runs(buffers.plan, dp_rank, dp, sharded=self.sharded)
        self._owned = [
            owned_range(bucket, dp_rank, dp, sharded=self.sharded)
            for bucket in buffers.plan.buckets
        ]
        length = sum(run.end - run.start for run in self.runs)
        device = buffers.parameters.device
        self.main_is_model = buffers.parameters.dtype == torch.float32
        self._main_shard = (
            None if self.main_is_model else torch.zeros(length, device=device)
        )
        self.state = {
            name: torch.zeros(length, device=device) for name in ("exp_avg", "exp_avg_sq")
        }
        self._placed = {placed.parameter.name: placed for placed in buffers.plan.placed}
        self.pieces = tuple(pieces(buffers.plan, self.runs))
        self._pieces_of: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            self._pieces_of.setdefault(piece.placed.parameter.name, []).append(piece)
        self._config = config
        self._updates = [self._update(decay) for decay in (True, False)]

    def _update(self, decay: bool) -> Update:
        runs = [run for run in self.runs if run.decay == decay]
        shards = [
            slice(run.shard_start, run.shard_start + run.end - run.start) for run in runs
        ]
        return Update(
            weight_decay=self._config.weight_decay if decay else 0.0,
            params=[self.main(run) for run in runs],
            grads=[self.gradient(run) for run in runs],
            exp_avgs=[self.state["exp_avg"][shard] for shard in shards],
            exp_avg_sqs=[self.state["exp_avg_sq"][shard] for shard in shards],
            state_steps=[
                torch.zeros((), device=self.buffers.parameters.device) for _ in runs
            ],
        )

    def main(self, run: Run) -> Tensor:
        """fp32 main parameters of a run."""
        if self._main_shard is None:
            return self.buffers.parameters[run.start : run.end]
        return self._main_shard[run.shard_start : run.shard_start + run.end - run.start]

    def gradient(self, run: Run) -> Tensor:
        """fp32 main gradients of a run."""
        return self.buffers.gradients[run.start : run.end]

    def step(self, lr: float) -> None:
        """One update with the gradients as they are; the new weights are not published
        yet.
        """
        config = self._config
        for update in self._updates:
            adamw(
                update.params,
                update.grads,
                update.exp_avgs,
                update.exp_avg_sqs,
                max_exp_avg_sqs=[],
                state_steps=update.state_steps,
                fused=True,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=lr,
                weight_decay=update.weight_decay,
                eps=config.eps,
                maximize=False,
            )

    def set_steps_taken(self, steps: int) -> None:
        """After loading a checkpoint: bias correction goes on from here."""
        for update in self._updates:
            for taken in update.state_steps:
                taken.fill_(float(steps))

    def publish(self) -> None:
        """Main parameters -> model weights of every rank (after an update, a load, or
        initialisation of the shard).
        """
        if self._main_shard is not None:
            for run in self.runs:
                self.buffers.parameters[run.start : run.end].copy_(self.main(run))
        self._gather()
        self._adopt()

    def _gather(self) -> None:
        if not self.sharded:
            return
        flat = self.buffers.parameters
        pending = [
            collectives.start_all_gather_into(
                flat[bucket.start : bucket.end], flat[low:high], self.group
            )
            for bucket, (low, high) in zip(
                self.buffers.plan.buckets, self._owned, strict=True
            )
        ]
        for gather in pending:
            gather.wait()

    def holds(self, name: str) -> bool:
        """Whether a parameter is of this family."""
        return name in self._placed

    def initialise(self, name: str, value: Tensor) -> None:
        """Sets one parameter, fp32 [local shape], in the model and in this rank's part
        of the main parameters.
        """
        flat = value.reshape(-1)
        self._model_range(name).copy_(flat)
        if self._main_shard is None:
            return
        for piece in self._pieces_of.get(name, ()):
            offset = piece.start - piece.placed.start
            length = piece.end - piece.start
            self._main_shard[piece.shard_start : piece.shard_start + length].copy_(
                flat[offset : offset + length]
            )

    def _model_range(self, name: str) -> Tensor:
        placed = self._placed[name]
        return self.buffers.parameters[placed.start : placed.end]

    def sharded_state(self) -> ShardedState:
        """Live views of what this rank holds: `model/...` are the fp32 main parameters,
        or the model's own where those are frozen; `optimizer/...` the moments.
        """
        state: ShardedState = {}
        for piece in self.pieces:
            shard = slice(piece.shard_start, piece.shard_start + piece.end - piece.start)
            main = (
                self.buffers.parameters[piece.start : piece.end]
                if self._main_shard is None
                else self._main_shard[shard]
            )
            _add_boxes(state, "model/", piece, main)
            for name, flat in self.state.items():
                _add_boxes(state, f"optimizer/{name}/", piece, flat[shard])
        for placed in self.buffers.plan.frozen:
            whole = Piece(placed, placed.start, placed.end, shard_start=0)
            _add_boxes(
                state, "model/", whole, self.buffers.parameters[placed.start : placed.end]
            )
        return state

    def sharded_gradients(self) -> ShardedState:
        """Live views of the gradients this rank updates with, by logical name: what
        layouts are compared by.
        """
        state: ShardedState = {}
        for piece in self.pieces:
            _add_boxes(state, "", piece, self.buffers.gradients[piece.start : piece.end])
        return state


class ShardedOptimizer:
    """All that this rank updates: one shard per family of parameters, since each family
    has replicas of its own.
    """

    def __init__(
        self, config: OptimizerConfig, families: Sequence[ParameterGroup], *, sharded: bool
    ) -> None:
        self.shards = tuple(
            OptimizerShard(config, family, sharded=sharded) for family in families
        )

    def gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """Every part of a parameter that this rank updates, in buffer order, and its
        flat main gradient.
        """
        return (
            (piece, shard.buffers.gradients[piece.start : piece.end])
            for shard in self.shards
            for piece in shard.pieces
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients as they are, then the new weights on every
        rank.
        """
        for shard in self.shards:
            shard.step(lr)
        self.publish()

    def set_steps_taken(self, steps: int) -> None:
        """After loading a checkpoint: bias correction goes on from here."""
        for shard in self.shards:
            shard.set_steps_taken(steps)

    def publish(self) -> None:
        """Main parameters -> model weights of every rank (after an update, a load, or
        initialisation of the shard).
        """
        for shard in self.shards:
            shard.publish()

    def initialise(self, name: str, value: Tensor) -> None:
        """Sets one parameter, fp32 [local shape], in the model and in this rank's part
        of the main parameters.
        """
        for shard in self.shards:
            if shard.holds(name):
                shard.initialise(name, value)

    def sharded_state(self) -> ShardedState:
        """Live views of what this rank holds: `model/...` are the fp32 main parameters,
        `optimizer/...` the moments.
        """
        return {
            name: held
            for shard in self.shards
            for name, held in shard.sharded_state().items()
        }

    def sharded_gradients(self) -> ShardedState:
        """Live views of the gradients this rank updates with, by logical name: what
        layouts are compared by.
        """
        return {
            name: held
            for shard in self.shards
            for name, held in shard.sharded_gradients().items()
        }


def _add_boxes(state: ShardedState, prefix: str, piece: Piece, flat: Tensor) -> None:
    """Cuts the flat range of a piece into boxes of the logical tensors fused in its
    parameter; padding rows fall out.
    """
    parameter = piece.placed.parameter
    for part in parameter.parts:
        part_start = piece.placed.part_start(part)
        start = max(piece.start, part_start)
        end = min(piece.end, part_start + part.box.num_elements)
        if start >= end:
            continue
        entry = state.setdefault(
            prefix + part.logical.name, ShardedTensor(part.logical.shape, [])
        )
        for box, low, high in flat_range_to_boxes(
            part.box.size, start - part_start, end - part_start
        ):
            offset = tuple(
                outer + inner
                for outer, inner in zip(part.box.offset, box.offset, strict=True)
            )
            view = flat[
                part_start + low - piece.start : part_start + high - piece.start
            ].view(box.size)
            entry.boxes.append(TensorBox(Box(offset, box.size), view))

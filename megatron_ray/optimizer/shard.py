"""Updates this rank's shard of the flat buffers, with fp32 main parameters.

Owns: optimizer state, the gather of updated weights. Must not know: the model,
microbatches, files, the arithmetic of the update, how main parameters are kept.

ZeRO-1 (Rajbhandari et al. 2020): each data-parallel rank updates an equal part of every
bucket. In fp32 the main parameters are the model's own memory; in bf16 and fp16 they are
a separate fp32 shard.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from megatron_ray.config.optimizer import MuonConfig, OptimizerConfig
from megatron_ray.config.optimizer_kinds import state_dtype, state_names
from megatron_ray.data_parallel.buffers import ParameterGroup
from megatron_ray.data_parallel.weight_gathers import WeightGathers
from megatron_ray.distributed import collectives
from megatron_ray.optimizer.matrices.update import LocalMatrix, MatrixUpdate, Segment
from megatron_ray.optimizer.partition import (
    Piece,
    Run,
    chunks,
    cut,
    flat_runs,
    owned_range,
    pieces,
)
from megatron_ray.optimizer.piece_boxes import add_boxes
from megatron_ray.optimizer.replica_groups.sync import SyncedPiece
from megatron_ray.optimizer.state_memory.main_parameters import (
    CHUNK,
    main_parameters,
    zeros,
)
from megatron_ray.optimizer.state_memory.streaming import StreamedRun
from megatron_ray.optimizer.update_calls import (
    RunTensors,
    RunUpdate,
    UpdateCall,
    UpdatedRun,
    update_call,
)
from megatron_ray.optimizer.update_rule import UpdateRule
from megatron_ray.sharding.matrices import (
    OwnedMatrix,
    rounds_of_buckets,
    rounds_of_rows,
)
from megatron_ray.sharding.row_shards import row_range
from megatron_ray.sharding.sharded_state import ShardedState

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OptimizerShard:
    """This rank's shard of a parameter group.

    `state` are flat tensors in the order of `runs`, by the optimizer's names for them.
    Where the optimizer updates matrices whole, `matrix_state` are those of their runs, and
    `state` those of the others.
    """

    def __init__(
        self, config: OptimizerConfig, group: ParameterGroup, *, sharded: bool
    ) -> None:
        """Makes the shard: this replica's part (`sharded`, ZeRO-1) or the whole group."""
        self.buffers = group.buffers
        self._device = self.buffers.parameters.device
        self.group = group.group
        # With a single rank nothing is sharded or gathered.
        self.sharded = sharded and self.group is not None
        self._sync_model = group.sync_model
        self._gathers = group.gathers
        self._rows = group.rows
        plan = self.buffers.plan
        dp_rank = collectives.rank(self.group)
        dp = collectives.size(self.group)
        self.runs = flat_runs(plan, config, dp_rank, dp, sharded=self.sharded)
        self._owned: list[tuple[int, int]] = []
        for bucket in plan.buckets:
            self._owned.append(owned_range(bucket, dp_rank, dp, sharded=self.sharded))
        # Updates work on runs; checkpoints and reductions of single parameters work on
        # pieces, which have names.
        self.pieces = tuple(pieces(plan, self.runs))
        self._placed = {placed.parameter.name: placed for placed in plan.placed}
        self._pieces_by_parameter: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            name = piece.placed.parameter.name
            self._pieces_by_parameter.setdefault(name, []).append(piece)
        self._allocate(config)
        self._updates = self._update_calls(config)
        if config.muon is not None:
            self._updates.append(self._matrix_update(config, config.muon, group))

    def _allocate(self, config: OptimizerConfig) -> None:
        """Allocates the state, main parameters and gradients of a shorter type in fp32."""
        num_elements = 0
        if self.runs:
            num_elements = self.runs[-1].shard_range.stop
        self._gradient_shard: Tensor | None = None
        if self.buffers.gradients.dtype != torch.float32:
            self._gradient_shard = torch.zeros(num_elements, device=self._device)
        self._offload = config.offload
        self._streams = config.offload or config.store_param_remainders
        weights = self.buffers.parameters
        self.main_parameters = main_parameters(config, weights, num_elements)
        self.state = self._zeros(config, of_matrix=False)
        self.matrix_state = self._zeros(config, of_matrix=True)

    def _zeros(self, config: OptimizerConfig, *, of_matrix: bool) -> dict[str, Tensor]:
        """Returns the state of one kind of runs."""
        num_elements = 0
        for run in self.runs:
            if run.rule.of_matrix == of_matrix:
                num_elements += run.end - run.start
        state = {}
        for name in state_names(config, of_matrix=of_matrix):
            dtype = _DTYPES[state_dtype(config, name)]
            state[name] = zeros(num_elements, dtype, self._device, offload=self._offload)
        return state

    def _update_calls(self, config: OptimizerConfig) -> list[UpdateCall]:
        """Returns one call per rule, since its numbers are arguments of the call.

        Of runs that are streamed, each part is a call, which opens only that.
        """
        runs = [run for run in self.runs if not run.rule.of_matrix]
        if self._streams:
            streamed = list[UpdateCall]()
            for part in chunks(runs, CHUNK):
                call = update_call(config, part.rule, self._device)
                call.add(self._updated(part))
                streamed.append(call)
            return streamed
        calls: dict[UpdateRule, RunUpdate] = {}
        for run in runs:
            if run.rule not in calls:
                calls[run.rule] = update_call(config, run.rule, self._device)
            calls[run.rule].add(self._updated(run))
        return list(calls.values())

    def _updated(self, run: Run) -> UpdatedRun:
        """Returns what an update gets of a run."""
        gradient = self.gradient(run)
        state = self.state_of(run)
        if self._streams:
            return StreamedRun(run, self.main_parameters, gradient, state, self._offload)
        return RunTensors(self.main(run), gradient, state)

    def state_of(self, run: Run | Piece) -> dict[str, Tensor]:
        """Returns the state of a run or a piece, as views where it is kept."""
        state = self.state
        if run.of_matrix:
            state = self.matrix_state
        return {name: flat[run.state_range] for name, flat in state.items()}

    def _matrix_update(
        self, config: OptimizerConfig, muon: MuonConfig, group: ParameterGroup
    ) -> MatrixUpdate:
        """Returns the update of all matrices, which are whole on one replica each."""
        replica_group = None
        if self._rows is not None:
            replica_group = self._rows.group
            replicas = collectives.size(replica_group)
            rounds = rounds_of_rows(self._rows.table, muon, replicas)
        else:
            if self.sharded:
                replica_group = group.group
            replicas = collectives.size(replica_group)
            rounds = rounds_of_buckets(self.buffers.plan, muon, replicas)
        replica = collectives.rank(replica_group)
        local_rounds = []
        for round_ in rounds:
            local_rounds.append([self._local(owned, replica) for owned in round_])
        return MatrixUpdate(
            muon,
            local_rounds,
            replica_group,
            group.tp_group,
            config.lr,
            self._device,
        )

    def _local(self, owned: OwnedMatrix, replica: int) -> LocalMatrix:
        """Returns a matrix with this replica's range of it."""
        share = owned.share_of(replica)
        if share is None:
            return LocalMatrix(owned, ())
        matrix = owned.matrix
        start = self._placed[matrix.tensor.name].start + matrix.start
        if self._rows is not None:
            # The buffer has the tensor from this replica's first row on.
            num_rows, *inner = matrix.tensor.shape
            replicas = collectives.size(self._rows.group)
            start -= row_range(num_rows, replica, replicas)[0] * prod(inner)
        return LocalMatrix(owned, self._segments(start + share.start, start + share.end))

    def _segments(self, start: int, end: int) -> tuple[Segment, ...]:
        """Returns a range of the buffers by the runs in it."""
        segments = []
        index = bisect_right(self.runs, start, key=lambda run: run.start) - 1
        while start < end:
            run = self.runs[index]
            part = cut(run, start, min(end, run.end))
            segments.append(Segment(run.rule, self._updated(part)))
            start = part.end
            index += 1
        return tuple(segments)

    def main(self, run: Run | Piece) -> Tensor:
        """Returns the fp32 main parameters of a run or a piece, on the device.

        A view, or a copy where they are kept in another form.
        """
        return self.main_parameters.load(run)

    def gradient(self, run: Run | Piece) -> Tensor:
        """Returns the fp32 gradients of a run or a piece, as a view."""
        if self._gradient_shard is None:
            return self.buffers.gradients[run.start : run.end]
        return self._gradient_shard[run.shard_range]

    def copy_gradients(self) -> None:
        """Copies reduced gradients of a shorter type to fp32."""
        if self._gradient_shard is None:
            return
        for run in self.runs:
            self.gradient(run).copy_(self.buffers.gradients[run.start : run.end])

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """Updates the main parameters with the current gradients, unless `skip` is 1.

        The new weights are not published yet.
        """
        # Those of the update before may still be on their way to other ranks.
        self.wait_for_weights()
        for update in self._updates:
            update.step(lr, skip)

    def set_steps_taken(self, steps: int) -> None:
        """Sets the number of previous updates, for bias correction after a resume."""
        for update in self._updates:
            update.set_steps_taken(steps)

    def set_numbers(self, peak_lr: float, numbers: Mapping[str, float]) -> None:
        """Sets numbers that replace those of the config from the next update on."""
        for update in self._updates:
            update.set_numbers(peak_lr, numbers)

    def publish(self) -> None:
        """Copies main parameters into the model's weights on every rank.

        To be called after an update, a load, or initialisation of the shard.
        """
        self.wait_for_weights()
        # Rounded before the gather, since short weights have half the bytes.
        self.main_parameters.publish(self.runs)
        self._gather()
        self._sync_model()

    def _gather(self) -> None:
        """Gathers the parts of all buckets that other ranks have updated."""
        if not self.sharded:
            return
        flat = self.buffers.parameters
        buckets = self.buffers.plan.buckets
        gathers = self._gathers or WeightGathers()
        # Starts all buckets, in the order in which a forward pass reads them, before
        # anything waits for the first.
        for bucket in reversed(buckets):
            start, end = self._owned[bucket.index]
            gather = collectives.start_all_gather_into(
                flat[bucket.start : bucket.end], flat[start:end], self.group
            )
            gathers.start(bucket, gather)
        if gathers is not self._gathers:
            gathers.wait_for_all()

    def wait_for_weights(self) -> None:
        """Waits until all published weights have arrived."""
        if self._gathers is not None:
            self._gathers.wait_for_all()

    def has_parameter(self, name: str) -> bool:
        """Returns whether a parameter is in this group."""
        return name in self._placed

    def initialise(self, name: str, value: Tensor) -> None:
        """Sets one parameter in the model and in this rank's main parameters.

        `value` is fp32, of the parameter's local shape.
        """
        flat = value.reshape(-1)
        placed = self._placed[name]
        # All replicas set the same value, so no gather is needed.
        weights = self.buffers.parameters[placed.start : placed.end]
        self.main_parameters.round_to(weights, flat)
        # Main parameters keep fp32 precision.
        for piece in self._pieces_by_parameter.get(name, ()):
            start = piece.start - placed.start
            end = piece.end - placed.start
            self.main_parameters.store(piece, flat[start:end])

    def synced_pieces(self) -> Iterator[SyncedPiece]:
        """Yields what replica groups average: views of main parameters and state."""
        for piece in self.pieces:
            yield SyncedPiece(piece, self.main(piece), self.state_of(piece))

    def sharded_state(self) -> ShardedState:
        """Returns live views of the optimizer state that this rank owns.

        `model/...` are the fp32 main parameters, or the model's parameters if frozen;
        `optimizer/...` is its state. Main parameters are copies where they are kept in
        another form, unless `begin_load` was called.
        """
        if self._offload and self._device.type == "cuda":
            # The last update may still be on its way to host memory.
            torch.cuda.current_stream(self._device).synchronize()
        state: ShardedState = {}
        for piece in self.pieces:
            add_boxes(state, "model/", piece, self.main_parameters.view(piece))
            for name, flat in self.state_of(piece).items():
                add_boxes(state, f"optimizer/{name}/", piece, flat)
        # Frozen parameters belong to no run, but a checkpoint contains the whole model.
        for placed in self.buffers.plan.frozen:
            whole = Piece(placed, placed.start, placed.end, shard_start=0)
            values = self.buffers.parameters[placed.start : placed.end]
            add_boxes(state, "model/", whole, values)
        return state

    def sharded_gradients(self) -> ShardedState:
        """Returns live views of the gradients this rank updates with, by logical name.

        Used to compare layouts.
        """
        state: ShardedState = {}
        for piece in self.pieces:
            add_boxes(state, "", piece, self.gradient(piece))
        return state

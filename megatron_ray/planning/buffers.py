"""Flat buffers of one rank, as they will be allocated. Owns: which parameters go into which buffer and who has the same one.

The same table, buckets and row shards as the model on a rank is built from, without a process group. Pure. Must not know: torch, nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ray.bucket_plan import BucketPlan, plan_buckets
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.parameters import LocalParameter, freeze, local_parameters
from megatron_ray.row_shards import shard_rows
from megatron_ray.schedules.plan import PipelinePlan

WIDTHS = {"fp32": 4, "bf16": 2}
"""Bytes of an activation, by precision."""


@dataclass(frozen=True)
class PlannedBuffer:
    """The dense parameters of a rank, or its experts, one after another."""

    plan: BucketPlan
    of_expert: bool
    width: int
    """Bytes of a weight."""
    replicas: int
    """Ranks that reduce its gradients together."""
    replica_rank: int
    """This rank's index among them."""
    sharded: bool
    """Whether each of them updates a part only (ZeRO-1)."""

    @property
    def num_updated(self) -> int:
        """Elements that this rank updates, padding included."""
        return self.plan.num_trainable // self.replicas if self.sharded else self.plan.num_trainable

    def owned(self, start: int, end: int) -> int:
        """How many of the elements [start, end) of one bucket this rank updates."""
        for bucket in self.plan.buckets:
            if bucket.start <= start < bucket.end:
                low, high = bucket.shard(self.replica_rank, self.replicas) if self.sharded else (bucket.start, bucket.end)
                return max(0, min(end, high) - max(start, low))
        return 0


def is_fully_sharded(config: TrainConfig, dims: ParallelDims) -> bool:
    """Whether parameters themselves are cut over the replicas: ZeRO-3, where there is anybody to share with."""
    return config.parallel.zero == 3 and dims.size("dp", "cp") > dims.zero_replicas


def local_table(config: TrainConfig, model: ModelConfig, dims: ParallelDims, pipeline: PipelinePlan, rank: int) -> list[LocalParameter]:
    """Every tensor that a rank works with, whole; `model` knows its vocabulary."""
    held = pipeline.held(dims.coordinates(rank)["pp"])
    table = local_parameters(model, dims, rank, sequence_parallel=config.parallel.sequence_parallel, held=held)
    return list(freeze(table, config.optimizer.freeze))


def planned_buffers(config: TrainConfig, dims: ParallelDims, table: Sequence[LocalParameter], rank: int) -> list[PlannedBuffer]:
    """The buffers that a rank allocates for these tensors: dense ones first, then the experts where it has any."""
    fully, found = is_fully_sharded(config, dims), []
    dense, experts = dims.group_of(rank, ("dp", "cp")), dims.experts.group_of(rank, ("edp",))
    for of_expert, group in ((False, dense), (True, experts)):
        parameters = [parameter for parameter in table if parameter.of_expert == of_expert]
        if of_expert and not parameters:
            continue
        if fully:
            shard = experts if of_expert else dims.shard_levels_of(rank)[0]
            rows = shard_rows(parameters, shard.index(rank), len(shard))
            plan = plan_buckets(rows, 1, config.parallel.bucket_elements)
            found.append(PlannedBuffer(plan, of_expert, 4, len(group), group.index(rank), sharded=False))
            continue
        plan = plan_buckets(parameters, len(group), config.parallel.bucket_elements)
        width, sharded = WIDTHS[config.training.precision], config.parallel.zero == 1
        found.append(PlannedBuffer(plan, of_expert, width, len(group), group.index(rank), sharded))
    return found

"""How a job would run, before anything is started. Owns: rank map, bytes per rank. Pure. Must not know: HTTP, the database."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.parameters import LocalParameter, freeze, local_parameters
from megatron_ray.planning.activations import kept_activations, recomputed_activations
from megatron_ray.schedules.orders import most_activations
from megatron_ray.schedules.plan import PipelinePlan, plan_pipeline

BYTE_VOCABULARY = 257


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. Weights, gradients and optimizer state are counted; activations are estimated."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Moments, and fp32 main parameters under bf16; a rank's share where they are sharded over dp."""
    activations_bytes_estimate: int
    """Peak of the microbatches under way, from tensor shapes and what is recomputed; kernels and allocator may need more or less."""
    total_bytes_estimate: int
    vocab_size: int
    """Vocabulary the numbers are for."""


def rank_map(config: TrainConfig) -> list[dict[str, Any]]:
    """Every rank with its coordinates and its island: ranks of one island share a node."""
    dims = ParallelDims.of(config.parallel)
    island = {rank: index for index, group in enumerate(dims.groups(("tp",))) for rank in group}
    return [{"rank": rank, "coordinates": dims.coordinates(rank), "island": island[rank]} for rank in range(dims.world_size)]


def vocabulary(config: TrainConfig) -> int | None:
    """Tokens the model will know; None when only the tokenizer's file can tell."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    return {"bpe": config.data.tokenizer.vocab_size, "bytes": BYTE_VOCABULARY}.get(config.data.tokenizer.kind)


def memory(config: TrainConfig) -> Memory | None:
    """Bytes per rank of a resolved config; None while the vocabulary is not known."""
    vocab_size = vocabulary(config)
    if vocab_size is None:
        return None
    model, dims = config.model.model_copy(update={"vocab_size": vocab_size}), ParallelDims.of(config.parallel)
    pipeline = plan_pipeline(config)
    parameters, gradients, optimizer = max((_state(config, model, dims, pipeline, pp_rank) for pp_rank in range(dims.pp)), key=sum)
    activations = _activations(config, model, pipeline)
    return Memory(parameters, gradients, optimizer, activations, parameters + gradients + optimizer + activations, vocab_size)


def _state(config: TrainConfig, model: ModelConfig, dims: ParallelDims, pipeline: PipelinePlan, pp_rank: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state on a rank of a pipeline stage; only what is trained has the last two."""
    held, bf16, zero = pipeline.held(pp_rank), config.training.precision == "bf16", config.parallel.zero
    local = local_parameters(model, dims, dims.rank_at(pp=pp_rank), sequence_parallel=config.parallel.sequence_parallel, held=held)
    trained = [parameter for parameter in freeze(local, config.optimizer.freeze) if parameter.trainable]
    replicas = dims.size("dp", "cp") // dims.zero_replicas
    if zero == 3:  # main parameters are the model's own shard, from which it is gathered
        whole, shard = (_elements(parameters, replicas, dims.expert_dp) for parameters in (local, trained))
        return whole * 4, shard * 4, shard * 8
    shard = _elements(trained, 1, 1) if zero == 0 else _elements(trained, replicas, dims.expert_dp)
    return _elements(local, 1, 1) * (2 if bf16 else 4), _elements(trained, 1, 1) * 4, shard * (12 if bf16 else 8)


def _elements(parameters: Sequence[LocalParameter], shards: int, expert_shards: int) -> int:
    """Of one shard of the dense parameters and one of the experts."""
    experts = sum(parameter.num_elements for parameter in parameters if parameter.of_expert)
    dense = sum(parameter.num_elements for parameter in parameters) - experts
    return -(-dense // shards) + -(-experts // expert_shards)


def _activations(config: TrainConfig, model: ModelConfig, pipeline: PipelinePlan) -> int:
    """What autograd keeps of the microbatches under way, and what comes back when a part of one is recomputed."""
    fullest = max((stage.layers for stage in pipeline.contents), key=lambda layers: kept_activations(config, layers))
    tokens = config.training.seq_length * config.training.micro_batch_size // config.parallel.cp
    width = 2 if config.training.precision == "bf16" else 4
    logits = tokens * (model.vocabulary // config.parallel.tp) * (width + 4)  # as computed, and their fp32 softmax
    kept = _microbatches_at_once(config, pipeline) * kept_activations(config, fullest)
    return kept + recomputed_activations(config, fullest) + logits


def _microbatches_at_once(config: TrainConfig, pipeline: PipelinePlan) -> int:
    """Microbatches of a stage whose activations the first pipeline rank, which holds most, keeps at once."""
    dp = config.parallel.dp
    assert dp != "auto"
    if pipeline.stages.num_stages == 1:
        return 1
    num_microbatches = config.training.global_batch_size // (config.training.micro_batch_size * dp)
    return most_activations(pipeline.schedule, pipeline.stages.pp, max(1, num_microbatches), pipeline.stages.vpp)

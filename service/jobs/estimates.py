"""How a job would run, before anything is started.

Owns: what of the library's planning a plan shows, and whether a job fits into a device.

Pure. Must not know: HTTP, the database.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline
from megatron_ray.planning.communication import step_communication
from megatron_ray.planning.hardware import GPU, Hardware
from megatron_ray.planning.memory import RankMemory, fullest_rank
from megatron_ray.planning.microbatch import num_microbatches
from megatron_ray.planning.pipeline import bubble_share
from megatron_ray.planning.step_time import StepTime, step_time
from megatron_ray.planning.suggest import degrees, nearest
from megatron_ray.planning.tally import Tally
from megatron_ray.validation import resolution

BYTE_VOCABULARY = 257
_GIB = 2**30


@dataclass(frozen=True)
class Estimates:
    """What is known of a resolved config whose vocabulary is known."""

    vocab_size: int
    memory: RankMemory
    """Of the fullest rank, on the kind of device that is named, or on a GPU where none
    is."""
    communication: Tally | None
    """Of that rank; None where the library does not send everything by itself."""
    bubble_share: float
    time: StepTime | None
    """None where no device is named, or it is not known to compute in the precision."""


def rank_map(config: TrainConfig) -> list[dict[str, Any]]:
    """Every rank with its coordinates and its island: ranks of one island share a node."""
    dims = ParallelDims.of(config.parallel)
    island = {
        rank: index for index, group in enumerate(dims.groups(("tp",))) for rank in group
    }
    return [
        {"rank": rank, "coordinates": dims.coordinates(rank), "island": island[rank]}
        for rank in range(dims.world_size)
    ]


def vocabulary(config: TrainConfig) -> int | None:
    """Tokens the model will know; None when only the tokenizer's file can tell."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    return {"bpe": config.data.tokenizer.vocab_size, "bytes": BYTE_VOCABULARY}.get(
        config.data.tokenizer.kind
    )


def with_vocabulary(config: TrainConfig) -> TrainConfig | None:
    """The config with that many tokens; None while they are not known."""
    vocab_size = vocabulary(config)
    return None if vocab_size is None else resolution.with_vocabulary(config, vocab_size)


def estimates(config: TrainConfig, hardware: Hardware | None) -> Estimates | None:
    """Of a resolved config; None while the vocabulary is not known."""
    known = with_vocabulary(config)
    if known is None:
        return None
    device = hardware.device if hardware is not None else GPU
    memory = fullest_rank(known, device)
    return Estimates(
        vocab_size=known.model.vocabulary,
        memory=memory,
        communication=step_communication(known, memory.rank),
        bubble_share=bubble_share(plan_pipeline(known), num_microbatches(known)),
        time=step_time(known, hardware) if hardware is not None else None,
    )


def check_memory(config: TrainConfig, hardware: Hardware) -> list[Problem]:
    """Whether a resolved config fits into the device; nothing while its vocabulary or
    the device's memory are not known.
    """
    known = with_vocabulary(config)
    room = hardware.memory_bytes
    if known is None or room is None:
        return []
    memory = fullest_rank(known, hardware.device)
    if memory.total_bytes <= room:
        return []
    largest = ", ".join(
        f"{name} {size / _GIB:.1f}" for name, size in list(memory.terms.items())[:3] if size
    )
    text = (
        f"rank {memory.rank} needs {memory.total_bytes / _GIB:.1f} GiB ({largest}), and "
        f"{hardware.name} has {room / _GIB:.0f}"
    )
    return [Problem("/parallel", "memory_fits", f"{text}; {_remedy(known, hardware)}")]


def _remedy(config: TrainConfig, hardware: Hardware) -> str:
    world = resolution.world_size(config)
    precision = config.training.precision
    if precision not in hardware.efficiencies:
        return (
            f"no layouts are compared for {precision} on {hardware.name}; raise tp or pp, add "
            "nodes, or use zero=3 or another precision"
        )
    found = nearest(config, world, hardware)
    if found is None:
        return (
            f"no layout that is tried fits on {world} ranks; add nodes, or use zero=3 or a "
            "smaller model"
        )
    training = found.config.training
    recompute = (
        "nothing recomputed"
        if training.recompute.granularity == "none"
        else f"recompute {training.recompute.granularity}"
    )
    sizes = (
        f"{degrees(found.config.parallel)}, micro_batch_size={training.micro_batch_size}, "
        f"{recompute}"
    )
    return f"the nearest layout that fits is {sizes} ({found.memory.total_bytes / _GIB:.1f} GiB)"

"""Estimates memory, communication and time of a job before anything is started.

Owns: which of the library's estimates a plan shows, and whether a job fits into a device.
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
from megatron_ray.planning.memory import RankMemory, fullest_rank, peer_copies_bytes
from megatron_ray.planning.microbatch import num_microbatches
from megatron_ray.planning.pipeline import bubble_share
from megatron_ray.planning.step_time.estimate import StepTime, step_time
from megatron_ray.planning.suggest import Suggestion, degrees, nearest
from megatron_ray.planning.tally import Tally
from megatron_ray.validation import resolution
from megatron_ray.validation.storage.disk_space import checkpoint_bytes

BYTE_VOCABULARY = 257
"""Bytes and the end of a document."""
MAX_RANKS = 65536
"""Most ranks that a plan lists."""
NUM_LARGEST_TERMS = 3
"""Number of terms of a rank's memory that a message names."""
_GIB = 2**30


@dataclass(frozen=True)
class Estimates:
    """The estimates for a resolved config whose vocabulary is known."""

    vocab_size: int
    memory: RankMemory
    """Memory of the most loaded rank, on the named device, or on a GPU by default."""
    communication: Tally | None
    """Communication of that rank; None where torch sends a part of it (zero=3)."""
    checkpoint_bytes: int
    bubble_share: float
    time: StepTime | None
    """None without a device, or without figures for the device in this precision."""


def rank_map(config: TrainConfig) -> list[dict[str, Any]]:
    """Returns each rank with its coordinates and its island.

    The ranks of one island share a node.
    """
    dims = ParallelDims.of(config.parallel)
    # An island is a tensor-parallel group.
    island_of: dict[int, int] = {}
    for island, group in enumerate(dims.groups(("tp",))):
        for rank in group:
            island_of[rank] = island
    entries = []
    for rank in range(dims.world_size):
        coordinates = dims.coordinates(rank)
        entries.append(
            {"rank": rank, "coordinates": coordinates, "island": island_of[rank]}
        )
    return entries


def size_problems(num_ranks: int) -> list[Problem]:
    """Returns a problem when a plan would list too many ranks."""
    if num_ranks <= MAX_RANKS:
        return []
    detail = (
        f"a plan lists at most {MAX_RANKS} ranks, and this one has {num_ranks}; lower a "
        "degree"
    )
    return [Problem("/parallel", "too_many_ranks", detail)]


def vocab_size_of(config: TrainConfig) -> int | None:
    """Returns the vocabulary's size; None when it depends on the tokenizer's file."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    # A trained tokenizer has the configured size; that of a file is known after reading it.
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size
    if tokenizer.kind == "bytes":
        return BYTE_VOCABULARY
    return None


def with_vocabulary(config: TrainConfig) -> TrainConfig | None:
    """Returns the config with its vocabulary filled in; None while it is unknown."""
    vocab_size = vocab_size_of(config)
    if vocab_size is None:
        return None
    return resolution.with_vocabulary(config, vocab_size)


def estimates(config: TrainConfig, hardware: Hardware | None) -> Estimates | None:
    """Returns the estimates for a resolved config; None while its vocabulary is unknown."""
    # Embedding and head depend on the vocabulary, and often are the largest weights.
    complete = with_vocabulary(config)
    if complete is None:
        return None
    device = GPU
    if hardware is not None:
        device = hardware.device
    memory = fullest_rank(complete, device)
    time = None
    if hardware is not None:
        time = step_time(complete, hardware)
    return Estimates(
        vocab_size=complete.model.vocabulary,
        memory=memory,
        communication=step_communication(complete, memory.rank),
        checkpoint_bytes=checkpoint_bytes(complete),
        bubble_share=bubble_share(plan_pipeline(complete), num_microbatches(complete)),
        time=time,
    )


def check_memory(config: TrainConfig, hardware: Hardware) -> list[Problem]:
    """Returns why a resolved config does not fit into the device's memory.

    Returns nothing while its vocabulary or the device's memory is unknown.
    """
    complete = with_vocabulary(config)
    device_bytes = hardware.memory_bytes
    if complete is None or device_bytes is None:
        return []
    # The job runs out of memory as soon as one rank does.
    memory = fullest_rank(complete, hardware.device)
    if memory.total_bytes <= device_bytes:
        return []
    detail = (
        f"rank {memory.rank} needs {memory.total_bytes / _GIB:.1f} GiB "
        f"({_largest_terms(memory)}), and {hardware.name} has {device_bytes / _GIB:.0f}; "
        f"{_remedy(complete, hardware)}"
    )
    return [Problem("/parallel", "memory_fits", detail)]


def check_copies(
    config: TrainConfig, num_ranks: int, node_memory_bytes: int
) -> list[Problem]:
    """Returns why copies of the ranks' states do not fit into the memory of a node.

    `num_ranks` ranks of the resolved config must share a node, which has at most
    `node_memory_bytes`; 0: unknown.
    """
    complete = with_vocabulary(config)
    if config.checkpoint.peer_every_steps is None or complete is None:
        return []
    size = num_ranks * peer_copies_bytes(complete)
    if resolution.world_size(complete) == 1 or not 0 < node_memory_bytes < size:
        return []
    detail = (
        f"copies of the states of {num_ranks} ranks that share a node take "
        f"{size / _GIB:.3g} GiB of its memory, and the largest node has "
        f"{node_memory_bytes / _GIB:.3g} GiB; leave it out, raise dp or pp, or add larger nodes"
    )
    return [Problem("/checkpoint/peer_every_steps", "memory_fits", detail)]


def _largest_terms(memory: RankMemory) -> str:
    terms = []
    for name, size in list(memory.terms.items())[:NUM_LARGEST_TERMS]:
        if size:
            terms.append(f"{name} {size / _GIB:.1f}")
    return ", ".join(terms)


def _remedy(config: TrainConfig, hardware: Hardware) -> str:
    """Returns a sentence that names the nearest layout that fits, if there is one."""
    world_size = resolution.world_size(config)
    precision = config.training.precision
    if precision not in hardware.efficiencies:
        # Layouts are compared by their step time, which is unknown here.
        return (
            f"no layouts are compared for {precision} on {hardware.name}; raise tp or pp, add "
            "nodes, or use zero=3 or another precision"
        )
    # Takes seconds: tries layouts in the order of how much they change.
    suggestion = nearest(config, world_size, hardware)
    if suggestion is None:
        return (
            f"no layout that was tried fits on {world_size} ranks; add nodes, or use zero=3 "
            "or a smaller model"
        )
    size = f"{suggestion.memory.total_bytes / _GIB:.1f} GiB"
    return f"the nearest layout that fits is {_layout(suggestion)} ({size})"


def _layout(suggestion: Suggestion) -> str:
    training = suggestion.config.training
    granularity = training.recompute.granularity
    recompute = f"recompute {granularity}"
    if granularity == "none":
        recompute = "nothing recomputed"
    return (
        f"{degrees(suggestion.config.parallel)}, "
        f"micro_batch_size={training.micro_batch_size}, {recompute}"
    )

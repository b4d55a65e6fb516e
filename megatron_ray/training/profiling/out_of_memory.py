"""Explains why a rank has run out of memory.

Owns: which errors mean that, the snapshot of the allocator, the message with the plan's
estimate beside the measured peak. Must not know: what follows the failure.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.planning.memory import RankMemory, fullest_rank
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import open_storage
from megatron_ray.training.profiling.recording import store

_GIB = 2**30
_NUM_TERMS = 3
"""Terms of the estimate that the message names."""
_TEXTS = ("out of memory", "can't allocate memory")
"""What plain RuntimeErrors of torch contain."""
_REQUEST = re.compile(r"allocate ([\d.]+ (?:bytes|[KMGTP]i?B))")
_REMEDY = (
    "lower training.micro_batch_size, add training.recompute, raise parallel.tp or pp, or use "
    "parallel.zero=3"
)


class RankOutOfMemoryError(MegatronRayError):
    """A rank's device, or the host, has no memory left.

    The message has the plan's estimate beside the peak, and the snapshot's place.
    """

    failure_kind = ErrorKind.MEMORY


@contextmanager
def explained_out_of_memory(
    config: TrainConfig, mesh: ParallelMesh, attempt: int
) -> Iterator[None]:
    """Raises RankOutOfMemoryError for any error that means it.

    On CUDA the allocator's snapshot is written below `config.storage` first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory{_request(error)}: {_usage(mesh.device)}"
        message += _estimate(config, mesh.device)
        # Written while the error is being handled: what it names is allocated still.
        if mesh.device.type == "cuda":
            message += _snapshot(config, mesh.rank, attempt)
        raise RankOutOfMemoryError(f"{message}; {_REMEDY}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that no memory is left, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(part in text for part in _TEXTS)


def _request(error: BaseException) -> str:
    """Returns how much was to be allocated, if the error names it."""
    match = _REQUEST.search(str(error))
    if match is None:
        return ""
    amount, unit = match[1].split()
    if unit == "bytes":
        return f" (for {_gib(float(amount))} more)"
    return f" (for {amount} {unit} more)"


def _usage(on: torch.device) -> str:
    peak = f"this rank's peak was {_gib(device.peak_memory_bytes(on))}"
    free = device.free_memory_bytes(on)
    if on.type == "cuda":
        total = torch.cuda.get_device_properties(on).total_memory
        return f"{peak} of the GPU's {_gib(total)}"
    if free is None:
        return peak
    return f"{peak}, and {_gib(free)} are left here"


def _estimate(config: TrainConfig, on: torch.device) -> str:
    """Returns what the plan has estimated, with its largest terms."""
    try:
        memory: RankMemory = fullest_rank(config, device.kind_of(on.type))
    except ValueError:
        return ""
    terms = []
    for name, size in list(memory.terms.items())[:_NUM_TERMS]:
        terms.append(f"{name} {_gib(size)}")
    return (
        f"; the plan's estimate is {_gib(memory.total_bytes)} ({', '.join(terms)}), without "
        "torch itself and fragments"
    )


def _snapshot(config: TrainConfig, rank: int, attempt: int) -> str:
    """Writes the allocator's snapshot; returns where it is, or why it is not."""
    if config.storage is None:
        return ""
    path = config.storage.path.rstrip("/")
    folder = f"{path}/profiles/out-of-memory-a{attempt:04d}"
    with tempfile.TemporaryDirectory(prefix="memory-") as local:
        file = Path(local, f"rank-{rank:05d}.memory.pickle")
        try:
            torch.cuda.memory._dump_snapshot(str(file))
            store(file, open_storage(folder))
        except (StorageError, OSError, RuntimeError) as error:
            return f"; its snapshot cannot be written: {error}"
    return f"; snapshot: {folder}/{file.name}"


def _gib(size: float) -> str:
    size /= _GIB
    if size >= 1000:
        return f"{size:,.0f} GiB"
    return f"{size:.3g} GiB"

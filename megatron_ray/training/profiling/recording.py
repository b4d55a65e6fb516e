"""Records some steps of one rank with torch's profiler, and writes what it has recorded.

Owns: the profiler, the two files of a profile, the list of operators. Must not know: which
steps, reports.

The trace is a Chrome trace (chrome://tracing, ui.perfetto.dev). The memory is a snapshot of
the allocator on CUDA (pytorch.org/memory_viz), with the history of the recorded steps; on
CPU, where there is no such allocator, it is the process's memory and what each operator has
allocated.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_ray.distributed import device
from megatron_ray.storage.storage import Storage

NUM_OPERATORS = 10
"""Operators that a report lists."""
_NUM_OPERATORS_OF_MEMORY = 100
_MAX_HISTORY = 1_000_000
"""Allocations of a snapshot's history; older ones are dropped."""
_STEP = "step "
"""Beginning of the names of the steps in a trace."""
Operator = dict[str, Any]


class StepRecording:
    """A recording of consecutive steps, which begins at once."""

    def __init__(self, on: torch.device) -> None:
        self._device = on
        self._is_cuda = on.type == "cuda"
        activities = [ProfilerActivity.CPU]
        if self._is_cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MAX_HISTORY)
        self._profiler = profile(activities=activities, profile_memory=True)
        # What earlier steps have launched is no part of the recording.
        device.synchronize(on)
        self._profiler.start()
        self._started = time.perf_counter()
        self._step = record_function("")
        self._averages: Iterable[Any] | None = None
        self.seconds = 0.0
        """Time from the first step to the end."""

    def begin_step(self, step: int) -> None:
        """Marks the beginning of a step in the trace."""
        self._step = record_function(f"{_STEP}{step}")
        self._step.__enter__()

    def end_step(self) -> None:
        """Marks the end of the step."""
        self._step.__exit__(None, None, None)

    def stop(self) -> None:
        """Ends the recording once the device has done what the steps have launched."""
        device.synchronize(self._device)
        self.seconds = time.perf_counter() - self._started
        self._profiler.stop()

    def discard(self) -> None:
        """Ends a recording whose files are not written."""
        self._profiler.stop()
        self._forget_history()

    def write(self, storage: Storage, rank: int) -> tuple[str, ...]:
        """Writes the files of the ended recording and returns their names.

        Raises StorageError.
        """
        prefix = f"rank-{rank:05d}"
        with tempfile.TemporaryDirectory(prefix="profile-") as folder:
            trace = Path(folder, f"{prefix}.trace.json.gz")
            self._profiler.export_chrome_trace(str(trace))
            if self._is_cuda:
                memory = Path(folder, f"{prefix}.memory.pickle")
                torch.cuda.memory._dump_snapshot(str(memory))
                self._forget_history()
            else:
                memory = Path(folder, f"{prefix}.memory.json")
                memory.write_text(json.dumps(self._memory_of_host(), indent=1))
            for path in (trace, memory):
                store(path, storage)
        return trace.name, memory.name

    def operators(self) -> tuple[Operator, ...]:
        """Returns the most expensive operators by their own time, most expensive first."""
        rows: list[Operator] = []
        for event in self._events():
            microseconds = event.self_cpu_time_total
            if self._is_cuda:
                microseconds = event.self_device_time_total
            row = {"name": event.key, "calls": event.count, "seconds": microseconds / 1e6}
            rows.append(row)
        total_s = sum(row["seconds"] for row in rows) or 1.0
        rows.sort(key=lambda row: -row["seconds"])
        for row in rows[:NUM_OPERATORS]:
            row["share"] = row["seconds"] / total_s
        return tuple(rows[:NUM_OPERATORS])

    def _events(self) -> Iterator[Any]:
        """Yields the operators: neither kernels, whose time they have, nor the steps."""
        # Adding up the events of a large model takes seconds.
        if self._averages is None:
            self._averages = self._profiler.key_averages()
        for event in self._averages:
            is_operator = event.device_type.name == "CPU"
            if is_operator and not event.key.startswith(_STEP):
                yield event

    def _memory_of_host(self) -> dict[str, Any]:
        rows = []
        for event in self._events():
            row = {
                "name": event.key,
                "calls": event.count,
                "allocated_bytes": event.self_cpu_memory_usage,
            }
            rows.append(row)
        rows.sort(key=_allocated, reverse=True)
        resident = device.resident_bytes()
        # The kernel's own counts are some pages apart.
        peak = max(resident, device.peak_memory_bytes(self._device))
        return {
            "resident_bytes": resident,
            "peak_resident_bytes": peak,
            "operators": rows[:_NUM_OPERATORS_OF_MEMORY],
        }

    def _forget_history(self) -> None:
        if self._is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def _allocated(row: Operator) -> int:
    allocated: int = row["allocated_bytes"]
    return allocated


def store(path: Path, storage: Storage) -> None:
    """Copies a local file into a storage, under its own name. Raises StorageError."""
    with path.open("rb") as source, storage.open_output(path.name) as target:
        shutil.copyfileobj(source, target, 1 << 20)

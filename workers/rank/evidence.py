"""Describes what a rank's process does now, from another thread than the training one.

Owns: reading the process's record, the stacks of its threads, memory and load. Must not
know: Ray, what follows from the evidence.

Nothing here waits for the training thread or the device, and nothing reads the values of
variables, which may be secrets.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import FrameType

from megatron_ray.distributed.activity import PROCESS
from workers.decisions.ranks.diagnosis import Frame, GroupCounts, RankEvidence, Wait

_MAX_FRAMES = 60
_MAX_THREADS = 16
_MAX_COLLECTIVES = 8
_THREAD_START = threading.Thread.run.__code__
_PACKAGES = ("megatron_ray", "workers")
_PY_SPY_S = 3.0
_TRAINING_THREAD = '"attempt-'
"""Beginning of a training thread's name, as py-spy prints it."""
_MAX_TEXT = 8000


def gather_evidence(
    rank: int, step: int, thread: threading.Thread, *, has_ended: bool
) -> RankEvidence:
    """Returns what the rank does whose training thread this is."""
    frames = sys._current_frames()
    phase = "ended"
    wait = None
    if not has_ended:
        phase = PROCESS.phase
        wait = _current_wait()
    return RankEvidence(
        rank=rank,
        phase=phase,
        step=step,
        microbatch=PROCESS.microbatch,
        wait=wait,
        groups=_counts(),
        frames=tuple(_frames(frames.get(thread.ident or 0))),
        threads=tuple(_other_threads(frames, thread)),
        memory_bytes=_resident_bytes(),
        free_memory_bytes=_free_bytes(),
        device_memory_bytes=_device_bytes(),
        device_collectives=_recorded_by_nccl(),
        load=os.getloadavg()[0],
    )


def stacks_from_outside(pid: int) -> str:
    """Returns the stacks of another process on this node, which does not answer itself.

    Empty without py-spy, or without the right to look at the process.
    """
    program = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    # Without stopping the process, which may be stopped already.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        result = subprocess.run(
            command, capture_output=True, timeout=_PY_SPY_S, check=True, text=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    # The first lines are the command line of the process, in which a user may have put
    # anything.
    _, *threads = result.stdout.split("\nThread ")
    text = ""
    for thread in threads:
        # Other threads matter only where there is no training thread.
        if _TRAINING_THREAD in thread:
            return f"Thread {thread.strip()}"[:_MAX_TEXT]
        text += f"Thread {thread.strip()}\n"
    return text[:_MAX_TEXT]


def _current_wait() -> Wait | None:
    operation = PROCESS.waiting
    if operation is None:
        return None
    seconds = perf_counter() - PROCESS.waiting_since
    group = operation.group
    if group is None:
        return Wait(operation.name, "", 0, 0, seconds)
    first = min(group.members)
    return Wait(
        operation.name, group.axis, operation.number, first, seconds, operation.peer
    )


def _counts() -> dict[str, GroupCounts]:
    counts = {}
    for record in list(PROCESS.groups.values()):
        counts[record.axis] = GroupCounts(
            min(record.members), record.entered, dict(record.sent), dict(record.received)
        )
    return counts


def _frames(frame: FrameType | None) -> Iterator[Frame]:
    """Yields a thread's stack, innermost first, without the frames that started it."""
    for _ in range(_MAX_FRAMES):
        if frame is None or frame.f_code is _THREAD_START:
            return
        code = frame.f_code
        yield Frame(_short(code.co_filename), frame.f_lineno, code.co_qualname)
        frame = frame.f_back


def _short(file: str) -> str:
    """Returns a file's path from its package on."""
    parts = Path(file).parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    for package in _PACKAGES:
        if package in parts:
            return "/".join(parts[parts.index(package) :])
    return "/".join(parts[-2:])


def _other_threads(
    frames: dict[int, FrameType], training: threading.Thread
) -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in list(frames.items())[:_MAX_THREADS]:
        if ident not in (training.ident, threading.get_ident()):
            innermost = next(_frames(frame))
            yield f"{names.get(ident, 'thread')}: {innermost}"


def device_collectives(trace: str) -> tuple[str, ...]:
    """Returns the unfinished collectives of torch's flight recorder of NCCL, oldest first.

    `trace` is its JSON. The host may have entered later ones, which the device has not
    begun.
    """
    try:
        entries = json.loads(trace)["entries"]
    except (ValueError, KeyError, TypeError):
        return ()
    unfinished = []
    for entry in entries:
        if entry.get("state") == "completed":
            continue
        name = str(entry.get("profiling_name", "")).removeprefix("nccl:")
        number = entry.get("collective_seq_id") or entry.get("p2p_seq_id")
        axis = list(entry.get("process_group", ("", "")))[-1]
        unfinished.append(f"{name} {number} of {axis}: {entry.get('state')}")
    return tuple(unfinished[:_MAX_COLLECTIVES])


def _recorded_by_nccl() -> tuple[str, ...]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ()
    # Only builds with NCCL have it; it reads memory of the host.
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return ()
    return device_collectives(dump(includeCollectives=True, onlyActive=True))


def _resident_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return None


def _device_bytes() -> int | None:
    """Returns the allocator's own count, which asks no device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_allocated())

"""CPU and CUDA behind one face.

Owns: device choice, memory statistics, peak FLOP/s. Must not know: models, groups.
"""

import ctypes
import resource

import torch

# Dense bf16 peaks in FLOP/s by a part of the device's name (vendor data sheets); fp32
# figures are not given there.
_BF16_PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def select(kind: str, local_index: int = 0) -> torch.device:
    """The torch device of `cpu`, `cuda` or `meta`; makes the CUDA one current for this
    thread.
    """
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", local_index)
    torch.cuda.set_device(device)
    return device


def backend_for(device: torch.device) -> str:
    """torch.distributed backend string: NCCL beside gloo on CUDA, gloo alone on CPU
    (where `cpu:gloo` would warn of a missing default).
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


class MallocTuning:
    """Makes glibc keep large freed blocks instead of returning them to the system: a
    fifth to a third of a CPU step is otherwise page faults on fresh temporaries. For
    the whole process and all its threads, so only whoever owns the process makes one.

    What is kept can fall to pieces that fit nothing: with collectives in other threads
    a rank held three times of what a step needs after 50 steps (measured; not so where
    glibc maps large blocks one by one). Hence `trim_if_grown`. One cause: glibc before 2.38
    asks for more than an aligned block's size and cuts off scraps, so the block's place
    serves the same size again only once it is joined with its scraps. Small bins keep
    scraps from being joined; one kind is switched off here, the other (tcache) only by
    GLIBC_TUNABLES as a process starts.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._usual = 0
        self._settling = 2
        mallopt = getattr(self._libc, "mallopt", None)  # only in glibc
        # malloc.h: M_ARENA_MAX (one, because others cannot grow large blocks),
        # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_MXFAST.
        settings = {-8: 1, -3: 2**31 - 1, -1: 2**31 - 1, -2: 256 * 1024 * 1024, 1: 0}
        taken = [
            mallopt is not None and mallopt(name, value) == 1
            for name, value in settings.items()
        ]
        self.keeps = all(taken)
        """False where the C library has no such switch."""

    def trim_if_grown(self) -> None:
        """Once a step: gives all that is free back when the process has grown by a
        quarter.

        The next step or two pay for it in faults.
        """
        if not self.keeps:
            return
        resident = _resident_bytes()
        if self._settling > 0:
            self._settling -= 1
            self._usual = resident
        elif resident > 1.25 * self._usual:
            self._libc.malloc_trim(0)
            self._settling = 2


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocator peak on CUDA, resident set of the process on
    CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None where no data sheet is known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _BF16_PEAKS.items() if part in name), None)


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue; a no-op on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

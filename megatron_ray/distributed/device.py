"""Hides the differences between CPU and CUDA.

Owns: device choice, memory statistics, peak FLOP/s. Must not know: models, groups.
"""

import ctypes
import resource

import torch

from megatron_ray.distributed.device_kind import DeviceKind

# Dense bf16 peaks in FLOP/s by a part of the device's name (vendor data sheets); fp32
# figures are not given there.
_BF16_PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def select(kind: str, local_index: int = 0) -> torch.device:
    """Returns the torch device of `cpu`, `cuda` or `meta`.

    A CUDA device becomes the current one of this thread.
    """
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", local_index)
    torch.cuda.set_device(device)
    return device


def kind_of(device_type: str) -> DeviceKind:
    """Returns what decides which kernels run on this process's device of a type.

    For a CPU oneDNN is asked, since it multiplies there: yes from AVX-512 on (it needs
    no instructions for bf16), no below, and what ONEDNN_MAX_CPU_ISA forbids it, it does
    not do.
    """
    if device_type != "cpu":
        return DeviceKind(device_type, bf16_products=True)
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return DeviceKind(device_type, bf16_products=supported)


def backend_for(device: torch.device) -> str:
    """Returns the torch.distributed backends of a device."""
    if device.type == "cuda":
        # gloo too, for what is on the host.
        return "cpu:gloo,cuda:nccl"
    # `cpu:gloo` would warn of a missing default.
    return "gloo"


class MallocTuning:
    """Makes glibc keep large freed blocks instead of returning them to the system.

    A fifth to a third of a CPU step is otherwise page faults on fresh temporaries. It
    holds for the whole process and all its threads, so only the owner of a process makes
    one.

    What is kept can fall to pieces that fit nothing: with collectives in other threads
    a rank had three times of what a step needs after 50 steps (measured; not so where
    glibc maps large blocks one by one). Hence `trim_if_grown`. One cause: glibc before
    2.38 asks for more than an aligned block's size and cuts off scraps, so the block's
    place serves the same size again only once it is joined with its scraps. Small bins
    keep scraps from being joined; one kind is switched off here, the other (tcache) only
    by GLIBC_TUNABLES as a process starts.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._baseline_bytes = 0
        self._settling_steps = 2
        mallopt = getattr(self._libc, "mallopt", None)  # only in glibc
        # By malloc.h's numbers of parameters.
        settings = {
            -8: 1,  # M_ARENA_MAX: others than the first arena cannot grow large blocks
            -3: 2**31 - 1,  # M_MMAP_THRESHOLD
            -1: 2**31 - 1,  # M_TRIM_THRESHOLD
            -2: 256 * 1024 * 1024,  # M_TOP_PAD
            1: 0,  # M_MXFAST: off, or small bins keep scraps apart
        }
        self.keeps = mallopt is not None
        """Whether freed blocks are kept; False where the C library has no such switch."""
        if mallopt is not None:
            # Every setting is tried, even behind one that was refused.
            for parameter, value in settings.items():
                if mallopt(parameter, value) != 1:
                    self.keeps = False

    def trim_if_grown(self) -> None:
        """Returns all free memory to the system if the process has grown by a quarter.

        To be called once a step. The next step or two pay for a trim in page faults, and
        set the new size to compare with.
        """
        if not self.keeps:
            return
        resident = _resident_bytes()
        if self._settling_steps > 0:
            self._settling_steps -= 1
            self._baseline_bytes = resident
        elif resident > 1.25 * self._baseline_bytes:
            self._libc.malloc_trim(0)
            self._settling_steps = 2


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that was used so far.

    It is the allocator's peak on CUDA, the process's resident set on CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 FLOP/s of the device.

    None where no data sheet is known (every CPU).
    """
    if device.type != "cuda":
        return None
    device_name = torch.cuda.get_device_name(device)
    for part_of_name, peak in _BF16_PEAKS.items():
        if part_of_name in device_name:
            return peak
    return None


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue; does nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

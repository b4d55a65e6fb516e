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
_CGROUP = "/sys/fs/cgroup"


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
    """Returns the properties of this process's device that decide which kernels run.

    On CPUs oneDNN computes products, so oneDNN is queried for bf16: supported from
    AVX-512 on (without bf16 instructions), and limited by ONEDNN_MAX_CPU_ISA.
    """
    if device_type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        return DeviceKind(device_type, bf16_products=True, capability=capability)
    if device_type != "cpu":
        return DeviceKind(device_type, bf16_products=True)
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return DeviceKind(device_type, bf16_products=supported)


def backend_for(device: torch.device) -> str:
    """Returns the torch.distributed backends of a device."""
    if device.type == "cuda":
        # gloo too, for tensors on the host.
        return "cpu:gloo,cuda:nccl"
    # `cpu:gloo` would warn of a missing default.
    return "gloo"


class MallocTuning:
    """Makes glibc keep large freed blocks instead of returning them to the system.

    Otherwise page faults on new temporaries take a fifth to a third of a CPU step. It
    affects the whole process with all its threads, so only a process's owner should
    create one.

    Kept memory can fragment: with collectives in other threads, a rank used three times
    the memory of a step after 50 steps (measured; not if glibc maps large blocks one by
    one). Hence `trim_if_grown`. One cause: glibc before 2.38 allocates more than an
    aligned block's size and splits off scraps, so the block can be reused for the same
    size only after it is merged with its scraps. Small bins prevent this merge; one
    kind is disabled here, the other (tcache) only by GLIBC_TUNABLES when a process
    starts.
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
        """Whether freed blocks are kept; False if the C library has no such option."""
        if mallopt is not None:
            # Every setting is tried, even after one has failed.
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
        resident = resident_bytes()
        if self._settling_steps > 0:
            self._settling_steps -= 1
            self._baseline_bytes = resident
        elif resident > 1.25 * self._baseline_bytes:
            self._libc.malloc_trim(0)
            self._settling_steps = 2


def resident_bytes() -> int:
    """Returns the memory of the process that is in RAM."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory use so far.

    It is the allocator's peak on CUDA, the process's resident set on CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory_bytes(device: torch.device) -> int | None:
    """Returns the memory that this process can still allocate; None if unknown.

    On CPU it is what the system has available, less where the process's control group
    has a limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    for line in _lines_of("/proc/meminfo"):
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            free.append(int(amount.split()[0]) * 1024)
    limit = _lines_of(f"{_CGROUP}/memory.max")
    used = _lines_of(f"{_CGROUP}/memory.current")
    # Without a limit the file contains the word `max`.
    if limit and used and limit[0].isdigit():
        free.append(max(0, int(limit[0]) - int(used[0])))
    return min(free, default=None)


def _lines_of(path: str) -> list[str]:
    """Returns the lines of a system file, none where there is no such file."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 FLOP/s of the device.

    None for devices without a data sheet (every CPU).
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

"""Recognizes defects of GPUs, in texts of exceptions and of the kernel's log.

Owns: these texts and the numbers of Xid errors. Pure. Must not know: what follows a
defect, Ray, torch, where a log is read.
"""

import re
from collections.abc import Iterable

_DEFECT_TEXTS = (
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "fallen off the bus",
    "gpu is lost",
    "cuda-capable device(s) is/are busy or unavailable",
    "no cuda-capable device is detected",
    "no cuda gpus are available",
    "unable to determine the device handle",
    "cuda driver initialization failed",
    "cuda unknown error",
    "cuda error: unknown error",
    "system not yet initialized",
    "unsupported display driver / cuda driver combination",
    "driver/library version mismatch",
)
"""Parts of CUDA's and NVML's texts about the device or its driver. Texts about a kernel
(illegal address, device-side assert, launch failure) are bugs far more often."""
_XID = re.compile(r"NVRM: Xid \((?P<device>[^)]*)\): (?P<number>\d+),")
_DEFECT_XIDS = frozenset(
    {46, 48, 62, 64, 74, 79, 95, 110, 119, 120, 136, 140, 143, 155, 156, 158}
)
"""Xid errors after which NVIDIA's catalogue resets, drains or replaces the GPU. Others,
such as 13, 31, 43 and 45, are those of a process."""


def is_defect(text: str) -> bool:
    """Whether an exception's text, in lower case, is about the GPU and not its program."""
    return any(part in text for part in _DEFECT_TEXTS)


def kernel_defects(lines: Iterable[str]) -> list[str]:
    """Returns the lines of a kernel's log that report a defective GPU."""
    defects = []
    for line in lines:
        xid = _XID.search(line)
        if xid is not None and int(xid["number"]) in _DEFECT_XIDS:
            defects.append(line[xid.start() :].strip())
    return defects

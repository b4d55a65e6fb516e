"""Allocates host memory for copies from and to a device.

Owns: page-locking. Must not know: what is copied.
"""

import weakref

import torch


def allocate_host(
    num_elements: int, device: torch.device, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Returns zeros in host memory for copies, page-locked where they come from CUDA.

    Raises MemoryError when it cannot be page-locked.
    """
    # Filled, so that the first use does not wait for page faults.
    memory = torch.empty(num_elements, dtype=dtype).zero_()
    num_bytes = memory.nbytes
    if device.type == "cuda" and num_bytes:
        # Registered and not `pin_memory`, whose allocator rounds up to a power of two.
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        if status:
            raise MemoryError(
                f"cannot page-lock {num_bytes} bytes of host memory (CUDA error {status})"
            )
    return memory


def unregister_host(address: int) -> None:
    """Ends the page-locking of memory from `allocate_host`; 0 is the address of none."""
    if address:
        torch.cuda.cudart().cudaHostUnregister(address)


def allocate_lasting(
    num_elements: int, device: torch.device, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Returns such memory that stays page-locked as long as the tensor itself is used.

    Views of it do not count.
    """
    memory = allocate_host(num_elements, device, dtype)
    if device.type == "cuda":
        release = weakref.finalize(memory, unregister_host, memory.data_ptr())
        release.atexit = False
    return memory

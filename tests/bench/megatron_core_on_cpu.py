"""What megatron-core 0.16.1 needs to run on CPU with gloo: stand-ins for the parts of
torch.cuda that it uses whatever the device.

None of its files is changed. `install` comes before its import. Streams and events do
nothing, as CPU has no queue.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo import trace_rules
from torch._inductor.codecache import CacheBase

_CPU = torch.device("cpu")


class _NoStream:
    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> "_NoStream":
        return self

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _no_stream(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory for which `cuda` means `cpu`."""

    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        device = options.get("device")
        if device is not None and (
            isinstance(device, int) or str(device).startswith("cuda")
        ):
            options["device"] = _CPU
        options.pop("pin_memory", None)
        return make(*args, **options)

    return made


def install() -> None:
    """Before megatron.core is imported.

    The compiler, which its import brings in, builds its tables of torch's functions
    before that, and learns that there is no GPU.
    """
    trace_rules.get_torch_obj_rule_map()
    CacheBase.get_system()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("synchronize", "empty_cache", "set_device", "_lazy_init"):
        setattr(cuda, name, _nothing)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *_, **__: (8, 0)
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _NoStream()
    cuda.stream = _no_stream
    for name in (
        "empty",
        "zeros",
        "ones",
        "tensor",
        "full",
        "randn",
        "rand",
        "arange",
        "empty_like",
        "zeros_like",
    ):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    plain = tensor.type

    def type_name(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Both of its optimizers dispatch on this string."""
        name = plain(self, *args, **options)
        return (
            name.replace("torch.", "torch.cuda.", 1)
            if not args and not options and ".cuda." not in name
            else name
        )

    tensor.type = type_name


def patch_random() -> None:
    """It keeps its own getter and setter of the CUDA generator's state."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

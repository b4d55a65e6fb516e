"""Classes of failures, and the root cause among several."""

import builtins
import importlib
import pkgutil
from collections.abc import Iterator

import pydantic
import pytest
import torch

import megatron_ray
import workers
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from workers.decisions.failures import (
    BY_PRECEDENCE,
    FOREIGN_TYPES,
    GROUP_TYPES,
    Failure,
    FailureKind,
    classify,
    describe_error,
    root_cause,
)
from workers.protocol.states import StatusReason

EXPECTED = {
    ErrorKind.USER: FailureKind.USER,
    ErrorKind.STORAGE: FailureKind.STORAGE,
    ErrorKind.DISK_FULL: FailureKind.DISK_FULL,
    ErrorKind.CHECKPOINT: FailureKind.CHECKPOINT,
    ErrorKind.NUMERICS: FailureKind.NAN_LOSS,
    ErrorKind.RULE: FailureKind.RULE,
    ErrorKind.ROLLBACK: FailureKind.ROLLBACK,
    ErrorKind.RECHECK: FailureKind.RECHECK,
    ErrorKind.HARDWARE: FailureKind.GPU,
    ErrorKind.REPLICAS: FailureKind.EXCEPTION,
    ErrorKind.MEMORY: FailureKind.OOM,
    ErrorKind.INTERNAL: FailureKind.EXCEPTION,
}


def own_exceptions() -> list[type[MegatronRayError]]:
    """Returns every exception class that the library and the workers define."""
    for package in (megatron_ray, workers):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return sorted(set(subclasses(MegatronRayError)), key=lambda error: error.__name__)


def subclasses(base: type[MegatronRayError]) -> Iterator[type[MegatronRayError]]:
    for error in base.__subclasses__():
        yield error
        yield from subclasses(error)


def test_every_exception_of_ours_is_classified_by_its_kind_not_its_name() -> None:
    errors = own_exceptions()
    names = {error.__name__ for error in errors}
    assert {"ConfigError", "UnusableDataError", "UserError", "StorageError"} <= names
    assert {"MissingFileError", "NonFiniteLossError", "WorkerGroupError"} <= names
    for error in errors:
        assert error.__name__.endswith("Error")
        reported = {"type": "Renamed", "message": "m", "failure_kind": error.failure_kind}
        kind, _ = describe_error(reported)
        assert kind is EXPECTED[error.failure_kind], error.__name__


def test_every_exception_class_of_these_packages_is_in_the_tree() -> None:
    own_exceptions()
    strays = []
    for error in all_subclasses(Exception):
        ours = error.__module__.startswith(("megatron_ray.", "workers."))
        is_public = not error.__name__.startswith("_")
        if ours and is_public and not issubclass(error, MegatronRayError):
            strays.append(error)
    assert strays == []


def all_subclasses(base: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(base)
    for child in children:
        yield child
        yield from all_subclasses(child)


def test_exceptions_of_other_libraries_have_the_names_that_are_matched() -> None:
    namespaces = (builtins, pydantic, torch, torch.distributed)
    for name in (*FOREIGN_TYPES, *GROUP_TYPES):
        assert any(hasattr(namespace, name) for namespace in namespaces), name


@pytest.mark.parametrize(
    ("type_name", "message", "kind"),
    [
        ("UnusableDataError", "/data/train/0/path: nothing there", FailureKind.USER),
        (
            "ConfigError",
            "model.vocab_size=10 is smaller than the tokenizer's 256",
            FailureKind.USER,
        ),
        ("OutOfMemoryError", "CUDA out of memory", FailureKind.OOM),
        (
            "RuntimeError",
            "[enforce fail] DefaultCPUAllocator: can't allocate memory",
            FailureKind.OOM,
        ),
        (
            "RuntimeError",
            "[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.1]",
            FailureKind.COLLATERAL,
        ),
        (
            "DistBackendError",
            "NCCL error: remote process exited or there was a network error",
            FailureKind.COLLATERAL,
        ),
        ("StorageError", "cannot write x: No space left on device", FailureKind.STORAGE),
        (
            "OSError",
            "only 10 of 99 bytes fitted into /tmp/r: the disk is full",
            FailureKind.DISK_FULL,
        ),
        ("LookupError", "connection closed by peer", FailureKind.EXCEPTION),
        ("RuntimeError", "shape mismatch", FailureKind.EXCEPTION),
        ("DataProblem", "recorded by an older version", FailureKind.USER),
        ("NonFiniteLoss", "recorded by an older version", FailureKind.NAN_LOSS),
        ("MissingFile", "recorded by an older version", FailureKind.STORAGE),
    ],
)
def test_classes_of_exceptions_without_a_kind(
    type_name: str, message: str, kind: FailureKind
) -> None:
    assert classify(type_name, message) is kind


ECC = """CUDA error: uncorrectable ECC error encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the \
stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
ASSERT = """CUDA error: device-side assert triggered
Search for `cudaErrorAssert' in https://docs.nvidia.com/cuda/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call.
Device-side assertion tracking was not enabled by user.
"""
NCCL_SYSTEM = """NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1333, \
unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.18.6
ncclSystemError: System call (e.g. socket, malloc) or external library call failed.
Last error:
socketStartConnect: Connect to 192.0.2.14<52822> failed : No route to host
"""
NCCL_REMOTE = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, \
remote process exited or there was a network error, NCCL version 2.25.1
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting \
prematurely.
Exception raised from checkForNCCLErrorsInternal at ProcessGroupNCCL.cpp:2501:
C++ CapturedTraceback:
#4 std::_Function_handler
"""
WATCHDOG = (
    "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1234, "
    "OpType=ALLREDUCE, NumelIn=4096, NumelOut=4096, Timeout(ms)=600000) ran for 600030 "
    "milliseconds before timing out."
)
RECV = "Failed to recv, got 0 bytes. Connection was likely closed. Did the server crash?"


@pytest.mark.parametrize(
    ("type_name", "message", "kind", "sentence"),
    [
        (
            "AcceleratorError",
            ECC,
            FailureKind.GPU,
            "AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        ),
        (
            "DistBackendError",
            "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.21.5\n"
            "Last error:\nCuda failure 214 'uncorrectable ECC error encountered'",
            FailureKind.GPU,
            "DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL "
            "version 2.21.5 Last error: Cuda failure 214 'uncorrectable ECC error encountered'",
        ),
        (
            "RuntimeError",
            "No CUDA GPUs are available",
            FailureKind.GPU,
            "RuntimeError: No CUDA GPUs are available",
        ),
        (
            "RuntimeError",
            "CUDA error: uncorrectable NVLink error detected during the execution",
            FailureKind.GPU,
            "RuntimeError: CUDA error: uncorrectable NVLink error detected during the "
            "execution",
        ),
        (
            "RuntimeError",
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet "
            "initialized",
            FailureKind.GPU,
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not "
            "yet initialized",
        ),
        (
            "AcceleratorError",
            ASSERT,
            FailureKind.EXCEPTION,
            "AcceleratorError: CUDA error: device-side assert triggered (a kernel refused its "
            "input, such as an index out of range: a bug, not a defect of the GPU)",
        ),
        (
            "AcceleratorError",
            "CUDA error: an illegal memory access was encountered",
            FailureKind.EXCEPTION,
            "AcceleratorError: CUDA error: an illegal memory access was encountered",
        ),
        (
            "DistBackendError",
            NCCL_SYSTEM,
            FailureKind.COLLATERAL,
            "DistBackendError: NCCL error in: "
            "../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1333, unhandled system error "
            "(run with NCCL_DEBUG=INFO for details), NCCL version 2.18.6 ncclSystemError: "
            "System call (e.g. socket, malloc) or external library call failed. Last error: "
            "socketStartConnect: Connect to 192.0.2.14<52822> failed : No route to host",
        ),
        (
            "DistBackendError",
            NCCL_REMOTE,
            FailureKind.COLLATERAL,
            "DistBackendError: NCCL error in: "
            "/pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, remote process exited or "
            "there was a network error, NCCL version 2.25.1 ncclRemoteError: A call failed "
            "possibly due to a network error or a remote process exiting prematurely.",
        ),
        (
            "DistBackendError",
            WATCHDOG,
            FailureKind.COLLATERAL,
            f"DistBackendError: {WATCHDOG}",
        ),
        (
            "DistNetworkError",
            RECV,
            FailureKind.COLLATERAL,
            f"DistNetworkError: {RECV}",
        ),
        (
            "DistBackendError",
            "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.21.5\n"
            "Last error:\nCuda failure 2 'out of memory'",
            FailureKind.OOM,
            "DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL "
            "version 2.21.5 Last error: Cuda failure 2 'out of memory'",
        ),
        (
            "OSError",
            "[Errno 5] Input/output error: '/data/train.bin'",
            FailureKind.STORAGE,
            "OSError: [Errno 5] Input/output error: '/data/train.bin'",
        ),
        (
            "OSError",
            "[Errno 116] Stale file handle: '/data/train.bin'",
            FailureKind.STORAGE,
            "OSError: [Errno 116] Stale file handle: '/data/train.bin'",
        ),
    ],
)
def test_real_texts_of_cuda_nccl_and_the_kernel_have_a_kind_and_one_line(
    type_name: str, message: str, kind: FailureKind, sentence: str
) -> None:
    assert describe_error({"type": type_name, "message": message}) == (kind, sentence)


def test_an_internal_error_is_classified_by_its_text() -> None:
    assert classify("RuntimeError", "broken pipe", "internal") is FailureKind.COLLATERAL
    assert classify("SomeError", "out of memory", "internal") is FailureKind.OOM
    assert classify("SomeError", "no such thing", "a later kind") is FailureKind.EXCEPTION


def test_an_echo_that_arrives_first_is_not_the_cause() -> None:
    echo = Failure(FailureKind.COLLATERAL, "connection closed", rank=0, order=0)
    later_echo = Failure(FailureKind.COLLATERAL, "connection closed", rank=2, order=2)
    died = Failure(FailureKind.PROCESS_DIED, "died", rank=1, order=1)
    assert root_cause([echo, died, later_echo]).rank == 1
    assert root_cause([echo, later_echo]).rank == 0
    with pytest.raises(ValueError, match="no failure"):
        root_cause([])


def test_every_kind_has_a_precedence_and_a_reason() -> None:
    assert set(BY_PRECEDENCE) == set(FailureKind)
    assert len(BY_PRECEDENCE) == len(FailureKind)
    for kind in FailureKind:
        assert isinstance(Failure(kind, "").reason, StatusReason)


def test_errors_of_ranks_are_described() -> None:
    assert describe_error({"type": "ValueError", "message": "bad"}) == (
        FailureKind.EXCEPTION,
        "ValueError: bad",
    )
    assert describe_error({"type": "UserError", "message": "bad"}) == (
        FailureKind.USER,
        "bad",
    )
    assert describe_error({})[0] is FailureKind.EXCEPTION

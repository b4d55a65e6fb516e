"""Real gloo ranks for tests: `run_ranks(fn, world_size, *args)` runs a module-level
function on processes of their own.

A forkserver that has torch preloaded makes a rank cheap. The store lives in the calling
process on a port that the kernel chose. The first rank to fail decides the error;
a rank that is still there at the deadline is killed by pid, its stacks shown.
"""

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

# pytest is here because a child re-imports the program that started its parent; the rest
# because ranks would import it one by one. torch.compile needs torch._dynamo, two seconds.
_PRELOAD = [
    "pytest",
    "pyarrow.fs",
    "torch._dynamo",
    "megatron_ray.training.session",
    "megatron_ray.data.preparation.prepare",
    "megatron_ray.inference.generate",
    # The matrix of layouts is drawn once, and not by every rank.
    "tests.parallel.test_matrix",
    "tests.support.hf_folders",
    "tests.support.model_families",
]
_GRACE_S = 1.5


class RankFailedError(Exception):
    """Carries the text of a rank's traceback, as the cause of the error that is raised
    again.
    """


@dataclass(frozen=True)
class _Call:
    """What a child needs to find the function: its file, because test modules need not
    be importable by name.
    """

    module: str
    path: str
    function: str
    arguments: bytes
    rank: int
    world_size: int
    port: int
    timeout_s: float
    stacks: str


@dataclass(frozen=True)
class _Failure:
    rank: int
    at: float
    text: str
    error: bytes | None


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on every rank with torch.distributed (gloo)
    initialised; results in rank order.

    `fn` is a module-level function; arguments and results are pickled, tensors
    included. An error on a rank is raised here with its own type and, as cause,
    RankFailedError with the rank's traceback. TimeoutError shows where each stuck rank
    was.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
    arguments = pickle.dumps(args)
    with tempfile.TemporaryDirectory(prefix="ranks-") as stacks:
        calls = [
            _Call(
                *where,
                arguments,
                rank,
                world_size,
                store.port,
                timeout_s,
                f"{stacks}/{rank}",
            )
            for rank in range(world_size)
        ]
        pipes, processes = zip(*(_start(call) for call in calls), strict=True)
        answers: dict[int, Any] = {}
        try:
            _collect(pipes, processes, timeout_s, answers)
            _raise_first(
                [answer for answer in answers.values() if isinstance(answer, _Failure)]
            )
            if missing := [rank for rank in range(world_size) if rank not in answers]:
                stuck = _stacks(processes, calls, missing)
                raise TimeoutError(
                    f"ranks {missing} of {world_size} gave no answer in {timeout_s} s\n{stuck}"
                )
        finally:
            _end(pipes, processes, answers)
    return [answers[rank] for rank in range(world_size)]


def _start(call: _Call) -> tuple[Connection, BaseProcess]:
    ours, child_end = _context().Pipe()
    process = _context().Process(
        target=_rank_main, args=(call, child_end), name=f"rank-{call.rank}", daemon=True
    )
    process.start()
    child_end.close()
    return ours, process


def _collect(
    pipes: tuple[Connection, ...],
    processes: tuple[BaseProcess, ...],
    timeout_s: float,
    answers: dict[int, Any],
) -> None:
    """Fills in answers until all are there or the time is up; after a first failure the
    others get only a short grace.
    """
    deadline = time.monotonic() + timeout_s
    while len(answers) < len(pipes) and (left := deadline - time.monotonic()) > 0:
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        for pipe in wait(list(open_pipes), timeout=left):
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(_GRACE_S)
                answers[rank] = _Failure(
                    rank,
                    time.monotonic(),
                    f"rank {rank} died with exit code {processes[rank].exitcode}",
                    None,
                )
            if isinstance(answers[rank], _Failure):
                deadline = min(deadline, time.monotonic() + _GRACE_S)


def _raise_first(failures: list[_Failure]) -> None:
    """The earliest failure is the cause; the others follow from it."""
    if failures:
        first = min(failures, key=lambda failure: failure.at)
        cause = RankFailedError(f"rank {first.rank}:\n{first.text}")
        if first.error is None:
            raise cause
        raise pickle.loads(first.error) from cause


def _stacks(
    processes: tuple[BaseProcess, ...], calls: list[_Call], ranks: list[int]
) -> str:
    for rank in ranks:
        if (
            (pid := processes[rank].pid) is not None
            and processes[rank].is_alive()
            and Path(calls[rank].stacks).exists()
        ):
            os.kill(pid, signal.SIGUSR1)
    time.sleep(0.3)
    files = {rank: Path(calls[rank].stacks) for rank in ranks}
    return "\n".join(
        f"rank {rank}:\n{path.read_text() if path.exists() else 'never started'}"
        for rank, path in files.items()
    )


def _end(
    pipes: tuple[Connection, ...],
    processes: tuple[BaseProcess, ...],
    answers: dict[int, Any],
) -> None:
    """Lets go the ranks that have answered, kills the others and the slow."""
    for pipe in pipes:
        pipe.close()
    for rank, process in enumerate(processes):
        if rank in answers:
            process.join(_GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _rank_main(call: _Call, pipe: Connection) -> None:
    with open(call.stacks, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        try:
            answer = _run(call)
            pipe.send_bytes(answer)
            with suppress(EOFError, OSError):
                pipe.recv_bytes()  # a group is left only when no rank needs it any more
            dist.destroy_process_group()
        except BaseException as error:  # noqa: BLE001 - whatever ends a rank is the caller's to see
            pipe.send_bytes(
                pickle.dumps(
                    _Failure(
                        call.rank, time.monotonic(), traceback.format_exc(), _pickled(error)
                    )
                )
            )
        # Leaving the groups of a failed rank can block; its neighbours notice the
        # closed sockets in any case.
        faulthandler.unregister(signal.SIGUSR1)
    os._exit(0)


def _run(call: _Call) -> bytes:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=call.timeout_s)
    store = TCPStore(
        "127.0.0.1", call.port, is_master=False, wait_for_workers=False, timeout=timeout
    )
    dist.init_process_group(
        "gloo", store=store, rank=call.rank, world_size=call.world_size, timeout=timeout
    )
    fn = _load(call.module, call.path)
    for part in call.function.split("."):
        fn = getattr(fn, part)
    return pickle.dumps(fn(call.rank, call.world_size, *pickle.loads(call.arguments)))


def _load(module: str, path: str) -> Any:
    """The module from its file, under the name it has in the parent, so that its
    classes can be pickled both ways.
    """
    if module in sys.modules:
        return sys.modules[module]
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _pickled(error: BaseException) -> bytes | None:
    """The error itself where it survives the trip; SystemExit and the like become
    RankFailedError.
    """
    if not isinstance(error, Exception):
        return None
    try:
        pickle.loads(data := pickle.dumps(error))
    except (pickle.PickleError, TypeError, AttributeError, ImportError):
        return None
    return data

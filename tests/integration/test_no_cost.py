"""The training thread calls neither Ray nor HTTP: a real session in a real worker under
a real driver, every call of it recorded.
"""

import json
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest

from megatron_ray.commands import Command, ProfileRequest
from megatron_ray.reports import Report
from tests.support.fake_service import NAMESPACE, FakeService
from workers.driver.driver import JobDriver
from workers.rank.attempt import Train, import_and_train
from workers.rank.messages import StartRequest
from workers.ray.rank_worker import RankWorker

pytestmark = pytest.mark.ray

STEPS = 12
FORBIDDEN = {
    "ray",
    "grpc",
    "httpx",
    "httpcore",
    "h11",
    "urllib",
    "urllib3",
    "requests",
    "aiohttp",
    "http",
    "asyncio",
    "anyio",
}
FORBIDDEN |= {
    "socket",
    "_socket",
    "ssl",
    "_ssl",
    "select",
    "subprocess",
    "_posixsubprocess",
}
CALLS = "calls-of-the-training-thread.json"


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Modules of all Python functions and modules or types of all C functions that this
    thread calls in the block.
    """
    seen: set[str] = set()

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            seen.add(str(frame.f_globals.get("__name__")))
        elif event == "c_call":
            owner = getattr(called, "__self__", None)
            kind = owner if isinstance(owner, type) else type(owner)
            seen.add(str(getattr(called, "__module__", None)))
            seen.update(base.__module__ for base in kind.__mro__)

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def roots(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def recorded_train(
    order: StartRequest,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
    profiles: Callable[[], ProfileRequest | None],
) -> str:
    with recorded() as seen:
        outcome = import_and_train(order, report, poll, profiles)
    Path(order.spec["storage"]["path"], CALLS).write_text(json.dumps(sorted(seen)))
    return outcome


class RecordedWorker(RankWorker):
    train: ClassVar[Train] = staticmethod(recorded_train)


class RecordedDriver(JobDriver):
    worker_class: ClassVar[type] = RecordedWorker


def spec(folder: Path) -> dict[str, Any]:
    return {
        "name": "recorded",
        "model": {
            "preset": "gpt-tiny",
            "num_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "ffn_hidden_size": 32,
        },
        "parallel": {"tp": 1, "dp": 1},
        "data": {
            "train": [{"path": str(folder / "corpus.txt")}],
            "tokenizer": {"kind": "bytes"},
        },
        "training": {
            "seq_length": 16,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "steps": STEPS,
            "eval_every_steps": 5,
        },
        "optimizer": {"lr": 0.001},
        "checkpoint": {"every_steps": 4},
        "resources": {"accelerator": "cpu"},
        "storage": {"path": str(folder / "job")},
    }


def test_the_training_thread_calls_neither_ray_nor_http(
    fake_service: FakeService, ends_actors: None, tmp_path: Path
) -> None:
    from workers.agent.driver_registry import DriverRegistry
    from workers.protocol.wire import DesiredReply

    (tmp_path / "corpus.txt").write_text(
        "the quick brown fox jumps over the lazy dog\n" * 200
    )
    registry = DriverRegistry(fake_service.url, NAMESPACE, RecordedDriver)
    job_id = f"job-{uuid.uuid4().hex[:12]}"
    fake_service.want(
        job_id, desired="prepare", spec=spec(tmp_path), job_dir=str(tmp_path / "job")
    )
    registry.set_desired(
        DesiredReply.model_validate(
            {"revision": 1, "jobs": list(fake_service.jobs.values()), "terminal": []}
        )
    )
    registry.reconcile()
    fake_service.wait("prepared data", lambda: fake_service.stored(job_id, kind="prepared"))
    fake_service.want(job_id, desired="run")
    fake_service.wait("success", lambda: "succeeded" in fake_service.states(job_id))
    assert fake_service.steps(job_id, 1) == list(range(1, STEPS + 1))
    assert fake_service.stored(job_id, kind="checkpoint"), "it saved too"
    seen = set(json.loads((tmp_path / "job" / CALLS).read_text()))
    worked = {
        "megatron_ray.training.loop",
        "megatron_ray.training.evaluate",
        "megatron_ray.training.saving",
        "workers.rank.attempt",
        "workers.rank.spool",
    }
    assert worked | {"posix"} <= seen, (
        "the record is of the thread that trains, evaluates, saves and reports"
    )
    assert roots(seen) & FORBIDDEN == set(), sorted(
        name for name in seen if name.partition(".")[0] in FORBIDDEN
    )


def test_the_record_would_show_a_call() -> None:
    """The means of the test above: calls of Python and of C, direct ones and those
    below a library.
    """
    import httpx
    import ray

    with recorded() as seen:
        ray.is_initialized()
    assert "ray" in roots(seen)
    with recorded() as seen:
        socket.socket().close()
    assert {"socket", "_socket"} <= roots(seen)
    with recorded() as seen, pytest.raises(httpx.ConnectError):
        httpx.get("http://127.0.0.1:1/", trust_env=False)
    assert {"httpx", "httpcore"} <= roots(seen)
    with recorded() as seen:
        os.getpid()
    assert roots(seen) & FORBIDDEN == set()

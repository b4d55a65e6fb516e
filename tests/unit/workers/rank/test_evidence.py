"""What a process reads of itself, and what it must not."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_ray.distributed.activity import PROCESS, GroupRecord, Operation
from workers.rank.evidence import device_collectives, gather_evidence, stacks_from_outside


def test_the_training_threads_stack_and_wait_are_read_from_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    secret = "hunter" + "2"

    def blocked_step(password: str) -> None:
        released.wait()

    monkeypatch.setenv("OBJECT_STORE_KEY", secret)
    thread = threading.Thread(target=blocked_step, args=(secret,), name="attempt-1")
    thread.start()
    group = GroupRecord("tp", (4, 5), entered=3, sent={5: 2})
    PROCESS.begin()
    PROCESS.phase = "reduce"
    PROCESS.groups[1] = group
    PROCESS.waiting = Operation.of("all_reduce", group, 3)
    try:
        row = gather_evidence(4, 17, thread, has_ended=False)
    finally:
        released.set()
        thread.join()
        PROCESS.begin()
    assert (row.phase, row.step) == ("reduce", 17)
    assert row.wait is not None
    assert str(row.wait) == "all_reduce 3 of tp"
    assert row.wait.group == 4
    assert row.groups["tp"].sent == {5: 2}
    assert "blocked_step" in row.frames[-1].function
    assert (row.memory_bytes or 0) > 1 << 20
    assert secret not in repr(row)
    ended = gather_evidence(4, 17, thread, has_ended=True)
    assert (ended.phase, ended.frames) == ("ended", ())


def test_paths_begin_with_their_package() -> None:
    row = gather_evidence(0, 0, threading.current_thread(), has_ended=False)
    assert row.frames[0].file == "workers/rank/evidence.py"
    assert any(frame.file.startswith("_pytest/") for frame in row.frames)


def test_a_neighbour_takes_the_stacks_of_a_process_that_does_not_answer() -> None:
    command = [sys.executable, "-c", "import time\nprint(1, flush=True)\ntime.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stacks = stacks_from_outside(process.pid)
        process.kill()
    assert str(Path(sys.executable)) not in stacks
    # Without py-spy or the right to trace there is nothing.
    assert stacks == "" or "<module>" in stacks
    assert stacks_from_outside(os.getpid() + 4_000_000) == ""


def test_unfinished_collectives_of_nccl_are_read_from_torchs_record() -> None:
    entry = {"profiling_name": "nccl:all_reduce", "process_group": ["3", "tp"]}
    entries = [
        {**entry, "collective_seq_id": 7, "state": "completed"},
        {**entry, "collective_seq_id": 8, "state": "started"},
        {**entry, "profiling_name": "nccl:send", "collective_seq_id": 0, "p2p_seq_id": 4}
        | {"state": "scheduled"},
    ]
    trace = json.dumps({"version": "2.10", "entries": entries})
    assert device_collectives(trace) == (
        "all_reduce 8 of tp: started",
        "send 4 of tp: scheduled",
    )
    assert device_collectives("") == ()
    assert device_collectives("{}") == ()

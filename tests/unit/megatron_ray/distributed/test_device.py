"""What is asked of the machine on CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ray.distributed import device
from service.local_stack.ray_head import ray_environment

# Allocates and frees 48 MB blocks, and prints the page faults of the second half, when
# memory is warm.
FAULTS = """
import resource, sys, threading, torch
from megatron_ray.distributed import device
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert device.MallocTuning().keeps
def churn():
    for _ in range(10):
        torch.ones(12_000_000)
def main():
    churn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    churn()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=main)
thread.start()
thread.join()
"""


def faults(mode: str) -> int:
    """As a rank under Ray would have them."""
    environment = os.environ | {
        name: value
        for name, value in ray_environment("", Path()).items()
        if value is not None
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return int(done.stdout)


def test_freed_memory_is_kept_in_a_thread_too() -> None:
    assert faults("keep") < faults("plain") / 10


# Frees 200 MB of which nothing lies at the heap's end, where glibc would return it
# unasked.
HOLES = """
import pytest
import torch
from megatron_ray.distributed import device
torch.set_num_threads(1)
memory = device.MallocTuning()
def resident():
    return device.resident_bytes() >> 20
for _ in range(4):
    memory.trim_if_grown()
pairs = [(torch.ones(500_000), torch.ones(2_000)) for _ in range(100)]
between = [small for _, small in pairs]
before = resident()
del pairs
kept = resident()
memory.trim_if_grown()
given_back = resident()
for _ in range(4):
    memory.trim_if_grown()
print(before - kept, before - given_back)
"""


def test_what_is_kept_is_given_back_once_the_process_has_grown() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES], check=True, capture_output=True, text=True
    )
    kept, given_back = map(int, done.stdout.split())
    assert kept < 10
    assert given_back > 180


def test_cpu_facts() -> None:
    cpu = device.select("cpu")
    assert cpu == torch.device("cpu")
    assert device.backend_for(cpu) == "gloo"
    assert device.peak_flops(cpu) is None
    assert device.peak_memory_bytes(cpu) > 1 << 20
    device.synchronize(cpu)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable: 8 kB"]}, 8192),
        (
            {
                "/proc/meminfo": ["MemAvailable: 8 kB"],
                "/sys/fs/cgroup/memory.max": ["6000"],
                "/sys/fs/cgroup/memory.current": ["1000"],
            },
            5000,
        ),
        (
            {
                "/proc/meminfo": ["MemAvailable: 8 kB"],
                "/sys/fs/cgroup/memory.max": ["max"],
                "/sys/fs/cgroup/memory.current": ["1000"],
            },
            8192,
        ),
    ],
    ids=["unknown", "system", "limited", "unlimited"],
)
def test_free_memory_is_that_of_the_system_and_of_its_limit(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, list[str]], expected: int | None
) -> None:
    monkeypatch.setattr(device, "_lines_of", lambda path: files.get(path, []))
    assert device.free_memory_bytes(torch.device("cpu")) == expected

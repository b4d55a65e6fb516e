"""What is asked of the machine on CPU."""

import subprocess
import sys

import torch

from megatron_ray import device

# Allocates and frees 48 MB blocks, and prints the page faults of the second half, when memory is warm.
FAULTS = """
import resource, sys, threading, torch
from megatron_ray import device
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert device.keep_freed_memory()
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
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_freed_memory_is_kept_in_a_thread_too() -> None:
    assert faults("keep") < faults("plain") / 10


def test_cpu_facts() -> None:
    cpu = device.select("cpu")
    assert cpu == torch.device("cpu") and device.backend_for(cpu) == "gloo" and device.peak_flops(cpu) is None
    assert device.peak_memory_bytes(cpu) > 1 << 20
    device.synchronize(cpu)

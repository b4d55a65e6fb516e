"""Two ranks over gloo whose store is at a given address; a program of its own.

    python -m tests.support.ranks_at_address ADDRESS ...

Prints per address the sum that the ranks agree on.
"""

import multiprocessing
import os
import sys
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from megatron_ray.distributed.stores import serve_store
from workers.rank.environment import RankEnv, prepare_process
from workers.rank.messages import StartRequest
from workers.rank.session import process_group

NUM_RANKS = 2
_TIMEOUT = timedelta(seconds=30)


def run_rank(rank: int, address: str, port: int, answers: Connection) -> None:
    """Joins the group as a rank worker does, and adds up the numbers of the ranks."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    prepare_process(1, address)
    request = StartRequest(
        RankEnv(rank, NUM_RANKS, rank, NUM_RANKS, master_addr=address, master_port=port),
        {},
        {},
        1,
        "cpu",
        store=(address, port),
    )
    with process_group(request, _TIMEOUT):
        value = torch.tensor([rank + 1.0])
        dist.all_reduce(value)
        answers.send(value.item())


def sum_at(address: str) -> float:
    """Returns the sum that two ranks agree on."""
    store = serve_store(address)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    processes = []
    for rank in range(NUM_RANKS):
        arguments = (rank, address, store.port, sender)
        processes.append(context.Process(target=run_rank, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(_TIMEOUT.total_seconds())
    sums = {receiver.recv() for process in processes if process.exitcode == 0}
    (total,) = sums
    return float(total)


if __name__ == "__main__":
    for place in sys.argv[1:]:
        sys.stdout.write(f"{place} {sum_at(place)}\n")

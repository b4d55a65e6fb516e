"""One rank's life: environment and spec in, a training session run to its end.

Ray-free; imports torch.

Owns: process group, mesh and session of one attempt. RankWorker calls `train` under
Ray, `workers.standalone` under torchrun. Must not know: Ray, HTTP.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ray.commands import Command
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import PhaseReport, Report
from megatron_ray.training.loop import Outcome
from megatron_ray.training.session import TrainingSession
from workers.protocol.job import JobSpec
from workers.rank.messages import StartOrder
from workers.rank.stores import HashStore, PrefixStore, Store, TCPStore, environment_store

ReportSink = Callable[[Report], None]
CommandSource = Callable[[], Command]


def train(order: StartOrder, report: ReportSink, poll: CommandSource) -> Outcome:
    """Runs one attempt on this rank.

    Leaves its process groups whatever happens, so that the other ranks are free at
    once.
    """
    spec = JobSpec.from_mapping(order.spec)
    data = PreparedData.model_validate(order.data)
    if order.device == "cpu":
        poll = _bounding(device.MallocTuning(), poll)
        torch.set_num_threads(spec.resources.num_threads)
    started = time.monotonic()
    with process_group(order):
        env = order.env
        world = World(env.rank, env.world_size, order.device_index, order.device)
        mesh = ParallelMesh.create(
            ParallelDims.of(spec.parallel), world, timedelta(seconds=order.timeout_s)
        )
        report(PhaseReport("rendezvous", time.monotonic() - started))
        session = TrainingSession(
            spec,
            mesh,
            data,
            report=report,
            poll=poll,
            attempt=order.attempt,
            resume_from=order.resume_from,
        )
        return session.run()


def _bounding(memory: device.MallocTuning, poll: CommandSource) -> CommandSource:
    """The loop polls once a step."""

    def polled() -> Command:
        memory.trim_if_grown()
        return poll()

    return polled


@contextmanager
def process_group(order: StartOrder) -> Iterator[None]:
    """The default process group of an attempt, under its own prefix in the store;
    nothing at all for a world of one.
    """
    env = order.env
    if env.world_size == 1:
        yield
        return
    env.export()
    timeout = timedelta(seconds=order.timeout_s)
    dist.init_process_group(
        device.backend_for(torch.device(order.device)),
        store=PrefixStore(f"attempt-{order.attempt}", connect_store(order)),
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def connect_store(order: StartOrder) -> Store:
    """The store of an order: the given address, or what torchrun's environment names."""
    timeout = timedelta(seconds=order.timeout_s)
    if order.store is not None:
        host, port = order.store
        return TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timeout
        )
    env = order.env
    if env.world_size == 1:
        return HashStore()
    return environment_store(env.rank, env.world_size, timeout)

"""One rank's life: environment and spec in, a training session run to its end. Ray-free; imports torch.

Owns: process group, mesh and session of one attempt, and the command line used by torchrun. RankWorker calls `train` under Ray.
Must not know: Ray, HTTP.

    torchrun --standalone --nproc-per-node 2 -m workers.rank job.yaml --set parallel.tp=2 --reports reports.jsonl [--resume]
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import typer

from megatron_ray import device
from megatron_ray.data.prepared import PreparedData
from megatron_ray.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.training.commands import Command
from megatron_ray.training.loop import NonFiniteLoss
from megatron_ray.training.reports import PhaseReport, Report
from megatron_ray.training.session import TrainingSession
from workers.job import JobSpec
from workers.orders import StartOrder, UserMistake
from workers.stores import HashStore, PrefixStore, Store, TCPStore, environment_store

Outcome = Literal["finished", "stopped"]
ReportSink = Callable[[Report], None]
CommandSource = Callable[[], Command]


def train(order: StartOrder, report: ReportSink, poll: CommandSource) -> Outcome:
    """Runs one attempt on this rank. Leaves its process groups whatever happens, so that the other ranks are free at once."""
    spec = JobSpec.from_mapping(order.spec)
    data = PreparedData.model_validate(order.data)
    if order.device == "cpu":
        poll = _bounding(device.KeptMemory(), poll)
        torch.set_num_threads(spec.resources.num_threads)
    started = time.monotonic()
    with process_group(order):
        env = order.env
        world = World(env.rank, env.world_size, order.device_index, order.device)
        mesh = ParallelMesh.create(ParallelDims.of(spec.parallel), world, timedelta(seconds=order.timeout_s))
        report(PhaseReport("rendezvous", time.monotonic() - started))
        session = TrainingSession(spec, mesh, data, report=report, poll=poll, attempt=order.attempt, resume_from=order.resume_from)
        return session.run()


def _bounding(memory: device.KeptMemory, poll: CommandSource) -> CommandSource:
    """The loop polls once a step."""

    def polled() -> Command:
        memory.bound()
        return poll()

    return polled


@contextmanager
def process_group(order: StartOrder) -> Iterator[None]:
    """The default process group of an attempt, under its own prefix in the store; nothing at all for a world of one."""
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
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    env = order.env
    if env.world_size == 1:
        return HashStore()
    return environment_store(env.rank, env.world_size, timeout)


def main(
    job: Annotated[Path, typer.Argument(help="Job spec, YAML or JSON.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="path.to.field=value over the spec; may be repeated.")] = None,
    reports: Annotated[Path | None, typer.Option(help="File for rank 0's step reports, one JSON object a line.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest committed checkpoint under storage.path.")] = False,
) -> None:
    """Trains a job without Ray and without a service: one process per rank, started by torchrun."""
    from workers.standalone import run_standalone

    try:
        outcome = run_standalone(job, set_ or [], reports, resume)
    except UserMistake as mistake:
        if str(mistake):
            typer.echo(f"error: {mistake}", err=True)
        raise typer.Exit(2) from None
    except NonFiniteLoss as problem:
        typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(1) from None
    if outcome is not None:
        typer.echo(outcome)


if __name__ == "__main__":
    typer.run(main)

"""Runs one attempt on one rank: process group, mesh, training session.

Ray-free; imports torch. RankWorker calls `train` under Ray, `workers.standalone` under
torchrun.

Owns: process group, mesh and session of one attempt. Must not know: Ray, HTTP.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ray.commands import Command, ProfileRequest
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import NcclOptions, ParallelMesh, World
from megatron_ray.distributed.speed import SpeedTest
from megatron_ray.distributed.stores import (
    HashStore,
    PrefixStore,
    Store,
    connected_store,
    environment_store,
)
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.parallelize.parallelize import DTYPES
from megatron_ray.reports import PhaseReport, Report
from megatron_ray.training.loop import Outcome
from megatron_ray.training.replica_jobs.peers import Place, joined_jobs
from megatron_ray.training.rules.checks import Recheck
from megatron_ray.training.session import TrainingSession, no_profile
from workers.preflight import Preflight, await_stop
from workers.protocol.job import JobSpec
from workers.protocol.network import NetworkConfig
from workers.rank.environment import (
    choose_interface,
    export_credentials,
    fix_kernels,
    own_address,
)
from workers.rank.messages import StartRequest
from workers.rank.peer_attempt import attempt_copies
from workers.rank.process_copies import ProcessCopies

ReportSink = Callable[[Report], None]
CommandSource = Callable[[], Command]
ProfileSource = Callable[[], ProfileRequest | None]
_TIMEOUT = timedelta(minutes=10)


def train(
    request: StartRequest,
    report: ReportSink,
    poll: CommandSource,
    profiles: ProfileSource = no_profile,
    peers: ProcessCopies | None = None,
) -> Outcome:
    """Runs one attempt on this rank.

    `report` receives every report; `poll` returns the command to obey at a step
    boundary, `profiles` the newest request of a profile; `peers` has the process's copies
    of states. The process groups are destroyed
    also after an error, so that the other ranks do not wait for this one.
    """
    spec = JobSpec.from_mapping(request.spec)
    choose_interface(spec.network.interface)
    data = PreparedData.model_validate(request.data)
    # Before any path is opened; the process belongs to this job alone.
    export_credentials(spec.credentials)
    if spec.training.deterministic:
        fix_kernels()
    # On CPU, ranks of one machine share its cores and its memory.
    if request.device == "cpu":
        poll = _with_memory_bound(device.MallocTuning(), poll)
        torch.set_num_threads(spec.resources.num_threads)
    # Includes waiting for the slowest rank.
    started = time.monotonic()
    start_timeout = timedelta(seconds=spec.network.start_timeout_s)
    if request.preflight is not None:
        torch_device = device.select(request.device, request.device_index)
        test = SpeedTest(torch_device, DTYPES[spec.training.precision])
        if not run_preflight(request, test, report, poll, start_timeout):
            return "stopped"
    if spec.preflight.mode == "only":
        return "finished"
    with process_group(request, start_timeout) as store:
        mesh = _create_mesh(request, spec, start_timeout)
        poll = _with_timeout_after_start(mesh, spec.network, poll)
        report(PhaseReport("rendezvous", time.monotonic() - started))
        place = Place(mesh, own_address, report, poll)
        with (
            attempt_copies(peers, request, store, mesh, report) as copies,
            joined_jobs(spec, place) as jobs,
        ):
            session = TrainingSession(
                _leaving_out(spec, request.left_out),
                mesh,
                data,
                report=report,
                poll=poll,
                attempt=request.attempt,
                resume_from=request.resume_from,
                copies=copies,
                peers=jobs,
            )
            return session.run(profiles, _recheck(request))


def _leaving_out(spec: JobSpec, steps: Sequence[int]) -> JobSpec:
    """Returns the spec with more steps whose samples are left out."""
    if not steps:
        return spec
    skip_steps = tuple(sorted({*spec.training.skip_steps, *steps}))
    training = spec.training.model_copy(update={"skip_steps": skip_steps})
    return spec.model_copy(update={"training": training})


def _recheck(request: StartRequest) -> Recheck:
    order = request.recheck
    if order is None:
        return Recheck()
    return Recheck(True, order.step, order.rank, has_moved=order.has_moved)


def run_preflight(
    request: StartRequest,
    test: SpeedTest,
    report: ReportSink,
    poll: CommandSource,
    timeout: timedelta,
) -> bool:
    """Measures what the request orders, in a world of its own.

    Returns False after a connection that does not work, once the driver ends the attempt.
    """
    assert request.preflight is not None
    # torch names a group by its ranks. With one store, a later group of the same ranks would
    # read the addresses of the destroyed group, and wait for them until its timeout.
    with process_group(request, timeout, prefix="preflight-"):
        passed = Preflight(request.preflight, test, report).run()
        if not passed:
            await_stop(poll)
    return passed


def _create_mesh(request: StartRequest, spec: JobSpec, timeout: timedelta) -> ParallelMesh:
    env = request.env
    world = World(env.rank, env.world_size, request.device_index, request.device)
    dims = ParallelDims.of(spec.parallel)
    nccl = {}
    for axis, options in spec.network.nccl:
        nccl[axis] = NcclOptions(**options.model_dump())
    return ParallelMesh.create(dims, world, timeout, nccl)


def _with_timeout_after_start(
    mesh: ParallelMesh, network: NetworkConfig, poll: CommandSource
) -> CommandSource:
    """Returns a `poll` that ends the first step's longer timeout of collectives."""
    if network.start_timeout_s == network.collective_timeout_s:
        return poll
    num_polls = 0

    def poll_and_set() -> Command:
        nonlocal num_polls
        num_polls += 1
        # The loop polls once within each step.
        if num_polls == 2:
            mesh.set_timeout(timedelta(seconds=network.collective_timeout_s))
        return poll()

    return poll_and_set


def _with_memory_bound(tuning: device.MallocTuning, poll: CommandSource) -> CommandSource:
    """Returns a `poll` that also trims malloc's memory; the loop polls once per step."""

    def poll_and_bound() -> Command:
        tuning.trim_if_grown()
        return poll()

    return poll_and_bound


@contextmanager
def process_group(
    request: StartRequest, timeout: timedelta = _TIMEOUT, prefix: str = ""
) -> Iterator[Store]:
    """Initializes the attempt's default process group; yields the attempt's store.

    `prefix` distinguishes several groups of one attempt. Does nothing for one rank, and where
    the launcher has initialized it (Ray Train); the store is one of this process then.
    """
    env = request.env
    if env.world_size == 1 or dist.is_initialized():
        yield HashStore()
        return
    # Libraries below torch read torchrun's variables.
    env.export()
    # The store outlives an attempt. A separate prefix keeps an attempt from reading
    # rendezvous keys of the previous one.
    store = PrefixStore(f"{prefix}attempt-{request.attempt}", connect_store(request))
    dist.init_process_group(
        device.backend_for(torch.device(request.device)),
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
    )
    try:
        yield store
    finally:
        dist.destroy_process_group()


def connect_store(request: StartRequest) -> Store:
    """Returns the request's store, or the one that torchrun's environment names."""
    timeout = timedelta(seconds=request.timeout_s)
    if request.store is not None:
        host, port = request.store
        return connected_store(host, port, timeout)
    env = request.env
    if env.world_size == 1:
        return HashStore()
    # The address of the store is read from the environment, which not every launcher sets.
    env.export()
    return environment_store(env.rank, env.world_size, timeout)

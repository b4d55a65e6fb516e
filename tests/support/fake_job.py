"""A training loop of ten lines behind the real driver and workers: gloo all-reduce per
step, checkpoints, planned accidents.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from megatron_ray.checkpoint.directory import checkpoint_path
from megatron_ray.commands import Command
from megatron_ray.reports import CheckpointReport, Report, StepReport
from workers.driver.driver import JobDriver
from workers.protocol.job import JobSpec
from workers.rank.attempt import Train
from workers.rank.messages import StartRequest
from workers.ray.rank_worker import RankWorker


def fake_train(
    order: StartRequest,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
    _: object = None,
) -> str:
    # Here, so that the driver's process, which has this module too, need not import torch.
    import torch
    import torch.distributed as dist

    from megatron_ray.distributed import collectives
    from workers.rank.session import process_group

    spec = JobSpec.from_mapping(order.spec)
    plan = spec.metadata
    rank = order.env.rank
    step = (
        int(order.resume_from.rpartition("step-")[2].split("-")[0])
        if order.resume_from
        else 0
    )
    with process_group(order):
        while step < spec.training.num_steps:
            step += 1
            time.sleep(float(plan.get("step_s", "0.02")))
            accident(plan, order, rank, step)
            values = torch.tensor([float(poll()), float(rank + step)])
            if order.env.world_size > 1:
                collectives.all_reduce(values, dist.group.WORLD, dist.ReduceOp.MAX)
            command = Command(int(values[0]))
            report(StepReport(step, 10.0 / step, 1.0, 0.1, 64, step, 0.02, 100.0, 0.0, 0))
            every = spec.checkpoint.every_steps
            saves = command in (Command.CHECKPOINT, Command.CHECKPOINT_AND_STOP)
            if saves or step == spec.training.num_steps or (every and step % every == 0):
                save(spec, order, step, report)
            if command >= Command.STOP:
                return "stopped"
    return "finished"


def accident(plan: dict[str, str], order: StartRequest, rank: int, step: int) -> None:
    if (plan.get("fail_rank"), plan.get("fail_step")) == (
        str(rank),
        str(step),
    ) and order.attempt <= int(plan.get("fail_attempts", "1")):
        if plan.get("fail_kind") == "exit":
            os.abort()
        if plan.get("fail_kind") == "block":
            read_block()
        raise LookupError(f"planned accident at step {step}")


def read_block() -> None:
    """Stands for code that does not return, such as a read of a storage that is gone."""
    time.sleep(600)


def save(
    spec: JobSpec, order: StartRequest, step: int, report: Callable[[Report], None]
) -> None:
    assert spec.storage is not None
    folder = Path(checkpoint_path(spec.storage.path, step, order.attempt))
    folder.mkdir(parents=True, exist_ok=True)
    if order.env.rank == 0:
        files = {f"rank-{rank}": 100 for rank in range(order.env.world_size)}
        (folder / "index.json").write_text(json.dumps({"files": files}))
    (folder / f"rank-{order.env.rank}").write_text("x" * 100)
    report(CheckpointReport(step, str(folder), 100, 0.01))


class FakeWorker(RankWorker):
    train: ClassVar[Train] = staticmethod(fake_train)


def write_gpus(
    order: StartRequest,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
    _: object = None,
) -> str:
    """Writes which GPUs this process would see."""
    Path(order.spec["path"]).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))
    return "finished"


class GpuTeller(RankWorker):
    train: ClassVar[Train] = staticmethod(write_gpus)


class LateWorker(FakeWorker):
    """The second of them comes up late."""

    def __init__(self, job_id: str, slot: int, *rest: Any) -> None:
        time.sleep(3.0 * slot)
        super().__init__(job_id, slot, *rest)


class FakeDriver(JobDriver):
    worker_class: ClassVar[type] = FakeWorker

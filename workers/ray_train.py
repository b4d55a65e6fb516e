"""Runs a job under Ray Train's TorchTrainer, for teams that have their own Ray scripts.

Owns: the trainer's configs, and what Ray Train learns of a run. Must not know: HTTP.

The spec, the loop and the checkpoints are those of the other launchers. Ray Train places
and restarts the ranks. It gets one report per checkpoint and none per step, because a
report takes two seconds and is a barrier of all ranks.
"""

import contextlib
import math
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import torch.distributed as dist
import typer
from ray.train import RunConfig, ScalingConfig, get_context, report
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from megatron_ray.distributed import device
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.reports import (
    CheckpointFailedReport,
    CheckpointReport,
    Report,
    StepReport,
)
from megatron_ray.validation import resolution
from workers.announcements import RefusedError
from workers.decisions.placement import resolve_accelerator, resources_per_rank
from workers.decisions.topology.node_rules import NodeRules, label_selector, type_resources
from workers.decisions.topology.room import Demand, FreeNode, Shape, max_islands
from workers.job_file import parse_spec, resolve_spec
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo
from workers.rank.environment import (
    RankEnv,
    interface_variables,
    prepare_ray_client,
    raise_priority,
)
from workers.rank.messages import UserError
from workers.ray.nodes import read_nodes
from workers.run_start import Notify, new_run_id
from workers.standalone import (
    EXIT_FAILED,
    EXIT_USER_ERROR,
    Ending,
    RankRun,
    TrainingFailedError,
    discard,
    start_request,
)

_PERMANENT = (ErrorKind.USER, ErrorKind.NUMERICS, ErrorKind.RULE, ErrorKind.DISK_FULL)


@dataclass(frozen=True)
class RayTrainOptions:
    """What a run under Ray Train needs beside its spec."""

    num_workers: int | None = None
    """Number of ranks; None: as many as `parallel.dp` gives, and for `auto` as many as the
    cluster has room for."""
    resume: bool = False
    """Resume from the newest committed checkpoint under storage.path."""
    reports: Path | None = None
    """File for rank 0's step reports, on its node."""


def train(spec: JobSpec, options: RayTrainOptions | None = None) -> Ending:
    """Trains a job with Ray Train and returns how it ended.

    Raises UserError when the run cannot start, and TrainingFailedError when it fails.
    """
    try:
        result = build_trainer(spec, options).fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingFailedError(str(error), EXIT_FAILED, ErrorKind.INTERNAL) from error
    return ending_of(result)


def build_trainer(spec: JobSpec, options: RayTrainOptions | None = None) -> TorchTrainer:
    """Returns the trainer of a run; its `fit()` is the whole run.

    Connects to Ray if the caller has not. `ending_of` reads its result. Raises UserError
    when the spec cannot run.
    """
    options = options or RayTrainOptions()
    if not ray.is_initialized():
        prepare_ray_client()
        ray.init()
    nodes = read_nodes()
    max_world = options.num_workers or _largest_world(spec, nodes)
    spec = resolve_spec(spec, max_world, spec.name)
    world_size = resolution.world_size(spec)
    if options.num_workers not in (None, world_size):
        raise UserError(
            f"the layout needs a world size of {world_size}, but num_workers is "
            f"{options.num_workers}; leave it out, or change parallel"
        )
    run_id = new_run_id()
    reports = None
    if options.reports is not None:
        reports = str(options.reports.absolute())
    config = {
        "spec": spec.model_dump(mode="json"),
        "run_id": run_id,
        "resume": options.resume,
        "reports": reports,
        "folder": str(Path.cwd()),
    }
    # Ray Train declares the types of its first version; it runs the second one.
    loop: Any = train_loop
    scaling = scaling_config(spec, nodes)
    device_type = "cuda" if scaling.use_gpu else "cpu"
    return TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(
            backend=device.backend_for(torch.device(device_type)),
            timeout_s=math.ceil(spec.network.start_timeout_s),
        ),
        scaling_config=scaling,
        run_config=_run_config(spec, run_id),
    )


def _run_config(spec: JobSpec, run_id: str) -> RunConfig:
    assert spec.storage is not None
    untyped_train: Any = ray.train
    # Ray Train opens connections before the ranks read the spec.
    variables = {}
    if spec.network.interface is not None:
        variables = interface_variables(spec.network.interface)
    config: RunConfig = untyped_train.RunConfig(
        name=run_id,
        storage_path=f"{spec.storage.path.rstrip('/')}/ray-train",
        failure_config=untyped_train.FailureConfig(
            max_failures=spec.restart.max_failures,
            max_preemption_failures=spec.restart.max_preemptions,
        ),
        worker_runtime_env={"env_vars": variables},
    )
    return config


def scaling_config(spec: JobSpec, nodes: Sequence[NodeInfo]) -> ScalingConfig:
    """Returns the workers that a resolved spec needs, on the nodes that it may use."""
    rules = NodeRules.of(spec)
    living = [node for node in nodes if node.alive]
    usable = [node for node in living if rules.allows(node)]
    uses_gpu = resolve_accelerator(spec, usable) == "gpu"
    world_size = resolution.world_size(spec)
    # PACK may split a tensor-parallel group over two nodes. A single group is kept on one
    # node here; several are checked by the ranks.
    strategy = "PACK"
    if world_size == spec.parallel.tp:
        strategy = "STRICT_PACK"
    untyped_train: Any = ray.train
    config: ScalingConfig = untyped_train.ScalingConfig(
        num_workers=world_size,
        use_gpu=uses_gpu,
        resources_per_worker={
            **resources_per_rank(spec, gpu=uses_gpu),
            **type_resources(usable, rules),
        },
        placement_strategy=strategy,
        label_selector=label_selector(living, rules) or None,
    )
    return config


def ending_of(result: Any) -> Ending:
    """Returns how a run has ended; `result` is what the trainer's `fit` returns.

    Raises UserError when it could not start, and TrainingFailedError when it has failed.
    """
    # Rank 0 returns it.
    value = result.return_value
    error = value["error"]
    if error is not None and value["exit_code"] == EXIT_USER_ERROR:
        raise UserError(error)
    if error is not None:
        raise TrainingFailedError(error, value["exit_code"], ErrorKind(value["kind"]))
    return Ending(value["message"], value["exit_code"])


def _largest_world(spec: JobSpec, nodes: Sequence[NodeInfo]) -> int:
    """Returns the world size of the layout, or for dp `auto` what the nodes have room for."""
    # Ray Train waits for nodes that the cluster may still get.
    if spec.parallel.dp != "auto":
        return resolution.world_size(spec)
    rules = NodeRules.of(spec)
    usable = [node for node in nodes if rules.allows(node)]
    uses_gpu = resolve_accelerator(spec, usable) == "gpu"
    tp = spec.parallel.tp
    demand = Demand(resources_per_rank(spec, gpu=uses_gpu), tp, rules)
    empty = [FreeNode.empty(node) for node in usable]
    return max(1, tp * max_islands(empty, demand, Shape(tp)))


# ---- on the ranks


def train_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one rank: the `train_loop_per_worker` of the trainer.

    Returns the outcome, also that of a run which a restart would only repeat; raises any
    other error, after which Ray Train restarts the ranks.
    """
    raise_priority()
    spec = JobSpec.from_mapping(config["spec"])
    env = _rank_env()
    reports = None
    if config["reports"] is not None:
        reports = Path(config["reports"])
    own_device = get_device()
    index = own_device.index or 0
    request = start_request(env, spec, own_device.type, index)
    notify: Notify = _print_line
    if env.rank:
        notify = discard
    with contextlib.ExitStack() as stack:
        # Ray Train changes to a folder of its own; a spec's paths are relative to the
        # caller's, on nodes that have it.
        if Path(config["folder"]).is_dir():
            stack.enter_context(contextlib.chdir(config["folder"]))
        progress = stack.enter_context(_CheckpointReports())
        run = RankRun(request, spec, notify, config["run_id"], progress.add)
        try:
            _require_whole_groups(env, spec.parallel.tp, own_device)
            ending = run.run(reports, resume=config["resume"])
        except RefusedError as error:
            cause = error.__cause__
            # Storage that does not answer may do so after a restart.
            if (
                isinstance(cause, MegatronRayError)
                and cause.failure_kind is ErrorKind.STORAGE
            ):
                raise
            return _outcome(EXIT_USER_ERROR, error=str(error))
        except TrainingFailedError as error:
            # Every rank raises it at the same step.
            if error.kind not in (ErrorKind.NUMERICS, ErrorKind.RULE):
                raise
            message = str(error) or run.first_error()
            return _outcome(error.exit_code, error=message, kind=error.kind)
    return _outcome(ending.exit_code, message=ending.message)


def _rank_env() -> RankEnv:
    context = get_context()
    return RankEnv(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
    )


def _require_whole_groups(env: RankEnv, tp: int, on: torch.device) -> None:
    """Raises RefusedError on every rank when a tensor-parallel group spans nodes."""
    split = first_split_group(env, tp)
    if env.world_size > 1:
        # The smallest number of a rank, where "none" is the world size.
        first = torch.tensor([env.world_size if split is None else split], device=on)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        split = int(first.item())
    if split is None or split == env.world_size:
        return
    raise RefusedError(
        f"/parallel/tp: Ray Train has placed ranks {split} to {split + tp - 1}, which are one "
        "tensor-parallel group, on more than one node; free whole nodes, or submit the job "
        "to the service, which places a group on one node"
    )


def first_split_group(env: RankEnv, tp: int) -> int | None:
    """Returns the first rank of this rank's group if it is not all on this node.

    The ranks of a node are consecutive, and so are those of a tensor-parallel group.
    """
    first_of_group = env.rank - env.rank % tp
    first_of_node = env.rank - env.local_rank
    end_of_node = first_of_node + env.local_world_size
    if first_of_node <= first_of_group and first_of_group + tp <= end_of_node:
        return None
    return first_of_group


class _CheckpointReports:
    """Reports each checkpoint to Ray Train, in a thread of its own.

    Every rank reports the same checkpoints in the same order.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}
        self._last_step = 0
        """Of the last checkpoint that was reported, written or not."""
        self._items: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)

    def __enter__(self) -> "_CheckpointReports":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._items.put(None)
        # After an error the other ranks may not arrive at the barrier any more.
        if kind is None:
            self._thread.join()

    def add(self, item: Report) -> None:
        """Takes a report of this rank; never blocks."""
        if isinstance(item, StepReport):
            self._metrics = {"step": item.step, "loss": item.loss}
        # Once each, also when a part that has failed is written after all: every rank has
        # to report it.
        elif isinstance(item, CheckpointReport | CheckpointFailedReport):
            if item.step > self._last_step:
                self._last_step = item.step
                self._items.put({**self._metrics, "checkpoint_step": item.step})

    def _run(self) -> None:
        while True:
            metrics = self._items.get()
            if metrics is None:
                return
            report(metrics)


def _outcome(
    exit_code: int,
    *,
    message: str | None = None,
    error: str | None = None,
    kind: ErrorKind = ErrorKind.USER,
) -> dict[str, Any]:
    return {
        "exit_code": exit_code,
        "message": message,
        "error": error,
        "kind": kind.value,
    }


def _print_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# ---- the command line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    job: Annotated[Path, typer.Argument(help="Job spec, YAML or JSON.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override of the spec, path.to.field=value; may be repeated."
        ),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(help="File for rank 0's step reports, on the node of rank 0."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Resume from the newest committed checkpoint under storage.path."
        ),
    ] = False,
    num_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ranks; default: as the layout needs."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Address of the Ray cluster; default: a local one is started."),
    ] = None,
) -> None:
    """Train a job with Ray Train's TorchTrainer, without a service.

    Exit codes: 0 when trained, 1 when training failed, 2 for an error in the job, its files
    or the options, 75 when ended at training.max_duration_s or training.exit_every_steps.
    """
    try:
        ending = _run(
            job, set_ or (), RayTrainOptions(num_workers, resume, reports), address
        )
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_USER_ERROR) from None
    except TrainingFailedError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(ending.message)
    raise typer.Exit(ending.exit_code)


def _run(
    job: Path, overrides: Sequence[str], options: RayTrainOptions, address: str | None
) -> Ending:
    spec = parse_spec(job, overrides)
    prepare_ray_client()
    ray.init(address=address)
    return train(spec, options)


if __name__ == "__main__":
    # By its name, so that Ray finds the loop in the module and not in `__main__`.
    from workers import ray_train

    ray_train.app(prog_name="python -m workers.ray_train")

"""What Ray Train is asked for, and what it learns of a run; without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ray.exceptions import ErrorKind
from megatron_ray.reports import CheckpointReport, StepReport
from tests.support.standalone_job import write_job
from workers import ray_train
from workers.job_file import parse_spec
from workers.protocol.wire import NodeInfo
from workers.rank.environment import RankEnv
from workers.rank.messages import UserError
from workers.ray_train import (
    RayTrainOptions,
    build_trainer,
    ending_of,
    first_split_group,
)
from workers.standalone import Ending, TrainingFailedError

TWO = ("parallel.tp=2", "resources.accelerator=cpu", "resources.cpus_per_rank=2")
GROUPS = "training.global_batch_size=10"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[NodeInfo]:
    """The nodes of the cluster; a job is in the current folder."""
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    nodes = [NodeInfo(node_id="n1", address="10.0.0.1", cpus=8)]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(ray_train, "read_nodes", lambda: nodes)
    return nodes


def trainer(*overrides: str, **options: Any) -> Any:
    spec = parse_spec(Path("job.yaml"), overrides)
    return build_trainer(spec, RayTrainOptions(**options))


@pytest.mark.parametrize(
    ("overrides", "num_workers", "strategy"),
    [
        (TWO, 4, "PACK"),
        ((*TWO, "parallel.dp=1"), 2, "STRICT_PACK"),
        ((*TWO, "parallel.dp=8", "training.global_batch_size=8"), 16, "PACK"),
    ],
)
def test_workers_are_as_many_as_the_layout_has_ranks_and_fit(
    cluster: list[NodeInfo],
    overrides: tuple[str, ...],
    num_workers: int,
    strategy: str,
) -> None:
    scaling = trainer(*overrides).scaling_config
    assert scaling.num_workers == num_workers
    assert scaling.placement_strategy == strategy
    assert scaling.resources_per_worker == {"CPU": 2.0}
    assert not scaling.use_gpu


def test_gpus_are_used_where_the_cluster_has_some(cluster: list[NodeInfo]) -> None:
    cluster[0] = NodeInfo(node_id="n1", address="10.0.0.1", cpus=8, gpus=2)
    made = trainer("restart.max_failures=7")
    assert made.scaling_config.num_workers == 2
    assert made.scaling_config.resources_per_worker == {"CPU": 1.0, "GPU": 1.0}
    assert made.backend_config.backend == "cpu:gloo,cuda:nccl"
    assert made.run_config.failure_config.max_failures == 7
    assert made.run_config.storage_path == f"{Path.cwd()}/runs/job/ray-train"


def test_nodes_resources_and_interface_are_those_of_the_spec(
    cluster: list[NodeInfo],
) -> None:
    cluster.append(NodeInfo(node_id="n2", address="10.0.0.2", cpus=3))
    made = trainer(
        "parallel.tp=2",
        "parallel.dp=1",
        "resources.accelerator=cpu",
        "resources.custom={rdma: 0.5}",
        "network.interface=eth1",
        "network.first_step_timeout_s=1800",
    )
    scaling = made.scaling_config
    assert scaling.num_workers == 2
    assert scaling.resources_per_worker == {"CPU": 1.0, "rdma": 0.5}
    assert scaling.label_selector is None
    variables = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
    assert made.run_config.worker_runtime_env == {"env_vars": variables}
    assert made.backend_config.timeout_s == 1800
    # Four groups on the first node, one on the second; a third rank of it has no partner.
    assert trainer("parallel.tp=2", GROUPS).scaling_config.num_workers == 10
    made = trainer("parallel.tp=2", GROUPS, "resources.nodes.exclude=[10.0.0.1]")
    assert made.scaling_config.num_workers == 2
    assert made.scaling_config.label_selector == {"ray.io/node-id": "!in(n1)"}


def test_a_layout_that_does_not_fit_the_workers_is_refused(
    cluster: list[NodeInfo],
) -> None:
    with pytest.raises(UserError, match="needs a world size of 2, but num_workers is 3"):
        trainer(*TWO, num_workers=3)
    with pytest.raises(UserError, match=r"job cannot run:\n  /parallel/tp: tp=3 does not"):
        trainer("parallel.tp=3", num_workers=3)


@pytest.mark.parametrize(
    ("rank", "local_rank", "local_world_size", "tp", "first"),
    [
        (5, 1, 4, 2, None),
        (5, 1, 4, 4, None),
        (5, 0, 3, 2, 4),  # ranks 5 to 7 are here, and rank 4 is not
        (4, 4, 5, 2, 4),  # ranks 0 to 4 are here, and rank 5 is not
        (3, 0, 1, 1, None),
        (0, 0, 4, 8, 0),
    ],
)
def test_a_group_that_spans_nodes_is_found_by_its_ranks(
    rank: int, local_rank: int, local_world_size: int, tp: int, first: int | None
) -> None:
    env = RankEnv(rank, 8, local_rank, local_world_size)
    assert first_split_group(env, tp) == first


def result(**value: Any) -> Any:
    outcome = {"exit_code": 0, "message": None, "error": None, "kind": "user"}
    return SimpleNamespace(return_value=outcome | value)


def test_an_outcome_is_an_ending_or_the_error_that_a_restart_would_repeat() -> None:
    ended = ending_of(result(message="finished", exit_code=75))
    assert ended == Ending("finished", 75)
    with pytest.raises(UserError, match="no such file"):
        ending_of(result(error="no such file", exit_code=2))
    with pytest.raises(TrainingFailedError, match="the loss is nan") as caught:
        ending_of(result(error="the loss is nan", exit_code=1, kind="numerics"))
    assert caught.value.kind is ErrorKind.NUMERICS


def test_ray_train_gets_a_report_per_checkpoint_and_none_per_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reported: list[dict[str, float]] = []
    monkeypatch.setattr(ray_train, "report", reported.append)
    with ray_train._CheckpointReports() as reports:
        for step in (1, 2, 3, 4):
            reports.add(StepReport(step, 1 / step, 1.0, 0.1, 8, 2, 0.1, 80.0, 0.0, 1))
            if step % 2 == 0:
                reports.add(CheckpointReport(step, "/c", 1, 0.1))
    assert reported == [
        {"step": 2, "loss": 0.5, "checkpoint_step": 2},
        {"step": 4, "loss": 0.25, "checkpoint_step": 4},
    ]

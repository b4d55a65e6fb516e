"""Two ranks: a slow one's wait shows at the other, and both record the same steps."""

import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import ProfileReport, Report, StepReport
from megatron_ray.training.session import TrainingSession

pytestmark = pytest.mark.parallel
SLOW_S = 0.1


def train(rank: int, world_size: int, config: TrainConfig, data: PreparedData) -> Any:
    """The reports of a run in which rank 1 is slow in reading its data."""
    reports: list[Report] = []
    dims = ParallelDims.of(config.parallel)
    mesh = ParallelMesh.create(dims, World(rank, world_size, rank, "cpu"))
    session = TrainingSession(config, mesh, data, report=reports.append)
    loader = session._components.loader
    read = loader.step

    def slow(consumed_samples: int) -> Any:
        if rank == 1:
            time.sleep(SLOW_S)
        return read(consumed_samples)

    loader.step = slow  # type: ignore[method-assign]
    session.run()
    steps = [report for report in reports if isinstance(report, StepReport)]
    (profile,) = [report for report in reports if isinstance(report, ProfileReport)]
    return steps, profile


@pytest.mark.parametrize("layout", [{"dp": 2}, {"dp": 1, "pp": 2}])
def test_a_slow_rank_shows_in_its_own_part_and_as_communication_of_the_other(
    tmp_path: Path, run_ranks: Callable[..., list[Any]], layout: dict[str, int]
) -> None:
    (tmp_path / "corpus.txt").write_text("a line of text\n" * 60)
    config = TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "max_sequence_length": 16,
            },
            "parallel": layout,
            "data": {
                "train": [{"path": str(tmp_path / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(tmp_path / "cache"),
            },
            "training": {
                "seq_length": 16,
                "global_batch_size": 4,
                "steps": 4,
                "profile": {"steps": "2-3", "ranks": [0, 1]},
            },
            "optimizer": {"lr": 1e-2},
            "storage": {"path": str(tmp_path / "run")},
        }
    )
    data = prepare(config.data, str(tmp_path / "cache"), seq_length=16)
    by_rank = run_ranks(train, 2, config, data)
    for steps, _ in by_rank:
        for step in steps:
            assert sum(step.split_s.values()) == pytest.approx(step.step_s, rel=1e-6)
            assert min(step.split_s.values()) >= 0
    # The first step also connects, and in the steps of a profile its files are written.
    (fast, _), (slow, _) = by_rank
    assert slow[1].split_s["data"] >= 0.9 * SLOW_S
    assert fast[1].split_s["data"] < 0.5 * SLOW_S
    assert fast[1].split_s["communication"] >= 0.5 * SLOW_S
    for rank, (_, profile) in enumerate(by_rank):
        assert profile.problem is None
        assert profile.files[0] == f"rank-{rank:05d}.trace.json.gz"
        assert steps_of(Path(profile.folder, profile.files[0])) == [2, 3]
    assert by_rank[0][1].folder == by_rank[1][1].folder


def steps_of(path: Path) -> list[int]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = []
    for event in events:
        match = re.fullmatch(r"step (\d+)", str(event.get("name")))
        if match and event.get("cat") == "user_annotation":
            steps.append(int(match[1]))
    return sorted(steps)

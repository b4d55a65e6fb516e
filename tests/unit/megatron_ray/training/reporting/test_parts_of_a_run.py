"""What is slow in a run shows in its part of the reported steps."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import STEP_PARTS, Report, StepReport
from megatron_ray.training.session import TrainingSession

SLOW_S = 0.05


def slowed(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW_S)
        return call(*arguments, **options)

    return slow


@pytest.fixture(scope="module")
def session_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainingSession]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "corpus.txt").write_text("a line of text\n" * 60)
    config = TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "max_sequence_length": 16,
            },
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(folder / "cache"),
            },
            "training": {"seq_length": 16, "global_batch_size": 2, "steps": 3},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"every_steps": 1},
            "storage": {"path": str(folder / "run")},
        }
    )
    data = prepare(config.data, str(folder / "cache"), seq_length=16)

    def make(report: Callable[[Report], None]) -> TrainingSession:
        return TrainingSession(config, ParallelMesh.single(), data, report=report)

    return make


@pytest.mark.parametrize("part", ["data", "optimizer", "checkpoint", "other"])
def test_what_is_slow_shows_in_its_part_and_all_add_up(
    session_in: Callable[..., TrainingSession], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[StepReport] = []

    def report(item: Report) -> None:
        if isinstance(item, StepReport):
            steps.append(item)
            if part == "other":
                time.sleep(SLOW_S)

    session = session_in(report)
    components = session._components
    slow = {
        "data": (components.loader, "step"),
        "optimizer": (components.optimizer, "step"),
        "checkpoint": (components.saver, "save"),
    }
    if part in slow:
        owner, name = slow[part]
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name)))
    session.run()
    assert [step.step for step in steps] == [1, 2, 3]
    for step in steps:
        assert list(step.split_s) == list(STEP_PARTS)
        assert sum(step.split_s.values()) == pytest.approx(step.step_s, rel=1e-6)
        assert min(step.split_s.values()) >= 0
        assert step.split_s["communication"] == 0
    # What follows a step counts for the next one.
    for step in steps[1:]:
        assert step.split_s[part] >= 0.9 * SLOW_S

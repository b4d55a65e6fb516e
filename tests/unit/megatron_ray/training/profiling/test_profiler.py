"""Steps of a run recorded on request: which ones, their files, what stays as it is."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.commands import ProfileRequest
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import ProfileReport, Report, StepReport
from megatron_ray.training.session import TrainingSession

STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus.txt").write_text("a line of text that is not very long\n" * 60)
    return folder


def config_of(corpus: Path, folder: Path, profile: Any = None) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "max_sequence_length": 16,
            },
            "data": {
                "train": [{"path": str(corpus / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(corpus / "cache"),
            },
            "training": {
                "seq_length": 16,
                "global_batch_size": 2,
                "steps": STEPS,
                "profile": profile,
            },
            "optimizer": {"lr": 1e-2},
            "storage": {"path": str(folder)},
        }
    )


def prepared(config: TrainConfig, corpus: Path) -> PreparedData:
    return prepare(config.data, str(corpus / "cache"), seq_length=16)


class Requests:
    """Requests by the number of times that the loop has asked for them."""

    def __init__(self, by_call: dict[int, ProfileRequest]) -> None:
        self._by_call = by_call
        self._calls = 0
        self._newest: ProfileRequest | None = None

    def __call__(self) -> ProfileRequest | None:
        self._calls += 1
        self._newest = self._by_call.get(self._calls, self._newest)
        return self._newest


def run(
    corpus: Path,
    folder: Path,
    profile: Any = None,
    requests: dict[int, ProfileRequest] | None = None,
) -> tuple[list[ProfileReport], list[float]]:
    """Trains; returns the reports of profiles, and the losses."""
    config = config_of(corpus, folder, profile)
    reports: list[Report] = []
    session = TrainingSession(
        config, ParallelMesh.single(), prepared(config, corpus), report=reports.append
    )
    session.run(Requests(requests or {}))
    profiles = [item for item in reports if isinstance(item, ProfileReport)]
    return profiles, [item.loss for item in reports if isinstance(item, StepReport)]


def trace_of(report: ProfileReport) -> list[dict[str, Any]]:
    path = Path(report.folder, report.files[0])
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def steps_in(events: list[dict[str, Any]]) -> Iterator[int]:
    for event in events:
        match = re.fullmatch(r"step (\d+)", str(event.get("name")))
        if match and event.get("cat") == "user_annotation":
            yield int(match[1])


def test_the_steps_of_the_spec_are_in_the_trace_and_no_others(
    corpus: Path, tmp_path: Path
) -> None:
    (report,), losses = run(corpus, tmp_path, {"steps": "3-4"})
    assert report.problem is None
    assert report.folder == f"{tmp_path}/profiles/steps-00000003-00000004-a0001"
    assert report.files == ("rank-00000.trace.json.gz", "rank-00000.memory.json")
    assert sorted(path.name for path in Path(report.folder).iterdir()) == sorted(
        report.files
    )
    events = trace_of(report)
    assert sorted(steps_in(events)) == [3, 4]
    # The work of two steps: each has one product of the output layer forward.
    spans = [event for event in events if event.get("ph") == "X"]
    first = min(event["ts"] for event in spans if event["name"] == "step 3")
    last = max(event["ts"] + event["dur"] for event in spans if event["name"] == "step 4")
    operators = [event for event in spans if event.get("cat") == "cpu_op"]
    assert operators
    for event in operators:
        assert first <= event["ts"] <= last
    # Recording changes no number.
    _, plain = run(corpus, tmp_path / "plain")
    assert losses == plain


def test_the_report_lists_the_most_expensive_operators_and_the_memory(
    corpus: Path, tmp_path: Path
) -> None:
    (report,), _ = run(corpus, tmp_path, {"steps": 2})
    assert report.sentence() == f"wrote a profile of step 2 on rank 0 to {report.folder}"
    assert len(report.operators) == 10
    times = [row["seconds"] for row in report.operators]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(row["share"] for row in report.operators) <= 1.0
    assert all(row["calls"] > 0 for row in report.operators)
    names = {row["name"] for row in report.operators}
    assert any("mm" in name or "linear" in name for name in names)
    assert not any(name.startswith("step ") for name in names)
    assert report.seconds >= times[0]
    memory = json.loads(Path(report.folder, report.files[1]).read_text())
    assert memory["peak_resident_bytes"] >= memory["resident_bytes"] > 1 << 20
    allocated = [row["allocated_bytes"] for row in memory["operators"]]
    assert allocated == sorted(allocated, reverse=True)
    assert allocated[0] > 0


def test_a_running_job_is_profiled_on_request_one_after_another(
    corpus: Path, tmp_path: Path
) -> None:
    first = ProfileRequest(3, 3, number=1)
    again = ProfileRequest(3, 3, number=1)  # from a driver that has restarted
    second = ProfileRequest(5, 6, number=2)
    requests = {2: first, 3: again, 4: second}
    reports, _ = run(corpus, tmp_path, requests=requests)
    assert [(report.number, report.problem) for report in reports] == [(1, None), (2, None)]
    assert [sorted(steps_in(trace_of(report))) for report in reports] == [[3], [5, 6]]


def test_a_request_that_cannot_be_carried_out_is_refused_and_the_run_goes_on(
    corpus: Path, tmp_path: Path
) -> None:
    requests = {
        2: ProfileRequest(4, 5, number=1),
        3: ProfileRequest(6, 6, number=2),  # while the first one waits
        6: ProfileRequest(2, 6, number=3),  # past
    }
    reports, losses = run(corpus, tmp_path, requests=requests)
    assert len(losses) == STEPS
    problems = {report.number: report.problem for report in reports}
    assert problems == {
        1: None,
        2: "a profile of steps 4-5 is not written yet",
        3: "it came too late: step 6 begins",
    }


def test_steps_behind_the_end_of_a_run_are_reported(corpus: Path, tmp_path: Path) -> None:
    requests = {1: ProfileRequest(6, 9, number=1)}
    (report,), losses = run(corpus, tmp_path, requests=requests)
    assert len(losses) == STEPS
    assert report.problem == "the run has ended after step 6"
    assert report.sentence() == (
        "no profile of steps 6-9 on rank 0: the run has ended after step 6"
    )


def test_a_place_that_cannot_be_written_costs_the_profile_only(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "profiles").write_text("a file in the way")
    (report,), losses = run(corpus, tmp_path, {"steps": 2})
    assert len(losses) == STEPS
    assert report.problem is not None
    assert report.problem.startswith("its files cannot be written: ")
    assert "profiles" in report.problem


def test_other_ranks_and_steps_before_a_resume_are_not_profiled(
    corpus: Path, tmp_path: Path
) -> None:
    reports, _ = run(corpus, tmp_path, {"steps": 2, "ranks": [1]})
    assert reports == []

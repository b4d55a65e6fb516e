"""The gauges of a job, and the board that shows them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from workers.driver import gauges
from workers.driver.gauges import GAUGES, TrainingGauges, gauge_values

ROOT = Path(__file__).parents[4]
STEP = {"step": 7, "loss": math.inf, "mfu": 0.4, "split_s": {"data": 0.1, "reduce": 0.2}}


class FakeGauge:
    """Keeps what is set."""

    made: list["FakeGauge"]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name
        self.values: list[tuple[float, dict[str, str]]] = []
        self.made.append(self)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, {**self.tags, **tags}))


def test_every_gauge_has_a_finite_value_or_none_and_labels_from_a_closed_set() -> None:
    values = list(gauge_values(STEP, 2, None))
    assert values == [
        ("step", 7.0, {}),
        ("mfu", 0.4, {}),
        ("attempt", 2.0, {}),
        ("split_s", 0.1, {"part": "data"}),
        ("split_s", 0.2, {"part": "reduce"}),
    ]


def test_gauges_are_set_once_a_second_whatever_the_number_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeGauge.made = []
    monkeypatch.setattr(gauges, "Gauge", FakeGauge)
    times = iter([0.0, 0.5, 1.0])
    shown = TrainingGauges("job-a", lambda: next(times))
    for attempt in (1, 2, 3):
        shown.update(STEP, attempt, 0.5)
    labels = {"job_id": "job-a", "group": "trainer"}
    values = {gauge.name: gauge.values for gauge in FakeGauge.made}
    assert values["megatron_ray_attempt"] == [(1.0, labels), (3.0, labels)]
    assert values["megatron_ray_goodput"] == [(0.5, labels)] * 2


def board() -> dict[str, Any]:
    text = (ROOT / "deploy/grafana/megatron-ray.json").read_text()
    return dict(json.loads(text))


def test_the_board_shows_each_gauge_and_no_other() -> None:
    names = set()
    for panel in board()["panels"]:
        for target in panel["targets"]:
            series = re.findall(r"ray_(megatron_ray_\w+)\{([^}]*)\}", target["expr"])
            assert series, target["expr"]
            for name, labels in series:
                names.add(name)
                assert labels == 'job_id=~"$job_id", group=~"$group"'
    assert names == {spec.name for spec in GAUGES.values()}


def test_the_boards_variables_are_labels_of_the_gauges() -> None:
    variables = board()["templating"]["list"]
    assert [variable["name"] for variable in variables] == ["datasource", "job_id", "group"]
    for variable in variables[1:]:
        query = f"label_values(ray_megatron_ray_step, {variable['name']})"
        assert variable["definition"] == variable["query"]["query"] == query
        assert variable["name"] in GAUGES["step"].labels
    places = [panel["gridPos"] for panel in board()["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)

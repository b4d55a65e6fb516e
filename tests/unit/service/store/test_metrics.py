"""What a step reports is declared once; what repeats it for a reason repeats it all."""

import dataclasses

from megatron_ray.planning.memory import RankMemory
from megatron_ray.planning.step_time.estimate import StepTime
from megatron_ray.reports import StepReport
from service.api.plans.bodies import PlanMemory, PlanTime
from service.store.metrics import KEYS
from service.store.schema import MetricRow


def names_of(dataclass: type) -> list[str]:
    return [field.name for field in dataclasses.fields(dataclass)]


def test_the_table_has_a_column_for_every_field_of_a_step() -> None:
    columns = [column.name for column in MetricRow.__table__.columns]
    assert columns == ["job", "step", "attempt", "cursor", *KEYS]
    assert ["step", *KEYS] == names_of(StepReport)


def test_a_plan_shows_every_part_of_the_time_and_of_the_memory() -> None:
    assert set(PlanTime.model_fields) == set(names_of(StepTime))
    shown = {*names_of(RankMemory), "total_bytes_estimate", "vocab_size"}
    assert set(PlanMemory.model_fields) == shown

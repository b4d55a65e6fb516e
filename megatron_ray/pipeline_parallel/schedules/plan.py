"""From a config to its pipeline.

Owns: which schedule, which stages, who holds what. Pure; must not know: torch, groups.
"""

from dataclasses import dataclass

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.pipeline_parallel.schedules.actions import Op, Order, StageMap
from megatron_ray.pipeline_parallel.schedules.layout import (
    LayoutError,
    StageContents,
    parse_layout,
    split_into_stages,
)
from megatron_ray.pipeline_parallel.schedules.lowering import lower_one
from megatron_ray.pipeline_parallel.schedules.orders import (
    ScheduleName,
    compute_orders,
    stage_map,
)


@dataclass(frozen=True)
class PipelinePlan:
    """A config's stages and schedule."""

    schedule: ScheduleName
    stages: StageMap
    contents: tuple[StageContents, ...]
    """By stage."""

    def held(self, pp_rank: int) -> tuple[StageContents, ...]:
        """What a pipeline rank holds, by chunk."""
        return tuple(
            self.contents[self.stages.stage(pp_rank, chunk)]
            for chunk in range(self.stages.vpp)
        )

    def training_actions(self, num_microbatches: int, pp_rank: int) -> Order:
        """A rank's whole list for a step."""
        orders = compute_orders(
            self.schedule, self.stages.pp, num_microbatches, self.stages.vpp
        )
        return lower_one(orders, self.stages, pp_rank)

    def evaluation_actions(self, num_microbatches: int, pp_rank: int) -> Order:
        """A rank's whole list for forward passes only."""
        orders = compute_orders(
            self.schedule, self.stages.pp, num_microbatches, self.stages.vpp
        )
        forward = [
            [action for action in order if action.op is Op.FORWARD] for order in orders
        ]
        return lower_one(forward, self.stages, pp_rank)


def plan_pipeline(config: TrainConfig) -> PipelinePlan:
    """Raises LayoutError when the layers cannot be cut as asked, or the schedule cannot
    have so many chunks.
    """
    parallel = config.parallel
    num_layers = config.model.num_layers
    further = config.model.num_mtp_layers
    schedule: ScheduleName = (
        parallel.schedule
        if parallel.schedule != "auto"
        else ("interleaved" if parallel.vpp > 1 else "1f1b")
    )
    if schedule == "zb-v" and parallel.vpp != 2:
        raise LayoutError(
            f"schedule=zb-v has two chunks per rank, not vpp={parallel.vpp}; use vpp=2",
            field="schedule",
        )
    if schedule != "zb-v" and (schedule == "interleaved") != (parallel.vpp > 1):
        remedy = (
            "use schedule=interleaved, or leave it out"
            if parallel.vpp > 1
            else "raise vpp, or use 1f1b"
        )
        raise LayoutError(
            f"schedule={schedule} does not go with vpp={parallel.vpp} chunks per rank; {remedy}",
            field="schedule",
        )
    stages = stage_map(schedule, parallel.pp, parallel.vpp)
    if parallel.layout is None:
        first = parallel.first_stage_layers
        last = parallel.last_stage_layers
        contents = split_into_stages(
            num_layers, stages.num_stages, first=first, last=last, num_mtp_layers=further
        )
    else:
        contents = parse_layout(parallel.layout, num_layers, further)
        if contents[-1].mtp_layers != tuple(range(further)):
            raise LayoutError(
                f"layout {parallel.layout!r} has 'm' before the last stage; put all 'm' "
                "beside the loss, as in '|mL'"
            )
        if len(contents) != stages.num_stages:
            wanted = f"pp x vpp = {parallel.pp} x {parallel.vpp} needs {stages.num_stages}"
            raise LayoutError(
                f"layout {parallel.layout!r} has {len(contents)} stages, {wanted}"
            )
    return PipelinePlan(schedule, stages, contents)

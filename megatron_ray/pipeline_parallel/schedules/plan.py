"""Plans a config's pipeline: its stages, their ranks and the schedule.

Owns: the choice of schedule, stages and ranks. Pure; must not know: torch, groups.
"""

from dataclasses import dataclass, replace

from megatron_ray.config.parallelism import ParallelismConfig
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
    """The stages and the schedule of a config."""

    schedule: ScheduleName
    stages: StageMap
    contents: tuple[StageContents, ...]
    """Contents of each stage."""
    in_pairs: bool = False
    """Whether a forward pass is interleaved with a backward pass."""

    def stages_of(self, pp_rank: int) -> tuple[StageContents, ...]:
        """Returns the stages of a pipeline rank, by chunk."""
        stages = []
        for chunk in range(self.stages.vpp):
            stages.append(self.contents[self.stages.stage(pp_rank, chunk)])
        return tuple(stages)

    def training_actions(self, num_microbatches: int, pp_rank: int) -> Order:
        """Returns a rank's complete list for a step."""
        return lower_one(self.orders(num_microbatches), self.stages, pp_rank)

    def evaluation_actions(self, num_microbatches: int, pp_rank: int) -> Order:
        """Returns a rank's complete list for forward passes only."""
        # Messages depend on forward passes only, so these are lowered separately.
        forwards = []
        for order in replace(self, in_pairs=False).orders(num_microbatches):
            forwards.append([action for action in order if action.op is Op.FORWARD])
        return lower_one(forwards, self.stages, pp_rank)

    def orders(self, num_microbatches: int) -> list[Order]:
        """Returns the computing actions of every rank in a step."""
        return compute_orders(
            self.schedule,
            self.stages.pp,
            num_microbatches,
            self.stages.vpp,
            in_pairs=self.in_pairs,
        )


def plan_pipeline(config: TrainConfig) -> PipelinePlan:
    """Returns the pipeline of a config.

    Raises LayoutError when the layers cannot be split as configured, or the schedule
    does not support the number of chunks.
    """
    parallel = config.parallel
    schedule = _schedule(parallel)
    stages = stage_map(schedule, parallel.pp, parallel.vpp)
    num_layers = config.model.num_layers
    num_mtp_layers = config.model.num_mtp_layers
    if parallel.layout is None:
        contents = split_into_stages(
            num_layers,
            stages.num_stages,
            first=parallel.first_stage_layers,
            last=parallel.last_stage_layers,
            num_mtp_layers=num_mtp_layers,
        )
        return PipelinePlan(schedule, stages, contents, parallel.interleaves_passes)
    contents = parse_layout(parallel.layout, num_layers, num_mtp_layers)
    # These layers share head and loss with the last stage.
    if contents[-1].mtp_layers != tuple(range(num_mtp_layers)):
        raise LayoutError(
            f"layout {parallel.layout!r} has 'm' before the last stage; put all 'm' "
            "beside the loss, as in '|mL'"
        )
    if len(contents) != stages.num_stages:
        raise LayoutError(
            f"layout {parallel.layout!r} has {len(contents)} stages, pp x vpp = "
            f"{parallel.pp} x {parallel.vpp} needs {stages.num_stages}"
        )
    return PipelinePlan(schedule, stages, contents, parallel.interleaves_passes)


def _schedule(parallel: ParallelismConfig) -> ScheduleName:
    """Returns the configured schedule, or the default for `vpp` chunks.

    Raises LayoutError when the schedule does not support `vpp` chunks.
    """
    vpp = parallel.vpp
    if parallel.schedule == "auto":
        return "interleaved" if vpp > 1 else "1f1b"
    schedule: ScheduleName = parallel.schedule
    if schedule == "zb-v":
        if vpp != 2:
            raise LayoutError(
                f"schedule=zb-v has two chunks per rank, not vpp={vpp}; use vpp=2",
                field="schedule",
            )
        return schedule
    if (schedule == "interleaved") == (vpp > 1):
        return schedule
    remedy = "raise vpp, or use 1f1b"
    if vpp > 1:
        remedy = "use schedule=interleaved, or leave it out"
    raise LayoutError(
        f"schedule={schedule} does not go with vpp={vpp} chunks per rank; {remedy}",
        field="schedule",
    )

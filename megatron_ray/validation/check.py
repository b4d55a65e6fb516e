"""Checks a whole config: calls the rules of every area.

Bounds of single fields are part of the config's types. Rules that relate two or more
fields are functions `..._problems` of the modules beside this one, and only there.
Pure. Must not know: Ray, HTTP.
"""

from collections.abc import Callable

from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.validation import (
    experts,
    fp8,
    intervals,
    latent_attention,
    layout,
    recompute,
    schedule,
)
from megatron_ray.validation import model as model_rules
from megatron_ray.validation import training as training_rules
from megatron_ray.validation.faults.injection import (
    injection_problems,
    injection_warnings,
)
from megatron_ray.validation.faults.rules import (
    replica_problems,
    rule_problems,
    rule_warnings,
)
from megatron_ray.validation.layers.transformer_engine import (
    transformer_engine_problems,
)
from megatron_ray.validation.parameters.freezing import freezing_problems
from megatron_ray.validation.parameters.groups import group_problems
from megatron_ray.validation.parameters.main_parameters import remainder_problems
from megatron_ray.validation.parameters.matrices import matrix_problems
from megatron_ray.validation.parameters.moments import moment_problems
from megatron_ray.validation.parameters.monitored import monitor_problems
from megatron_ray.validation.passes.cuda_graph import (
    cuda_graph_problems,
    cuda_graph_warnings,
)
from megatron_ray.validation.profiling import profile_problems, profile_warnings
from megatron_ray.validation.replica_groups.rules import (
    group_dp_problems,
    local_sgd_problems,
    local_sgd_warnings,
)
from megatron_ray.validation.resolution import expert_dp_multiple, least_dp
from megatron_ray.validation.resume.fields import resume_changes_problems
from megatron_ray.validation.storage.path_rules import PathRules, path_problems

_RULES = (
    layout.order_problems,
    layout.tensor_parallel_problems,
    layout.comm_overlap_problems,
    experts.expert_problems,
    latent_attention.latent_attention_problems,
    latent_attention.mtp_problems,
    layout.context_parallel_problems,
    layout.zero_problems,
    layout.pipeline_problems,
    model_rules.model_problems,
    training_rules.length_problems,
    training_rules.known_sample_problems,
    schedule.schedule_problems,
    training_rules.dropout_problems,
    training_rules.loss_scale_problems,
    training_rules.precision_problems,
    moment_problems,
    remainder_problems,
    fp8.fp8_problems,
    intervals.skipping_problems,
    rule_problems,
    injection_problems,
    replica_problems,
    local_sgd_problems,
    profile_problems,
    recompute.recompute_problems,
    transformer_engine_problems,
    cuda_graph_problems,
    resume_changes_problems,
)
"""Rules in the order in which their problems are listed."""
_STEP_WARNINGS = (
    schedule.schedule_warnings,
    intervals.interval_warnings,
    intervals.skipping_warnings,
    rule_warnings,
    local_sgd_warnings,
    intervals.source_warnings,
    training_rules.rampup_warnings,
    cuda_graph_warnings,
)
"""Rules of what is legal but without effect, for a known number of steps."""
_WARNINGS = (
    intervals.decay_warnings,
    intervals.clipping_warnings,
    intervals.model_warnings,
    profile_warnings,
    injection_warnings,
)
"""Such rules for any number of steps."""


def find_problems(
    config: TrainConfig, world_size: int | None = None, path_rules: PathRules | None = None
) -> list[Problem]:
    """Returns all problems of a config at once.

    `world_size` is the number of ranks started or available; None skips the rule that
    needs it. `path_rules` are the places that a deployment lets its specs name; None on a
    machine of the user's own.
    """
    problems = path_problems(config, path_rules)
    for rule in _RULES:
        problems += rule(config)
    if problems:
        return problems
    # The rules below enumerate parameters and ranks, which requires a consistent layout.
    return [
        *freezing_problems(config),
        *group_problems(config),
        *matrix_problems(config),
        *monitor_problems(config),
        *_batch_problems(config, world_size),
    ]


def find_warnings(config: TrainConfig) -> list[Problem]:
    """Returns what is legal in a config and has no effect, or not the expected one.

    Such a config runs; its warnings are shown before it starts.
    """
    rules: tuple[Callable[[TrainConfig], list[Problem]], ...] = _WARNINGS
    # The steps of a number of epochs are not known before the data are prepared.
    if config.training.known_steps is not None:
        rules = _STEP_WARNINGS + _WARNINGS
    warnings = list[Problem]()
    for rule in rules:
        warnings += rule(config)
    return warnings


def _batch_problems(config: TrainConfig, world_size: int | None) -> list[Problem]:
    parallel = config.parallel
    # With dp=auto the smallest dp represents all, since the others are multiples of it.
    dp = parallel.dp
    if dp == "auto":
        dp = least_dp(config)
    # All of these are reported at once, since one may not follow from another.
    problems = group_dp_problems(config, dp) or _grid_problems(config, dp)

    micro = config.training.micro_batch_size
    batch = config.training.global_batch_size
    if batch % (micro * dp):
        detail = (
            f"global_batch_size={batch} is not a multiple of micro_batch_size x dp = {micro} x "
            f"{dp}; make it one"
        )
        problems.append(Problem("/training/global_batch_size", "batch_divides", detail))
    else:
        problems += training_rules.rampup_problems(config.training, dp)
    if not _replicas_divide(parallel, dp):
        detail = (
            f"zero_replicas={parallel.zero_replicas} does not divide dp x cp = {dp} x "
            f"{parallel.cp}; use a divisor of {dp * parallel.cp}"
        )
        problems.append(Problem("/parallel/zero_replicas", "replicas_divide", detail))

    ranks = parallel.tp * parallel.pp * parallel.cp * dp
    if world_size is not None and ranks > world_size:
        detail = (
            f"tp x pp x cp x dp = {parallel.tp} x {parallel.pp} x {parallel.cp} x {dp} = "
            f"{ranks} ranks, but there is room for {world_size}; lower a degree or add nodes"
        )
        problems.append(Problem("/parallel", "world_fits", detail))
    return problems


def _grid_problems(config: TrainConfig, dp: int) -> list[Problem]:
    """Returns why the dense and the expert grid do not cover the same ranks."""
    parallel = config.parallel
    # The experts of each replica group are spread over its own ranks.
    multiple = expert_dp_multiple(config) * parallel.replica_groups
    if dp % multiple:
        product = "tp x cp x dp"
        numbers = f"{parallel.tp} x {parallel.cp} x {dp}"
        if parallel.replica_groups > 1:
            product += " / groups"
            numbers += f" / {parallel.replica_groups}"
        detail = (
            f"etp x ep = {parallel.expert_tp} x {parallel.ep} must divide {product} = "
            f"{numbers}; use a dp that is a multiple of {multiple}, or lower ep or etp"
        )
        return [Problem("/parallel/ep", "expert_grid", detail)]
    if not _replicas_divide(parallel, dp):
        return []  # ParallelDims would raise for this, which has its own rule
    try:
        ParallelDims.of(parallel.model_copy(update={"dp": dp}))
    except ValueError as error:
        # The sizes are divisible here, so the remaining cause is an order of axes that puts
        # the pipeline stages of the two grids on different ranks.
        return [Problem("/parallel/order", "expert_grid", str(error))]
    return []


def _replicas_divide(parallel: ParallelismConfig, dp: int) -> bool:
    return dp * parallel.cp % parallel.zero_replicas == 0

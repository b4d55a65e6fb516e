"""Whether a config makes sense.

Owns: putting the rules of all areas together.

Single-field bounds live in the config's types; what needs two fields lives beside this
file, and only there. Pure. Must not know: Ray, HTTP.
"""

from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.validation import experts, latent_attention, layout
from megatron_ray.validation import model as model_rules
from megatron_ray.validation import training as training_rules
from megatron_ray.validation.resolution import expert_dp_multiple, least_dp


def find_problems(config: TrainConfig, world_size: int | None = None) -> list[Problem]:
    """All problems at once, in field order; `world_size` adds the rules that need it
    (ranks available or started).
    """
    problems = [
        *layout.order(config),
        *layout.tensor_parallel(config),
        *experts.experts(config),
        *latent_attention.latent_attention(config),
        *latent_attention.further_tokens(config),
        *layout.context_parallel(config),
        *layout.sharding(config),
        *layout.pipeline(config),
        *model_rules.parts(config),
        *training_rules.lengths(config),
        *training_rules.samples(config),
        *training_rules.schedule(config),
        *training_rules.dropout(config),
        *training_rules.recompute(config),
    ]
    if not problems:
        problems += [*training_rules.frozen(config), *_batch(config, world_size)]
    return problems


def _batch(config: TrainConfig, world: int | None) -> list[Problem]:
    parallel = config.parallel
    training = config.training
    found = []
    model = parallel.tp * parallel.pp * parallel.cp
    micro = training.micro_batch_size
    batch = training.global_batch_size
    step = expert_dp_multiple(config)
    dp = least_dp(config) if parallel.dp == "auto" else parallel.dp
    if dp % step:
        text = (
            f"etp x ep = {parallel.expert_tp} x {parallel.ep} must divide tp x cp x dp = "
            f"{parallel.tp} x {parallel.cp} x {dp}"
        )
        found.append(
            Problem(
                "/parallel/ep",
                "expert_grid",
                f"{text}; use a dp that is a multiple of {step}, or lower ep or etp",
            )
        )
    elif (dp * parallel.cp) % parallel.zero_replicas == 0:
        try:
            ParallelDims.of(parallel.model_copy(update={"dp": dp}))
        # all that is left to say is that the stages of the two grids do not fit
        except ValueError as error:
            found.append(Problem("/parallel/order", "expert_grid", str(error)))
    if batch % (micro * dp):
        text = (
            f"global_batch_size={batch} is not a multiple of micro_batch_size x dp = {micro} x "
            f"{dp}; make it one"
        )
        found.append(Problem("/training/global_batch_size", "batch_divides", text))
    if parallel.dp != "auto" and (dp * parallel.cp) % parallel.zero_replicas:
        text = (
            f"zero_replicas={parallel.zero_replicas} does not divide dp x cp = {dp} x "
            f"{parallel.cp}; use a divisor of {dp * parallel.cp}"
        )
        found.append(Problem("/parallel/zero_replicas", "replicas_divide", text))
    if world is not None and model * dp > world:
        text = (
            f"tp x pp x cp x dp = {parallel.tp} x {parallel.pp} x {parallel.cp} x {dp} = "
            f"{model * dp} ranks, but there is room for {world}"
        )
        found.append(
            Problem("/parallel", "world_fits", text + "; lower a degree or add nodes")
        )
    return found or _grids(parallel.model_copy(update={"dp": dp}))


def _grids(parallel: ParallelismConfig) -> list[Problem]:
    """What is left to go wrong when dense layers and experts are dealt out: an order
    that separates their stages.
    """
    try:
        ParallelDims.of(parallel)
    except ValueError as error:
        return [Problem("/parallel/order", "grids", str(error))]
    return []

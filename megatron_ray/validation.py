"""Whether a config makes sense, and what it leaves open. Owns: putting the rules together, and filling in what depends on the world.

Single-field bounds live in the config's types; what needs two fields lives in `rules`, and only there. Pure. Must not know: Ray, HTTP.
"""

from math import gcd, lcm

from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.rules import experts, latent, layout
from megatron_ray.rules import model as model_rules
from megatron_ray.rules import training as training_rules
from megatron_ray.rules.problem import ConfigProblem, Problem


def check(config: TrainConfig, world_size: int | None = None) -> list[Problem]:
    """All problems at once, in field order; `world_size` adds the rules that need it (ranks available or started)."""
    problems = [
        *layout.order(config),
        *layout.tensor_parallel(config),
        *experts.experts(config),
        *latent.latent_attention(config),
        *latent.further_tokens(config),
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


def resolve_dp(config: TrainConfig, max_world: int) -> int:
    """dp for `auto`: the largest number of replicas that fits into `max_world` ranks, divides the batch and completes the experts' grid;
    the least that does where none of those fits."""
    parallel, training = config.parallel, config.training
    if parallel.dp != "auto":
        return parallel.dp
    model = parallel.tp * parallel.pp * parallel.cp
    most = max(1, max_world // model)
    groups = training.global_batch_size // training.micro_batch_size
    step = least_dp(config)
    fitting = (dp for dp in range(most - most % step, 0, -step) if groups % dp == 0)
    return next(fitting, step if groups % step == 0 else 1)


def least_dp(config: TrainConfig) -> int:
    """dp must be a multiple of this, so that experts and copies of sharded state can be dealt out over the replicas."""
    return lcm(_expert_step(config), _copies_step(config))


def _expert_step(config: TrainConfig) -> int:
    """For etp x ep to divide tp x cp x dp."""
    parallel = config.parallel
    ranks = parallel.expert_tp * parallel.ep
    return ranks // gcd(ranks, parallel.tp * parallel.cp)


def _copies_step(config: TrainConfig) -> int:
    """For zero_replicas to divide dp x cp."""
    return config.parallel.zero_replicas // gcd(config.parallel.zero_replicas, config.parallel.cp)


def resolve(config: TrainConfig, max_world: int) -> TrainConfig:
    """Fills what depends on the world: dp, and sequence parallelism (false at tp=1)."""
    parallel = config.parallel.model_copy(
        update={
            "dp": resolve_dp(config, max_world),
            "sequence_parallel": config.parallel.sequence_parallel and config.parallel.tp > 1,
        }
    )
    return config.model_copy(update={"parallel": parallel})


def with_vocabulary(config: TrainConfig, vocab_size: int) -> TrainConfig:
    """Fills model.vocab_size from the tokenizer. Raises ConfigProblem when the model's own is too small for it."""
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigProblem(f"model.vocab_size={given} is smaller than the tokenizer's {vocab_size}; raise it, or leave it out")
    model = config.model.model_copy(update={"vocab_size": given or vocab_size})
    return config.model_copy(update={"model": model})


def world_size(config: TrainConfig) -> int:
    """Ranks of a resolved config."""
    parallel = config.parallel
    if parallel.dp == "auto":
        raise ValueError("parallel.dp is not resolved")
    return parallel.tp * parallel.pp * parallel.cp * parallel.dp


def _batch(config: TrainConfig, world: int | None) -> list[Problem]:
    parallel, training, found = config.parallel, config.training, []
    model = parallel.tp * parallel.pp * parallel.cp
    micro, batch = training.micro_batch_size, training.global_batch_size
    step = _expert_step(config)
    dp = least_dp(config) if parallel.dp == "auto" else parallel.dp
    if dp % step:
        text = f"etp x ep = {parallel.expert_tp} x {parallel.ep} must divide tp x cp x dp = {parallel.tp} x {parallel.cp} x {dp}"
        found.append(Problem("/parallel/ep", "expert_grid", f"{text}; use a dp that is a multiple of {step}, or lower ep or etp"))
    elif (dp * parallel.cp) % parallel.zero_replicas == 0:
        try:
            ParallelDims.of(parallel.model_copy(update={"dp": dp}))
        except ValueError as error:  # all that is left to say is that the stages of the two grids do not fit
            found.append(Problem("/parallel/order", "expert_grid", str(error)))
    if batch % (micro * dp):
        text = f"global_batch_size={batch} is not a multiple of micro_batch_size x dp = {micro} x {dp}; make it one"
        found.append(Problem("/training/global_batch_size", "batch_divides", text))
    if parallel.dp != "auto" and (dp * parallel.cp) % parallel.zero_replicas:
        text = f"zero_replicas={parallel.zero_replicas} does not divide dp x cp = {dp} x {parallel.cp}; use a divisor of {dp * parallel.cp}"
        found.append(Problem("/parallel/zero_replicas", "replicas_divide", text))
    if world is not None and model * dp > world:
        text = (
            f"tp x pp x cp x dp = {parallel.tp} x {parallel.pp} x {parallel.cp} x {dp} = {model * dp} ranks, but there is room for {world}"
        )
        found.append(Problem("/parallel", "world_fits", text + "; lower a degree or add nodes"))
    return found or _grids(parallel.model_copy(update={"dp": dp}))


def _grids(parallel: ParallelismConfig) -> list[Problem]:
    """What is left to go wrong when dense layers and experts are dealt out: an order that separates their stages."""
    try:
        ParallelDims.of(parallel)
    except ValueError as error:
        return [Problem("/parallel/order", "grids", str(error))]
    return []

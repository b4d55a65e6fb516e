"""Every cross-field rule. Owns: (config, world) -> problems, each with field, rule, numbers and remedy.

Single-field bounds live in the config's types; what needs two fields lives here, and only here. Pure. Must not know: Ray, HTTP.
"""

from dataclasses import dataclass
from math import gcd, lcm, prod

from megatron_ray.config.moe import LayerPattern, MoEConfig
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ORDER, ParallelDims
from megatron_ray.schedules.layout import LayoutError
from megatron_ray.schedules.plan import plan_pipeline


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a spec."""

    pointer: str
    """JSON pointer of the field to change."""
    code: str
    """Stable name of the rule."""
    detail: str
    """What is wrong, with the numbers, and what to do about it."""


class ConfigProblem(ValueError):
    """A config that contradicts itself, its data or its world: the user's to mend, so nothing is gained by trying again."""


MOST_SAMPLES = 1 << 31


def check(config: TrainConfig, world_size: int | None = None) -> list[Problem]:
    """All problems at once, in field order; `world_size` adds the rules that need it (ranks available or started)."""
    problems = [
        *_order(config),
        *_tensor_parallel(config),
        *_experts(config),
        *_context_parallel(config),
        *_sharding(config),
        *_pipeline(config),
        *_lengths(config),
        *_samples(config),
        *_schedule(config),
        *_dropout(config),
        *_recompute(config),
    ]
    if not problems:
        problems += _batch(config, world_size)
    return problems


def resolve_dp(config: TrainConfig, max_world: int) -> int:
    """dp for `auto`: the largest number of replicas that fits into `max_world` ranks, divides the batch and completes the experts' grid;
    the least that does where none fits."""
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
    experts = _expert_tp(config) * parallel.ep
    return experts // gcd(experts, parallel.tp * parallel.cp)


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


def _order(config: TrainConfig) -> list[Problem]:
    order = config.parallel.order
    if sorted(order.split("-")) == sorted(ORDER):
        return []
    text = f"order={order} must name each of {', '.join(ORDER)} once; Megatron's is {'-'.join(ORDER)}"
    return [Problem("/parallel/order", "order", text)]


def _tensor_parallel(config: TrainConfig) -> list[Problem]:
    model, tp = config.model, config.parallel.tp
    sizes = {"num_attention_heads": model.num_attention_heads, "ffn_hidden_size": model.ffn_width}
    found = [
        Problem("/parallel/tp", "tp_divides", f"tp={tp} does not divide model.{name}={size}; use a tp that divides both, or another {name}")
        for name, size in sizes.items()
        if size % tp
    ]
    if not found and tp % model.kv_heads and model.kv_heads % tp:
        text = f"tp={tp} is neither a multiple nor a divisor of model.num_query_groups={model.kv_heads}, so heads cannot be dealt out"
        found.append(Problem("/parallel/tp", "tp_divides", f"{text}; use a tp that is one of both, or another num_query_groups"))
    part = tp * config.parallel.cp
    if config.parallel.sequence_parallel and config.training.seq_length % part:
        text = f"sequence_parallel cuts seq_length={config.training.seq_length} into tp x cp = {tp} x {config.parallel.cp} parts"
        text += f"; use a multiple of {part}, or turn it off"
        found.append(Problem("/training/seq_length", "sequence_parallel_divides", text))
    return found


def _expert_tp(config: TrainConfig) -> int:
    return config.parallel.etp or config.parallel.tp


def _experts(config: TrainConfig) -> list[Problem]:
    """Expert parallelism and the mixture itself."""
    parallel, moe, model = config.parallel, config.model.moe, config.model
    if moe is None:
        given = {
            "ep": parallel.ep if parallel.ep > 1 else None,
            "etp": parallel.etp if parallel.etp not in (None, 1, parallel.tp) else None,
        }
        return [
            Problem(f"/parallel/{name}", "needs_experts", f"{name}={degree} needs a model with experts; give model.moe, or leave it out")
            for name, degree in given.items()
            if degree is not None
        ]
    found = []
    if moe.num_experts % parallel.ep:
        text = f"ep={parallel.ep} does not divide model.moe.num_experts={moe.num_experts}; use an ep that does"
        found.append(Problem("/parallel/ep", "ep_divides", text))
    if model.expert_width % _expert_tp(config):
        name = "etp" if parallel.etp else "tp"
        text = f"{name}={_expert_tp(config)} does not divide the experts' ffn_hidden_size={model.expert_width}; use an etp that does"
        found.append(Problem(f"/parallel/{name}", "etp_divides", text))
    shared = moe.shared_expert_ffn_hidden_size
    if shared is not None and shared % parallel.tp:
        text = f"tp={parallel.tp} does not divide shared_expert_ffn_hidden_size={shared}; use a multiple of {parallel.tp}"
        found.append(Problem("/model/moe/shared_expert_ffn_hidden_size", "tp_divides", text))
    if parallel.tp > 1 and not parallel.sequence_parallel:
        text = f"experts with tp={parallel.tp} need each rank to have tokens of its own; set sequence_parallel, or use tp=1"
        found.append(Problem("/parallel/sequence_parallel", "experts_need_sequence_parallel", text))
    if parallel.zero == 3:
        found.append(Problem("/parallel/zero", "experts_zero", "zero=3 does not shard experts in this version; use zero=1 with ep"))
    if model.linear_bias:
        found.append(Problem("/model/linear_bias", "experts_bias", "experts have no biases in this version; set linear_bias to false"))
    if not isinstance(moe.layer_pattern, LayerPattern) and len(moe.layer_pattern) != model.num_layers:
        text = f"layer_pattern has {len(moe.layer_pattern)} entries for num_layers={model.num_layers}; give one per layer"
        found.append(Problem("/model/moe/layer_pattern", "layer_pattern", text))
    return found + _routing(moe)


def _routing(moe: MoEConfig) -> list[Problem]:
    found: list[tuple[str, str, str]] = []
    if moe.top_k > moe.num_experts:
        found.append(("top_k", "top_k", f"top_k={moe.top_k} is more than num_experts={moe.num_experts}; lower it"))
    if moe.score_function == "softmax" and moe.top_k == 1 and not moe.pre_softmax:
        text = "top_k=1 after softmax over the chosen experts gives weight 1 to all, so the router would not learn; set pre_softmax"
        found.append(("pre_softmax", "router_learns", text))
    if moe.score_function == "sigmoid" and moe.pre_softmax:
        found.append(("pre_softmax", "pre_softmax", "pre_softmax has no meaning with score_function=sigmoid; leave it out"))
    if moe.expert_bias and moe.score_function != "sigmoid":
        found.append(
            ("expert_bias", "bias_needs_sigmoid", "expert_bias needs score_function=sigmoid; set it, or use aux_loss_coeff instead")
        )
    if moe.pad_to_capacity and moe.capacity_factor is None:
        found.append(("pad_to_capacity", "needs_capacity", "pad_to_capacity needs a capacity_factor; give one, or leave it out"))
    found += _groups(moe)
    return [Problem(f"/model/moe/{field}", code, text) for field, code, text in found]


def _groups(moe: MoEConfig) -> list[tuple[str, str, str]]:
    groups, chosen = moe.num_groups, moe.group_top_k
    if groups is None or chosen is None:
        missing = "group_top_k" if chosen is None else "num_groups"
        given = groups is not None or chosen is not None
        return [(missing, "groups", "num_groups and group_top_k belong together; give both, or none")] if given else []
    if moe.num_experts % groups:
        return [("num_groups", "groups", f"num_groups={groups} does not divide num_experts={moe.num_experts}; use one that does")]
    if chosen > groups or moe.top_k % chosen or moe.top_k // chosen > moe.num_experts // groups:
        text = (
            f"group_top_k={chosen} must be at most num_groups={groups} and divide top_k={moe.top_k}, and each of those groups of"
            f" {moe.num_experts // groups} experts must have top_k / group_top_k of them; change one"
        )
        return [("group_top_k", "groups", text)]
    return []


def _context_parallel(config: TrainConfig) -> list[Problem]:
    parallel, seq_length, found = config.parallel, config.training.seq_length, []
    cp, sizes = parallel.cp, parallel.hierarchical_cp_sizes
    if sizes is not None and parallel.cp_method != "a2a+p2p":
        text = f"hierarchical_cp_sizes goes with cp_method=a2a+p2p, not {parallel.cp_method}; leave it out, or change the method"
        found.append(Problem("/parallel/hierarchical_cp_sizes", "hierarchical_cp", text))
    elif parallel.cp_method == "a2a+p2p" and (sizes is None or prod(sizes) != cp):
        given = "is missing" if sizes is None else f"= {sizes[0]} x {sizes[1]} is not cp={cp}"
        text = f"hierarchical_cp_sizes {given}; give how many ranks exchange heads and how many such groups there are, with product {cp}"
        found.append(Problem("/parallel/hierarchical_cp_sizes", "hierarchical_cp", text))
    if cp == 1 or found:
        return found
    if seq_length % (2 * cp):
        nearest = max(1, round(seq_length / (2 * cp))) * 2 * cp
        text = f"cp={cp} cuts a sequence into 2 x cp = {2 * cp} chunks, and seq_length={seq_length} is no multiple of that; use {nearest}"
        found.append(Problem("/training/seq_length", "context_divides", text))
    exchange = {"a2a": cp, "a2a+p2p": sizes[0] if sizes else 1}.get(parallel.cp_method, 1)
    heads = {"num_attention_heads": config.model.num_attention_heads, "num_query_groups": max(config.model.kv_heads, parallel.tp)}
    for name, count in heads.items():
        if count % (parallel.tp * exchange):
            text = f"{name}={count} over tp={parallel.tp} cannot be dealt out to the {exchange} ranks that exchange heads"
            text += f"; use a multiple of {parallel.tp * exchange}, or cp_method=p2p"
            found.append(Problem("/parallel/cp_method", "heads_exchange", text))
            break
    return found


def _sharding(config: TrainConfig) -> list[Problem]:
    parallel = config.parallel
    if parallel.zero_replicas > 1 and parallel.zero != 3:
        text = f"zero_replicas={parallel.zero_replicas} goes with zero=3, not {parallel.zero}; leave it out, or use zero=3"
        return [Problem("/parallel/zero_replicas", "needs_zero3", text)]
    if parallel.zero == 3 and parallel.schedule.startswith("zb"):
        text = f"schedule={parallel.schedule} computes weight gradients after torch has given a block's weights away under zero=3"
        return [Problem("/parallel/schedule", "zero3_schedule", text + "; use 1f1b, or zero=1")]
    return []


def _pipeline(config: TrainConfig) -> list[Problem]:
    parallel = config.parallel
    if parallel.pp == 1:
        given = [name for name in ("first_stage_layers", "last_stage_layers", "layout") if getattr(parallel, name) is not None]
        if parallel.vpp > 1:
            given.insert(0, "vpp")
        return [
            Problem(f"/parallel/{name}", "needs_pipeline", f"{name}={getattr(parallel, name)} needs pp > 1; raise pp, or leave it out")
            for name in given
        ]
    if parallel.layout is not None and (parallel.first_stage_layers is not None or parallel.last_stage_layers is not None):
        text = "layout says what each stage holds; leave out first_stage_layers and last_stage_layers"
        return [Problem("/parallel/layout", "layout_or_sizes", text)]
    try:
        plan_pipeline(config)
    except LayoutError as error:
        return [Problem(f"/parallel/{error.field}", "pipeline_layout", str(error))]
    return []


def _samples(config: TrainConfig) -> list[Problem]:
    """The order of samples is an index in memory-mapped files: 12 bytes a sample, built before the first step."""
    training = config.training
    samples = training.steps * training.global_batch_size
    if samples <= MOST_SAMPLES:
        return []
    text = f"steps x global_batch_size = {training.steps} x {training.global_batch_size} = {samples} samples, at most {MOST_SAMPLES}"
    return [Problem("/training/steps", "too_many_samples", text + " can be ordered; lower steps, or use longer sequences")]


def _lengths(config: TrainConfig) -> list[Problem]:
    model, training, found = config.model, config.training, []
    if model.head_width < 2:
        text = f"hidden_size={model.hidden_size} over num_attention_heads={model.num_attention_heads} leaves a head {model.head_width} wide"
        found.append(
            Problem("/model/num_attention_heads", "head_width", text + "; use fewer heads, a larger hidden_size, or give head_dim")
        )
    if model.position_embedding == "rope" and model.head_width % 2:
        text = f"rotary positions need an even head_dim, not {model.head_width}; change hidden_size, num_attention_heads or head_dim"
        found.append(Problem("/model/head_dim", "rope_even", text))
    if model.num_attention_heads % model.kv_heads:
        text = f"num_query_groups={model.kv_heads} does not divide num_attention_heads={model.num_attention_heads}"
        found.append(Problem("/model/num_query_groups", "groups_divide", text))
    if model.position_embedding == "learned" and training.seq_length > model.max_sequence_length:
        text = (
            f"seq_length={training.seq_length} is longer than the {model.max_sequence_length} learned positions;"
            " shorten it or raise model.max_sequence_length"
        )
        found.append(Problem("/training/seq_length", "positions", text))
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "bpe" and model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        text = f"the tokenizer's {tokenizer.vocab_size} tokens do not fit into model.vocab_size={model.vocab_size}"
        text += "; lower the first or raise the second"
        found.append(Problem("/data/tokenizer/vocab_size", "vocab_fits", text))
    return found


def _schedule(config: TrainConfig) -> list[Problem]:
    schedule, lr = config.schedule, config.optimizer.lr
    if schedule.min_lr > lr:
        return [Problem("/schedule/min_lr", "min_lr", f"min_lr={schedule.min_lr:g} is above optimizer.lr={lr:g}; lower it")]
    return []


def _dropout(config: TrainConfig) -> list[Problem]:
    rate, cp = config.model.attention_dropout, config.parallel.cp
    if not rate or cp == 1:
        return []
    text = f"attention_dropout={rate:g} does not go with cp={cp}: attention over shared sequences keeps no probabilities to drop"
    return [Problem("/model/attention_dropout", "attention_dropout", text + "; use 0 (hidden_dropout is free), or cp=1")]


def _recompute(config: TrainConfig) -> list[Problem]:
    given = config.training.recompute
    fields = {name: getattr(given, name) for name in ("method", "num_layers", "modules")}
    # Without these words the rest says nothing.
    uses = {"none": (), "selective": ("modules",), "full": ("method", "num_layers")}
    meant_for = {"modules": "selective", "method": "full", "num_layers": "full"}
    found = [
        _recompute_problem(
            name, f"{name} is for granularity={meant_for[name]}, not for {given.granularity}; leave it out, or change granularity"
        )
        for name, value in fields.items()
        if value is not None and name not in uses[given.granularity]
    ]
    if given.granularity == "full":
        remedies = {"method": "give uniform or block", "num_layers": "say how many layers: 1 recomputes each by itself"}
        found += [
            _recompute_problem(name, f"granularity=full needs {name}; {remedy}")
            for name, remedy in remedies.items()
            if fields[name] is None
        ]
        if not found:
            found += _recomputed_layers(config)
    return found + _recomputed_modules(config)


def _recomputed_modules(config: TrainConfig) -> list[Problem]:
    modules, found = config.training.recompute.chosen_modules, []
    moe = config.model.moe
    if moe is None:
        with_experts = {False}
    elif isinstance(moe.layer_pattern, list):
        with_experts = {bool(entry) for entry in moe.layer_pattern}
    else:
        with_experts = {True, moe.layer_pattern.every == 1}
    for name, experts in (("mlp", False), ("moe", True)):
        if name in modules and experts not in with_experts:
            kind = "have experts" if experts else "are without experts"
            found.append(_recompute_problem("modules", f"{name} is for layers that {kind}, of which the model has none; leave it out"))
        if name in modules and "activation" in modules:
            text = f"activation is a part of {name}, which is recomputed whole; leave out one of the two"
            found.append(_recompute_problem("modules", text))
    return found


def _recomputed_layers(config: TrainConfig) -> list[Problem]:
    wanted = config.training.recompute.num_layers
    try:
        most = max(len(stage.layers) for stage in plan_pipeline(config).contents)
    except LayoutError:
        return []  # reported where it belongs
    if wanted is None or wanted <= most:
        return []
    return [_recompute_problem("num_layers", f"num_layers={wanted} is more than the {most} layers of the largest stage; lower it")]


def _recompute_problem(name: str, text: str) -> Problem:
    return Problem(f"/training/recompute/{name}", "recompute", text)


def _batch(config: TrainConfig, world: int | None) -> list[Problem]:
    parallel, training, found = config.parallel, config.training, []
    model = parallel.tp * parallel.pp * parallel.cp
    micro, batch = training.micro_batch_size, training.global_batch_size
    step = _expert_step(config)
    dp = least_dp(config) if parallel.dp == "auto" else parallel.dp
    if dp % step:
        text = f"etp x ep = {_expert_tp(config)} x {parallel.ep} must divide tp x cp x dp = {parallel.tp} x {parallel.cp} x {dp}"
        found.append(Problem("/parallel/ep", "expert_grid", f"{text}; use a dp that is a multiple of {step}, or lower ep or etp"))
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

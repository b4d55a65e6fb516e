"""Rules of how a model is spread over ranks.

Owns: what tensor, context, pipeline and data parallelism ask of each other and of the
model.

Each gives its problems, none when it is kept. Pure. Must not know: experts, how many
ranks there are.
"""

from math import prod

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ORDER
from megatron_ray.pipeline_parallel.schedules.layout import LayoutError
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline


def order(config: TrainConfig) -> list[Problem]:
    order = config.parallel.order
    if sorted(order.split("-")) == sorted(ORDER):
        return []
    names = ", ".join(ORDER)
    text = f"order={order} must name each of {names} once; Megatron's is {'-'.join(ORDER)}"
    return [Problem("/parallel/order", "order", text)]


def tensor_parallel(config: TrainConfig) -> list[Problem]:
    model = config.model
    tp = config.parallel.tp
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_width,
    }
    found = [
        Problem(
            "/parallel/tp",
            "tp_divides",
            f"tp={tp} does not divide model.{name}={size}; use a tp that divides both, or "
            f"another {name}",
        )
        for name, size in sizes.items()
        if size % tp
    ]
    if not found and tp % model.kv_heads and model.kv_heads % tp:
        text = (
            f"tp={tp} is neither a multiple nor a divisor of "
            f"model.num_query_groups={model.kv_heads}, so heads cannot be dealt out"
        )
        found.append(
            Problem(
                "/parallel/tp",
                "tp_divides",
                f"{text}; use a tp that is one of both, or another num_query_groups",
            )
        )
    part = tp * config.parallel.cp
    if config.parallel.sequence_parallel and config.training.seq_length % part:
        text = (
            f"sequence_parallel cuts seq_length={config.training.seq_length} into tp x cp = "
            f"{tp} x {config.parallel.cp} parts"
        )
        text += f"; use a multiple of {part}, or turn it off"
        found.append(Problem("/training/seq_length", "sequence_parallel_divides", text))
    return found


def context_parallel(config: TrainConfig) -> list[Problem]:
    parallel = config.parallel
    seq_length = config.training.seq_length
    found = []
    cp = parallel.cp
    sizes = parallel.hierarchical_cp_sizes
    if sizes is not None and parallel.cp_method != "a2a+p2p":
        text = (
            f"hierarchical_cp_sizes goes with cp_method=a2a+p2p, not {parallel.cp_method}; "
            "leave it out, or change the method"
        )
        found.append(Problem("/parallel/hierarchical_cp_sizes", "hierarchical_cp", text))
    elif parallel.cp_method == "a2a+p2p" and (sizes is None or prod(sizes) != cp):
        given = (
            "is missing" if sizes is None else f"= {sizes[0]} x {sizes[1]} is not cp={cp}"
        )
        text = (
            f"hierarchical_cp_sizes {given}; give how many ranks exchange heads and how many "
            f"such groups there are, with product {cp}"
        )
        found.append(Problem("/parallel/hierarchical_cp_sizes", "hierarchical_cp", text))
    if cp == 1 or found:
        return found
    if seq_length % (2 * cp):
        nearest = max(1, round(seq_length / (2 * cp))) * 2 * cp
        text = (
            f"cp={cp} cuts a sequence into 2 x cp = {2 * cp} chunks, and "
            f"seq_length={seq_length} is no multiple of that; use {nearest}"
        )
        found.append(Problem("/training/seq_length", "context_divides", text))
    exchange = {"a2a": cp, "a2a+p2p": sizes[0] if sizes else 1}.get(parallel.cp_method, 1)
    heads = {
        "num_attention_heads": config.model.num_attention_heads,
        "num_query_groups": max(config.model.kv_heads, parallel.tp),
    }
    for name, count in heads.items():
        if count % (parallel.tp * exchange):
            text = (
                f"{name}={count} over tp={parallel.tp} cannot be dealt out to the {exchange} "
                "ranks that exchange heads"
            )
            text += f"; use a multiple of {parallel.tp * exchange}, or cp_method=p2p"
            found.append(Problem("/parallel/cp_method", "heads_exchange", text))
            break
    return found


def sharding(config: TrainConfig) -> list[Problem]:
    parallel = config.parallel
    if parallel.zero_replicas > 1 and parallel.zero != 3:
        text = (
            f"zero_replicas={parallel.zero_replicas} goes with zero=3, not {parallel.zero}; "
            "leave it out, or use zero=3"
        )
        return [Problem("/parallel/zero_replicas", "needs_zero3", text)]
    if parallel.zero == 3 and parallel.schedule.startswith("zb"):
        text = (
            f"schedule={parallel.schedule} computes weight gradients after torch has given a "
            "block's weights away under zero=3"
        )
        return [
            Problem("/parallel/schedule", "zero3_schedule", text + "; use 1f1b, or zero=1")
        ]
    return []


def pipeline(config: TrainConfig) -> list[Problem]:
    parallel = config.parallel
    if parallel.pp == 1:
        given = [
            name
            for name in ("first_stage_layers", "last_stage_layers", "layout")
            if getattr(parallel, name) is not None
        ]
        if parallel.vpp > 1:
            given.insert(0, "vpp")
        return [
            Problem(
                f"/parallel/{name}",
                "needs_pipeline",
                f"{name}={getattr(parallel, name)} needs pp > 1; raise pp, or leave it out",
            )
            for name in given
        ]
    if parallel.layout is not None and (
        parallel.first_stage_layers is not None or parallel.last_stage_layers is not None
    ):
        text = (
            "layout says what each stage holds; "
            "leave out first_stage_layers and last_stage_layers"
        )
        return [Problem("/parallel/layout", "layout_or_sizes", text)]
    try:
        plan_pipeline(config)
    except LayoutError as error:
        return [Problem(f"/parallel/{error.field}", "pipeline_layout", str(error))]
    return []

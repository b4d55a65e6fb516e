"""Checks how a model is spread over ranks.

Owns: what tensor, context, pipeline and data parallelism require of each other and of
the model. Pure. Must not know: experts, how many ranks there are.
"""

from math import prod

from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ORDER
from megatron_ray.pipeline_parallel.schedules.layout import LayoutError
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline


def order_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `parallel.order`, which must name every axis once."""
    order = config.parallel.order
    if sorted(order.split("-")) == sorted(ORDER):
        return []
    detail = (
        f"order={order} must name each of {', '.join(ORDER)} once; Megatron's is "
        f"{'-'.join(ORDER)}"
    )
    return [Problem("/parallel/order", "order", detail)]


def tensor_parallel_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of tensor and sequence parallelism: what tp must divide."""
    model = config.model
    tp = config.parallel.tp
    # Attention is split by heads, the MLP by its inner columns.
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_width,
    }
    problems = []
    for name, size in sizes.items():
        if size % tp:
            detail = (
                f"tp={tp} does not divide model.{name}={size}; use a tp that divides both, or "
                f"another {name}"
            )
            problems.append(Problem("/parallel/tp", "tp_divides", detail))
    # With fewer key/value heads than ranks each head is replicated on tp / kv_heads
    # neighbouring ranks.
    if not problems and tp % model.kv_heads and model.kv_heads % tp:
        detail = (
            f"tp={tp} is neither a multiple nor a divisor of "
            f"model.num_query_groups={model.kv_heads}, so key/value heads cannot be split "
            "evenly; use a tp that is one of both, or another num_query_groups"
        )
        problems.append(Problem("/parallel/tp", "tp_divides", detail))
    # Each context-parallel rank splits its part of the sequence over tp again.
    num_parts = tp * config.parallel.cp
    seq_length = config.training.seq_length
    if config.parallel.sequence_parallel and seq_length % num_parts:
        detail = (
            f"sequence_parallel splits seq_length={seq_length} into tp x cp = {tp} x "
            f"{config.parallel.cp} parts; use a multiple of {num_parts}, or turn it off"
        )
        problems.append(
            Problem("/training/seq_length", "sequence_parallel_divides", detail)
        )
    return problems


def comm_overlap_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `parallel.tp_comm_overlap`, which has no effect at tp=1."""
    parallel = config.parallel
    if parallel.tp_symmetric_memory and not parallel.tp_comm_overlap:
        detail = (
            "tp_symmetric_memory copies the tokens that tp_comm_overlap sends, which is "
            "false; set it to true, or leave tp_symmetric_memory out"
        )
        pointer = "/parallel/tp_symmetric_memory"
        return [Problem(pointer, "symmetric_memory_needs_overlap", detail)]
    if not parallel.tp_comm_overlap or parallel.tp == 1:
        return []
    pointer = "/parallel/tp_comm_overlap"
    problems = []
    if not parallel.sequence_parallel:
        detail = (
            "tp_comm_overlap sends the tokens that sequence_parallel splits over "
            f"tp={parallel.tp}, and sequence_parallel is false; set it to true, or leave "
            "tp_comm_overlap out"
        )
        problems.append(Problem(pointer, "overlap_needs_sequence_parallel", detail))
    fp8 = config.training.fp8
    if fp8 is not None and config.model.spec != "transformer_engine":
        detail = (
            f"tp_comm_overlap multiplies the tokens of each of tp={parallel.tp} ranks by "
            f"themselves, and fp8.recipe={fp8.recipe} quantizes all of them at once; leave "
            "tp_comm_overlap or fp8 out"
        )
        problems.append(Problem(pointer, "overlap_excludes_fp8", detail))
    return problems


def context_parallel_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of context parallelism: its method, the sequence and the heads."""
    parallel = config.parallel
    problems = _hierarchy_problems(parallel)
    if parallel.cp == 1 or problems:
        return problems
    # Each rank gets one chunk from the front and one from the back of the sequence, so
    # that causal attention costs all ranks the same.
    num_chunks = 2 * parallel.cp
    seq_length = config.training.seq_length
    if seq_length % num_chunks:
        nearest = max(1, round(seq_length / num_chunks)) * num_chunks
        detail = (
            f"cp={parallel.cp} splits a sequence into 2 x cp = {num_chunks} chunks, and "
            f"seq_length={seq_length} is not a multiple of that; use {nearest}"
        )
        problems.append(Problem("/training/seq_length", "context_divides", detail))
    return problems + _head_exchange_problems(config)


def _hierarchy_problems(parallel: ParallelismConfig) -> list[Problem]:
    sizes = parallel.hierarchical_cp_sizes
    pointer = "/parallel/hierarchical_cp_sizes"
    if parallel.cp_method != "a2a+p2p":
        if sizes is None:
            return []
        detail = (
            f"hierarchical_cp_sizes needs cp_method=a2a+p2p, not {parallel.cp_method}; "
            "leave it out, or change the method"
        )
        return [Problem(pointer, "hierarchical_cp", detail)]
    if sizes is None:
        state = "is missing"
    elif prod(sizes) != parallel.cp:
        state = f"= {sizes[0]} x {sizes[1]} is not cp={parallel.cp}"
    else:
        return []
    detail = (
        f"hierarchical_cp_sizes {state}; give how many ranks exchange heads and how many "
        f"such groups there are, with product {parallel.cp}"
    )
    return [Problem(pointer, "hierarchical_cp", detail)]


def _head_exchange_problems(config: TrainConfig) -> list[Problem]:
    parallel = config.parallel
    # Ranks among which heads are exchanged, on top of their split over tp.
    ranks = 1
    if parallel.cp_method == "a2a":
        ranks = parallel.cp
    elif parallel.cp_method == "a2a+p2p" and parallel.hierarchical_cp_sizes is not None:
        ranks = parallel.hierarchical_cp_sizes[0]
    heads = {
        "num_attention_heads": config.model.num_attention_heads,
        # Replicated key/value heads count as heads of their own.
        "num_query_groups": max(config.model.kv_heads, parallel.tp),
    }
    for name, count in heads.items():
        if count % (parallel.tp * ranks):
            detail = (
                f"{name}={count} over tp={parallel.tp} cannot be split over the {ranks} ranks "
                f"that exchange heads; use a multiple of {parallel.tp * ranks}, or "
                "cp_method=p2p"
            )
            return [Problem("/parallel/cp_method", "heads_exchange", detail)]
    return []


def zero_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of ZeRO: what excludes it or needs it."""
    parallel = config.parallel
    if parallel.zero_replicas > 1 and parallel.zero != 3:
        detail = (
            f"zero_replicas={parallel.zero_replicas} needs zero=3, not {parallel.zero}; "
            "leave it out, or use zero=3"
        )
        return [Problem("/parallel/zero_replicas", "needs_zero3", detail)]
    if parallel.overlap_param_gather and parallel.zero != 1:
        detail = (
            f"overlap_param_gather needs zero=1, not {parallel.zero}, which gathers no weights "
            "after an update; leave it out, or use zero=1"
        )
        return [Problem("/parallel/overlap_param_gather", "needs_zero1", detail)]
    if parallel.zero == 3 and parallel.schedule.startswith("zb"):
        detail = (
            f"schedule={parallel.schedule} computes weight gradients after zero=3 has freed "
            "the block's weights; use 1f1b, or zero=1"
        )
        return [Problem("/parallel/schedule", "zero3_schedule", detail)]
    return []


def pipeline_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of pipeline parallelism: stages, chunks and schedule."""
    parallel = config.parallel
    if parallel.pp == 1:
        return _problems_without_pipeline(parallel)
    sizes = (parallel.first_stage_layers, parallel.last_stage_layers)
    if parallel.layout is not None and sizes != (None, None):
        detail = (
            "layout defines the contents of every stage; leave out first_stage_layers and "
            "last_stage_layers"
        )
        return [Problem("/parallel/layout", "layout_or_sizes", detail)]
    # Planning the pipeline checks the rest: that layers divide, and that the schedule
    # supports the number of chunks.
    try:
        plan_pipeline(config)
    except LayoutError as error:
        return [Problem(f"/parallel/{error.field}", "pipeline_layout", str(error))]
    return []


def _problems_without_pipeline(parallel: ParallelismConfig) -> list[Problem]:
    # These fields would be ignored silently, or fail once the model is built.
    fields: dict[str, object] = {
        "first_stage_layers": parallel.first_stage_layers,
        "last_stage_layers": parallel.last_stage_layers,
        "layout": parallel.layout,
    }
    if parallel.vpp > 1:
        fields = {"vpp": parallel.vpp} | fields
    if parallel.schedule in ("interleaved", "zb-v"):
        fields = {"schedule": parallel.schedule} | fields
    problems = []
    for name, value in fields.items():
        if value is not None:
            detail = f"{name}={value} needs pp > 1; raise pp, or leave it out"
            problems.append(Problem(f"/parallel/{name}", "needs_pipeline", detail))
    return problems

"""Checks mixtures of experts: their parallelism, their shape and their router.

Pure. Must not know: the world size.
"""

from megatron_ray.config.architecture.moe import LayerPattern, MoEConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.pipeline_parallel.schedules.orders import PAIRED


def expert_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of expert parallelism and of the mixture itself."""
    parallel = config.parallel
    moe = config.model.moe
    if moe is None:
        return _problems_without_experts(parallel)
    return [
        *_parallelism_problems(config.model, moe, parallel),
        *_overlap_problems(config),
        *_shape_problems(config.model, moe),
        *_routing_problems(moe),
        *_group_problems(moe),
    ]


def _problems_without_experts(parallel: ParallelismConfig) -> list[Problem]:
    degrees = dict[str, int]()
    if parallel.ep > 1:
        degrees["ep"] = parallel.ep
    # An etp that equals tp changes nothing, and is accepted for any model.
    if parallel.etp is not None and parallel.etp not in (1, parallel.tp):
        degrees["etp"] = parallel.etp
    problems = []
    for name, degree in degrees.items():
        detail = (
            f"{name}={degree} needs a model with experts; give model.moe, or leave it out"
        )
        problems.append(Problem(f"/parallel/{name}", "needs_experts", detail))
    return problems


def _parallelism_problems(
    model: ModelConfig, moe: MoEConfig, parallel: ParallelismConfig
) -> list[Problem]:
    problems = []
    if moe.num_experts % parallel.ep:
        detail = (
            f"ep={parallel.ep} does not divide model.moe.num_experts={moe.num_experts}; use an "
            "ep that does"
        )
        problems.append(Problem("/parallel/ep", "ep_divides", detail))
    # Without etp experts are split by tp, so that is the field to change.
    if model.expert_width % parallel.expert_tp:
        name = "etp" if parallel.etp else "tp"
        detail = (
            f"{name}={parallel.expert_tp} does not divide the experts' "
            f"ffn_hidden_size={model.expert_width}; use an etp that does"
        )
        problems.append(Problem(f"/parallel/{name}", "etp_divides", detail))
    shared_width = moe.shared_expert_ffn_hidden_size
    if shared_width is not None and shared_width % parallel.tp:
        detail = (
            f"tp={parallel.tp} does not divide shared_expert_ffn_hidden_size={shared_width}; "
            f"use a multiple of {parallel.tp}"
        )
        problems.append(
            Problem("/model/moe/shared_expert_ffn_hidden_size", "tp_divides", detail)
        )
    # Without sequence parallelism all tp ranks have the same tokens, and would send each
    # of them to its experts tp times.
    if parallel.tp > 1 and not parallel.sequence_parallel:
        detail = (
            f"experts with tp={parallel.tp} need different tokens on each rank; set "
            "sequence_parallel, or use tp=1"
        )
        problems.append(
            Problem("/parallel/sequence_parallel", "experts_need_sequence_parallel", detail)
        )
    return problems


def _overlap_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `parallel.ep_comm_overlap`, which has no effect at ep=1."""
    parallel = config.parallel
    if not parallel.interleaves_passes:
        return []
    problems = []

    def refuse(code: str, detail: str) -> None:
        detail = f"ep_comm_overlap {detail}, or leave ep_comm_overlap out"
        problems.append(Problem("/parallel/ep_comm_overlap", code, detail))

    if parallel.dispatcher != "alltoall":
        refuse(
            "overlap_needs_alltoall",
            f"computes while an all-to-all is under way, and dispatcher="
            f"{parallel.dispatcher} has none; use alltoall",
        )
    if parallel.schedule not in ("auto", *PAIRED):
        refuse(
            "overlap_needs_pairs",
            "interleaves the forward pass of a microbatch with the backward pass of "
            f"another, and schedule={parallel.schedule} has no such pairs; use 1f1b, or "
            "interleaved with vpp > 1",
        )
    if parallel.zero == 3:
        refuse(
            "overlap_excludes_zero3",
            "runs two passes through a layer at once, and zero=3 frees the gathered weights "
            "at the end of each; use zero=1",
        )
    if parallel.dp != "auto":
        samples = config.training.micro_batch_size * parallel.dp
        batch_size = config.training.global_batch_size
        if batch_size < 2 * samples:
            refuse(
                "overlap_needs_microbatches",
                f"needs two microbatches in a step, and global_batch_size={batch_size} is "
                f"one of dp x micro_batch_size = {samples} samples; use at least {2 * samples}",
            )
    return problems


def _shape_problems(model: ModelConfig, moe: MoEConfig) -> list[Problem]:
    problems = []
    if model.linear_bias:
        detail = "experts have no biases in this version; set linear_bias to false"
        problems.append(Problem("/model/linear_bias", "experts_bias", detail))
    # A list names every layer, MTP layers excepted.
    pattern = moe.layer_pattern
    if not isinstance(pattern, LayerPattern) and len(pattern) != model.num_layers:
        detail = (
            f"layer_pattern has {len(pattern)} entries for num_layers={model.num_layers}; "
            "give one per layer"
        )
        problems.append(Problem("/model/moe/layer_pattern", "layer_pattern", detail))
    elif model.mlp_bias and not model.has_plain_mlp:
        detail = (
            "mlp_bias has no effect: every layer has routed experts only, and these have no "
            "biases; leave it out"
        )
        problems.append(Problem("/model/mlp_bias", "experts_bias", detail))
    return problems


def _routing_problems(moe: MoEConfig) -> list[Problem]:
    problems = []
    if moe.top_k > moe.num_experts:
        detail = f"top_k={moe.top_k} is more than num_experts={moe.num_experts}; lower it"
        problems.append(Problem("/model/moe/top_k", "top_k", detail))
    # A constant weight has no gradient.
    if moe.score_function == "softmax" and moe.top_k == 1 and not moe.pre_softmax:
        detail = (
            "top_k=1 with softmax over the chosen experts gives every expert weight 1, so the "
            "router would not learn; set pre_softmax"
        )
        problems.append(Problem("/model/moe/pre_softmax", "router_learns", detail))
    if moe.score_function == "sigmoid" and moe.pre_softmax:
        detail = "pre_softmax has no effect with score_function=sigmoid; leave it out"
        problems.append(Problem("/model/moe/pre_softmax", "pre_softmax", detail))
    if moe.expert_bias and moe.score_function != "sigmoid":
        detail = "expert_bias needs score_function=sigmoid; set it, or use aux_loss_coeff instead"
        problems.append(Problem("/model/moe/expert_bias", "bias_needs_sigmoid", detail))
    if moe.pad_to_capacity and moe.capacity_factor is None:
        detail = "pad_to_capacity needs a capacity_factor; give one, or leave it out"
        problems.append(Problem("/model/moe/pad_to_capacity", "needs_capacity", detail))
    return problems


def _group_problems(moe: MoEConfig) -> list[Problem]:
    groups = moe.num_groups
    chosen = moe.group_top_k
    if groups is None and chosen is None:
        if moe.scores_per_group is None:
            return []
        detail = "scores_per_group ranks groups, and there are none; leave it out"
        return [Problem("/model/moe/scores_per_group", "groups", detail)]
    if groups is None or chosen is None:
        missing = "num_groups" if groups is None else "group_top_k"
        detail = "num_groups and group_top_k belong together; give both, or none"
        return [Problem(f"/model/moe/{missing}", "groups", detail)]
    if moe.num_experts % groups:
        detail = (
            f"num_groups={groups} does not divide num_experts={moe.num_experts}; use one that "
            "does"
        )
        return [Problem("/model/moe/num_groups", "groups", detail)]
    group_size = moe.num_experts // groups
    if moe.scores_per_group is not None:
        return _ranked_group_problems(moe, groups, chosen, moe.scores_per_group)
    # A group is ranked by its best top_k / group_top_k scores, so it needs that many
    # experts.
    if chosen > groups or moe.top_k % chosen or moe.top_k // chosen > group_size:
        detail = (
            f"group_top_k={chosen} must be at most num_groups={groups} and divide "
            f"top_k={moe.top_k}, and each of those groups of {group_size} experts must have "
            "top_k / group_top_k of them; change one"
        )
        return [Problem("/model/moe/group_top_k", "groups", detail)]
    return []


def _ranked_group_problems(
    moe: MoEConfig, groups: int, chosen: int, num_scores: int
) -> list[Problem]:
    """Returns problems of groups that a given number of scores ranks."""
    group_size = moe.num_experts // groups
    if num_scores > group_size:
        detail = (
            f"scores_per_group={num_scores} is more than the {group_size} experts of a group; "
            "lower it"
        )
        return [Problem("/model/moe/scores_per_group", "groups", detail)]
    if chosen > groups or moe.top_k > chosen * group_size:
        detail = (
            f"group_top_k={chosen} must be at most num_groups={groups}, and that many groups "
            f"of {group_size} experts must have top_k={moe.top_k} of them; change one"
        )
        return [Problem("/model/moe/group_top_k", "groups", detail)]
    return []

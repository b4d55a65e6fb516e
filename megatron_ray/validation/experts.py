"""Rules of mixtures of experts.

Owns: what experts ask of the layout, and routers of themselves. Pure. Must not know:
the world's size.
"""

from megatron_ray.config.moe import LayerPattern, MoEConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def experts(config: TrainConfig) -> list[Problem]:
    """Expert parallelism and the mixture itself."""
    parallel = config.parallel
    moe = config.model.moe
    model = config.model
    if moe is None:
        given = {
            "ep": parallel.ep if parallel.ep > 1 else None,
            "etp": parallel.etp if parallel.etp not in (None, 1, parallel.tp) else None,
        }
        return [
            Problem(
                f"/parallel/{name}",
                "needs_experts",
                f"{name}={degree} needs a model with experts; give model.moe, or leave it out",
            )
            for name, degree in given.items()
            if degree is not None
        ]
    found = []
    if moe.num_experts % parallel.ep:
        text = (
            f"ep={parallel.ep} does not divide model.moe.num_experts={moe.num_experts}; use an "
            "ep that does"
        )
        found.append(Problem("/parallel/ep", "ep_divides", text))
    if model.expert_width % parallel.expert_tp:
        name = "etp" if parallel.etp else "tp"
        text = (
            f"{name}={parallel.expert_tp} does not divide the experts' "
            f"ffn_hidden_size={model.expert_width}; use an etp that does"
        )
        found.append(Problem(f"/parallel/{name}", "etp_divides", text))
    shared = moe.shared_expert_ffn_hidden_size
    if shared is not None and shared % parallel.tp:
        text = (
            f"tp={parallel.tp} does not divide shared_expert_ffn_hidden_size={shared}; use a "
            f"multiple of {parallel.tp}"
        )
        found.append(
            Problem("/model/moe/shared_expert_ffn_hidden_size", "tp_divides", text)
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        text = (
            f"experts with tp={parallel.tp} need each rank to have tokens of its own; set "
            "sequence_parallel, or use tp=1"
        )
        found.append(
            Problem("/parallel/sequence_parallel", "experts_need_sequence_parallel", text)
        )
    if model.linear_bias:
        found.append(
            Problem(
                "/model/linear_bias",
                "experts_bias",
                "experts have no biases in this version; set linear_bias to false",
            )
        )
    if (
        not isinstance(moe.layer_pattern, LayerPattern)
        and len(moe.layer_pattern) != model.num_layers
    ):
        text = (
            f"layer_pattern has {len(moe.layer_pattern)} entries for "
            f"num_layers={model.num_layers}; give one per layer"
        )
        found.append(Problem("/model/moe/layer_pattern", "layer_pattern", text))
    return found + _routing(moe)


def _routing(moe: MoEConfig) -> list[Problem]:
    found: list[tuple[str, str, str]] = []
    if moe.top_k > moe.num_experts:
        found.append(
            (
                "top_k",
                "top_k",
                f"top_k={moe.top_k} is more than num_experts={moe.num_experts}; lower it",
            )
        )
    if moe.score_function == "softmax" and moe.top_k == 1 and not moe.pre_softmax:
        text = (
            "top_k=1 after softmax over the chosen experts gives weight 1 to all, so the "
            "router would not learn; set pre_softmax"
        )
        found.append(("pre_softmax", "router_learns", text))
    if moe.score_function == "sigmoid" and moe.pre_softmax:
        found.append(
            (
                "pre_softmax",
                "pre_softmax",
                "pre_softmax has no meaning with score_function=sigmoid; leave it out",
            )
        )
    if moe.expert_bias and moe.score_function != "sigmoid":
        found.append(
            (
                "expert_bias",
                "bias_needs_sigmoid",
                "expert_bias needs score_function=sigmoid; set it, or use aux_loss_coeff instead",
            )
        )
    if moe.pad_to_capacity and moe.capacity_factor is None:
        found.append(
            (
                "pad_to_capacity",
                "needs_capacity",
                "pad_to_capacity needs a capacity_factor; give one, or leave it out",
            )
        )
    found += _groups(moe)
    return [Problem(f"/model/moe/{field}", code, text) for field, code, text in found]


def _groups(moe: MoEConfig) -> list[tuple[str, str, str]]:
    groups = moe.num_groups
    chosen = moe.group_top_k
    if groups is None or chosen is None:
        missing = "group_top_k" if chosen is None else "num_groups"
        given = groups is not None or chosen is not None
        return (
            [
                (
                    missing,
                    "groups",
                    "num_groups and group_top_k belong together; give both, or none",
                )
            ]
            if given
            else []
        )
    if moe.num_experts % groups:
        return [
            (
                "num_groups",
                "groups",
                f"num_groups={groups} does not divide num_experts={moe.num_experts}; use "
                "one that does",
            )
        ]
    if (
        chosen > groups
        or moe.top_k % chosen
        or moe.top_k // chosen > moe.num_experts // groups
    ):
        text = (
            f"group_top_k={chosen} must be at most num_groups={groups} and divide "
            f"top_k={moe.top_k}, and each of those groups of"
            f" {moe.num_experts // groups} experts must have top_k / group_top_k of them; "
            "change one"
        )
        return [("group_top_k", "groups", text)]
    return []

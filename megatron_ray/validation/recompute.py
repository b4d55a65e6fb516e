"""Checks activation recomputation: which fields each granularity needs, and their values.

Pure. Must not know: how many ranks there are.
"""

from typing import Any

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.pipeline_parallel.schedules.layout import LayoutError
from megatron_ray.pipeline_parallel.schedules.plan import plan_pipeline

_GRANULARITY_OF = {
    "method": "full",
    "num_layers": "full",
    "modules": "selective",
    "save": "operations",
    "every": "operations",
}
"""Field -> the granularity that it belongs to."""
_REMEDIES = {
    "method": "give uniform or block",
    "num_layers": "give a number of layers; 1 recomputes each layer by itself",
}
"""Field that granularity=full requires -> what to give."""


def recompute_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `training.recompute`."""
    recompute = config.training.recompute
    fields: dict[str, Any] = {
        "method": recompute.method,
        "num_layers": recompute.num_layers,
        "modules": recompute.modules,
        "save": recompute.save,
        "every": recompute.every,
    }
    problems = []
    for name, granularity in _GRANULARITY_OF.items():
        if fields[name] is not None and recompute.granularity != granularity:
            detail = (
                f"{name} is for granularity={granularity}, not for {recompute.granularity}; "
                "leave it out, or change granularity"
            )
            problems.append(_problem(name, detail))
    if recompute.granularity == "full":
        for name, remedy in _REMEDIES.items():
            if fields[name] is None:
                problems.append(_problem(name, f"granularity=full needs {name}; {remedy}"))
        # The number of layers can be judged only if it is given and the method is known.
        if not problems:
            problems += _layer_problems(config)
    return problems + _module_problems(config) + _save_problems(config)


def _layer_problems(config: TrainConfig) -> list[Problem]:
    num_layers = config.training.recompute.num_layers
    try:
        stages = plan_pipeline(config).contents
    except LayoutError:
        return []  # reported by the rule of pipelines
    most = max(len(stage.layers) for stage in stages)
    if num_layers is None or num_layers <= most:
        return []
    detail = (
        f"num_layers={num_layers} is more than the {most} layers of the largest stage; lower "
        "it"
    )
    return [_problem("num_layers", detail)]


def _module_problems(config: TrainConfig) -> list[Problem]:
    modules = config.training.recompute.chosen_modules
    has_dense_layers, has_expert_layers = _kinds_of_layers(config)
    problems = []
    if "mlp" in modules and not has_dense_layers:
        detail = "mlp is for layers without experts, and the model has none; leave it out"
        problems.append(_problem("modules", detail))
    if "mlp" in modules and "activation" in modules:
        problems.append(_activation_inside("mlp"))
    if "moe" in modules and not has_expert_layers:
        detail = "moe is for layers with experts, and the model has none; leave it out"
        problems.append(_problem("modules", detail))
    if "moe" in modules and "activation" in modules:
        problems.append(_activation_inside("moe"))
    return problems


def _save_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of operations that are listed although there are none."""
    recompute = config.training.recompute
    parallel = config.parallel
    # Without a list, whatever there is of all operations is saved.
    save = recompute.save or ()
    problems = []
    if save and recompute.every is not None and "products" not in save:
        detail = (
            f"every={recompute.every} chooses products, which are not in save; leave it out, "
            "or add products to save"
        )
        problems.append(_problem("every", detail))
    if "reduce_scatter" in save and parallel.tp == 1:
        detail = "reduce_scatter is for sums over tp, and tp=1 has none; leave it out"
        problems.append(_problem("save", detail))
    if "attention" in save and config.model.attention_dropout:
        detail = (
            "attention is always recomputed with "
            f"attention_dropout={config.model.attention_dropout:g}; leave it out"
        )
        problems.append(_problem("save", detail))
    _, has_expert_layers = _kinds_of_layers(config)
    is_exchanged = has_expert_layers and parallel.ep > 1
    if "all_to_all" in save and not (is_exchanged and parallel.dispatcher == "alltoall"):
        detail = (
            "all_to_all is for experts with ep > 1 and dispatcher=alltoall, here is "
            f"ep={parallel.ep}, dispatcher={parallel.dispatcher}; leave it out"
        )
        if not has_expert_layers:
            detail = "all_to_all is for layers with experts, and the model has none; leave it out"
        problems.append(_problem("save", detail))
    return problems


def _kinds_of_layers(config: TrainConfig) -> tuple[bool, bool]:
    """Returns whether the model has layers without experts, and layers with experts."""
    moe = config.model.moe
    if moe is None:
        return True, False
    if isinstance(moe.layer_pattern, list):
        return 0 in moe.layer_pattern, 1 in moe.layer_pattern
    return moe.layer_pattern.every > 1, True


def _activation_inside(module: str) -> Problem:
    detail = (
        f"activation is part of {module}, which is recomputed as a whole; leave out one of the "
        "two"
    )
    return _problem("modules", detail)


def _problem(field: str, detail: str) -> Problem:
    return Problem(f"/training/recompute/{field}", "recompute", detail)

"""Checks what the layers of Transformer Engine exclude.

Pure. Must not know: devices, whether the library is installed.
"""

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig

_CODE = "transformer_engine"


def transformer_engine_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `model.spec: transformer_engine`."""
    if config.model.spec != "transformer_engine":
        return []
    return [
        *_precision_problems(config),
        *_layout_problems(config),
        *_recompute_problems(config),
    ]


def _precision_problems(config: TrainConfig) -> list[Problem]:
    training = config.training
    problems = []
    if training.precision == "fp32":
        detail = (
            "spec=transformer_engine is for precision bf16 or fp16, not for fp32, which most "
            "of its attention does not support; set training.precision to bf16, or spec to "
            "local"
        )
        problems.append(Problem("/model/spec", _CODE, detail))
    if training.fp32_residual_connection:
        detail = (
            "fp32_residual_connection gives the first norm of a half another type than its "
            "product, and spec=transformer_engine computes both at once; leave it out, or set "
            "model.spec to local"
        )
        problems.append(Problem("/training/fp32_residual_connection", _CODE, detail))
    if training.fp8 is not None and training.fp8.recipe == "delayed":
        detail = (
            "recipe=delayed keeps scales from step to step, and those inside of "
            "spec=transformer_engine are not part of checkpoints; use current, or set "
            "model.spec to local"
        )
        problems.append(Problem("/training/fp8/recipe", _CODE, detail))
    return problems


def _layout_problems(config: TrainConfig) -> list[Problem]:
    parallel = config.parallel
    problems = []
    if parallel.zero == 3:
        detail = (
            "zero=3 frees weights that spec=transformer_engine still reads in the backward "
            "pass; use zero=1, or set model.spec to local"
        )
        problems.append(Problem("/parallel/zero", _CODE, detail))
    if parallel.schedule.startswith("zb"):
        detail = (
            f"schedule={parallel.schedule} computes gradients of weights after those of "
            "activations, and spec=transformer_engine computes both at once; use 1f1b, or "
            "set model.spec to local"
        )
        problems.append(Problem("/parallel/schedule", _CODE, detail))
    if parallel.tp_comm_overlap and parallel.tp > 1:
        detail = (
            f"tp_comm_overlap with tp={parallel.tp} cuts products of spec=local, and "
            "spec=transformer_engine multiplies and sends inside of the library; leave it "
            "out, or set model.spec to local"
        )
        problems.append(Problem("/parallel/tp_comm_overlap", _CODE, detail))
    if parallel.interleaves_passes:
        detail = (
            f"ep_comm_overlap with ep={parallel.ep} switches between two passes inside of a "
            "layer, and the library keeps the state of one of them; leave it out, or set "
            "model.spec to local"
        )
        problems.append(Problem("/parallel/ep_comm_overlap", _CODE, detail))
    return problems


def _recompute_problems(config: TrainConfig) -> list[Problem]:
    recompute = config.training.recompute
    problems = []
    if recompute.granularity == "operations":
        detail = (
            "granularity=operations keeps outputs of operations, and spec=transformer_engine "
            "computes several of them at once; use selective or full, or set model.spec to "
            "local"
        )
        problems.append(Problem("/training/recompute/granularity", _CODE, detail))
    if "norm" in recompute.chosen_modules:
        detail = (
            "norm frees the output of a norm, which spec=transformer_engine computes inside "
            "of the product that reads it; leave it out, or set model.spec to local"
        )
        problems.append(Problem("/training/recompute/modules", _CODE, detail))
    return problems

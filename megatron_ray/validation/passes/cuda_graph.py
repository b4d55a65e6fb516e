"""Checks what a CUDA graph of a step's passes excludes.

A recording has neither waits of the host nor numbers that the host computes anew in each
step. Each rule names where in the code the host does that. Pure. Must not know: devices.
"""

from collections.abc import Iterator

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig

_CODE = "cuda_graph"
_OUT = "leave training.cuda_graph out"


def cuda_graph_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `training.cuda_graph`."""
    if config.training.cuda_graph is None:
        return []
    return [
        *_batch_problems(config),
        *_layout_problems(config),
        *_expert_problems(config),
        *_dropout_problems(config),
        *_hook_problems(config),
    ]


def cuda_graph_warnings(config: TrainConfig) -> list[Problem]:
    """Returns a warning when the run ends before its passes are replayed."""
    graph = config.training.cuda_graph
    steps = config.training.num_steps
    if graph is None or graph.warmup_steps < steps:
        return []
    detail = (
        f"warmup_steps={graph.warmup_steps} is not below training.steps={steps}, so no step "
        "is replayed; lower it"
    )
    return [Problem("/training/cuda_graph/warmup_steps", "beyond_the_run", detail)]


def _batch_problems(config: TrainConfig) -> Iterator[Problem]:
    rampup = config.training.rampup_batch_size
    if rampup is not None:
        yield _problem(
            "/training/rampup_batch_size",
            f"training.cuda_graph replays one number of microbatches, and steps grow from "
            f"{rampup.start} to {config.training.global_batch_size} samples; leave "
            f"rampup_batch_size out, or {_OUT}",
        )
    if config.data.separate_documents:
        yield _problem(
            "/data/separate_documents",
            "training.cuda_graph replays kernels of fixed sizes, and the host reads the "
            "lengths of documents in every step (Packed.lengths in models/batch.py); set "
            f"separate_documents to false, or {_OUT}",
        )


def _layout_problems(config: TrainConfig) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.pp > 1:
        yield _problem(
            "/parallel/pp",
            f"training.cuda_graph needs pp=1, not {parallel.pp}: the host asks which sends "
            f"are complete (pipeline_parallel/runner.py); use pp=1, or {_OUT}",
        )
    if parallel.zero == 3:
        yield _problem(
            "/parallel/zero",
            "training.cuda_graph does not record zero=3: torch's fully_shard allocates and "
            "frees gathered weights on the host (data_parallel/full_shard.py); use zero=1, or "
            f"{_OUT}",
        )
    if parallel.overlap_param_gather:
        yield _problem(
            "/parallel/overlap_param_gather",
            "training.cuda_graph cannot wait for weights whose gathers have started before a "
            "replay, as overlap_param_gather does layer by layer "
            f"(data_parallel/weight_gathers.py); leave overlap_param_gather out, or {_OUT}",
        )
    if parallel.interleaves_passes:
        yield _problem(
            "/parallel/ep_comm_overlap",
            "training.cuda_graph records the passes of one thread, and ep_comm_overlap runs "
            "two at once, each on its own (distributed/interleaver.py); leave ep_comm_overlap "
            f"out, or {_OUT}",
        )
    if config.model.spec == "transformer_engine":
        yield _problem(
            "/model/spec",
            "training.cuda_graph does not record spec=transformer_engine, which keeps state "
            "of its passes on the host (parallelize/transformer_engine); set model.spec to "
            f"local, or {_OUT}",
        )


def _expert_problems(config: TrainConfig) -> Iterator[Problem]:
    moe = config.model.moe
    if moe is None or moe.pad_to_capacity:
        return
    given = "without capacity_factor"
    remedy = "give capacity_factor and set pad_to_capacity to true"
    if moe.capacity_factor is not None:
        given = f"with capacity_factor={moe.capacity_factor:g} alone"
        remedy = "set pad_to_capacity to true"
    yield _problem(
        "/model/moe/pad_to_capacity",
        f"training.cuda_graph needs experts of fixed sizes, and {given} the host reads the "
        f"rows of each expert (expert_parallel/dispatch.py); {remedy}, or {_OUT}",
    )


def _dropout_problems(config: TrainConfig) -> Iterator[Problem]:
    model = config.model
    rates = {
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
    }
    for name, rate in rates.items():
        if rate:
            yield _problem(
                f"/model/{name}",
                f"training.cuda_graph would drop the same elements in every step: the host "
                f"seeds the masks of {name}={rate:g} by sample (models/dropout.py); use 0, or "
                f"{_OUT}",
            )


def _hook_problems(config: TrainConfig) -> Iterator[Problem]:
    callbacks = config.callbacks
    if callbacks.activations is not None:
        yield _problem(
            "/callbacks/activations",
            "training.cuda_graph runs no hooks in the steps that it replays, and activations "
            "measures in hooks (training/callbacks/activation_monitor.py); leave activations "
            f"out, or {_OUT}",
        )
    for name in callbacks.installed:
        yield _problem(
            f"/callbacks/installed/{name}",
            f"training.cuda_graph runs no hooks in the steps that it replays, and callback "
            f"{name} may register some (begin_step in training/callbacks/protocol.py); leave "
            f"it out, or {_OUT}",
        )


def _problem(pointer: str, detail: str) -> Problem:
    return Problem(pointer, _CODE, detail)

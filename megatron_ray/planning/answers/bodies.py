"""Makes the bodies of plans and suggestions: what users read, as JSON has it.

Owns: their fields and notes, wherever a plan is made. Pure. Must not know: a cluster,
HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.answers import estimates
from megatron_ray.planning.answers.estimates import Estimates
from megatron_ray.planning.communication import most_kept_bytes, most_mean_sync_bytes
from megatron_ray.planning.hardware import Hardware
from megatron_ray.planning.memory import NUM_PEER_COPIES, peer_copies_bytes
from megatron_ray.planning.suggest import Suggestion, suggest
from megatron_ray.planning.tally import Tally
from megatron_ray.validation import check, resolution
from megatron_ray.validation.parameters.groups import group_notes
from megatron_ray.validation.parameters.matrices import matrix_notes
from megatron_ray.validation.storage.disk_space import num_checkpoints

_GIB = 2**30
_MIB = 2**20
_PRECISIONS = ("bf16", "fp32")
"""Values of training.precision, the one to suggest first."""

_FP8_RECIPES = ("current", "delayed", "blockwise", "mxfp8")
"""Values of training.fp8.recipe, the one to suggest first."""


def plan_body(
    config: TrainConfig,
    hardware: Hardware | None,
    *,
    fits: bool | None,
    room: int | None = None,
    new_nodes: Mapping[str, int] = MappingProxyType({}),
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the plan of a resolved config.

    `fits`, `room`, `new_nodes`, `problems` and `notes` are those of the place where it
    would run; notes about the estimates are added.
    """
    estimate = estimates.estimates(config, hardware)
    return {
        "object": "plan",
        "resolved_spec": config.model_dump(mode="json"),
        "world_size": resolution.world_size(config),
        "ranks": estimates.rank_map(config),
        "num_checkpoints": num_checkpoints(config),
        "hardware": hardware and hardware.name,
        "fits": fits,
        "room": room,
        "new_nodes": dict(new_nodes),
        "problems": [asdict(problem) for problem in problems],
        "notes": [
            *notes,
            *_spec_notes(config),
            *_estimate_notes(config, hardware, estimate),
            *_graph_notes(config, hardware, estimate),
            *_copy_notes(config),
            *_sync_notes(config),
        ],
        **_estimated(estimate),
    }


def suggestions_body(
    config: TrainConfig, world_size: int, hardware: Hardware, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the fastest layouts of a config on `world_size` ranks, and their notes."""
    all_notes = []
    layouts: list[Suggestion] = []
    complete = estimates.with_vocabulary(config)
    precision = config.training.precision
    # Memory cannot be computed without a vocabulary, so no layout can be judged.
    if complete is None:
        all_notes.append(
            "no estimate before the tokenizer's file is read; set model.vocab_size"
        )
    elif precision not in hardware.efficiencies:
        all_notes.append(
            f"no {precision} timings for {hardware.name}, so layouts cannot be compared; "
            f"{_precision_remedy(hardware)}"
        )
    else:
        layouts = suggest(complete, world_size, hardware)
        if not layouts:
            all_notes.append(
                f"no layout that was tried fits on {world_size} ranks; use more ranks, zero=3 "
                "or a smaller model"
            )
    return {
        "object": "plan.suggestions",
        "world_size": world_size,
        "hardware": hardware.name,
        "data": [_suggestion(layout) for layout in layouts],
        "notes": [*all_notes, *notes],
    }


# ---- parts of the bodies


def _estimated(estimate: Estimates | None) -> dict[str, Any]:
    """Returns the fields of a plan that are estimated; None for those that cannot be."""
    fields: dict[str, Any] = dict.fromkeys(
        ("memory", "communication", "checkpoint_bytes", "bubble_share", "time")
    )
    if estimate is None:
        return fields
    fields["memory"] = {
        **asdict(estimate.memory),
        "total_bytes_estimate": estimate.memory.total_bytes,
        "vocab_size": estimate.vocab_size,
    }
    fields["checkpoint_bytes"] = estimate.checkpoint_bytes
    fields["bubble_share"] = estimate.bubble_share
    if estimate.communication is not None:
        fields["communication"] = _traffic(estimate.communication)
    if estimate.time is not None:
        fields["time"] = asdict(estimate.time)
    return fields


def _traffic(tally: Tally) -> list[dict[str, Any]]:
    entries = []
    for (axis, kind), size in tally.bytes.items():
        operations = tally.operations[axis, kind]
        entries.append(
            {"axis": axis, "kind": kind, "operations": operations, "bytes": size}
        )
    return entries


def _suggestion(layout: Suggestion) -> dict[str, Any]:
    return {
        "changes": layout.changes,
        "total_bytes_estimate": layout.memory.total_bytes,
        "time": asdict(layout.time),
    }


# ---- notes


def _spec_notes(config: TrainConfig) -> list[str]:
    notes = []
    if config.training.epochs is not None:
        notes.append(
            "the number of steps of training.epochs follows from the data: `data prepare` "
            "shows it, and so does the job once its data are prepared"
        )
    for warning in check.find_warnings(config):
        notes.append(f"warning: {warning.pointer}: {warning.detail}")
    return notes + matrix_notes(config) + group_notes(config)


def _estimate_notes(
    config: TrainConfig, hardware: Hardware | None, estimate: Estimates | None
) -> list[str]:
    if estimate is None:
        return [
            "no memory estimate before the tokenizer's file is read; set model.vocab_size"
        ]
    notes = []
    if estimate.memory.offloaded_bytes:
        notes.append(
            f"optimizer.offload: {estimate.memory.offloaded_bytes / _GIB:.2g} GiB of host "
            "memory per rank, outside of the memory estimate; a node needs it for each of "
            "its ranks, and every step copies it to the device and back"
        )
    # Each note belongs to a field of the plan that is null.
    if estimate.communication is None:
        notes.append("communication is not counted with zero=3, where torch does it")
    if hardware is None:
        notes.append("memory is estimated for GPUs: the cluster's device is unknown")
        notes.append("no time estimate: the cluster's device is unknown; set hardware")
    elif estimate.time is None:
        notes.append(
            f"no time estimate: no {config.training.precision} timings for "
            f"{hardware.name}; {_precision_remedy(hardware)}"
        )
    return [*notes, *_assumption_notes(config, hardware), *_kernel_notes(config, hardware)]


def _graph_notes(
    config: TrainConfig, hardware: Hardware | None, estimate: Estimates | None
) -> list[str]:
    """Returns what a CUDA graph of a step's passes costs."""
    if config.training.cuda_graph is None or estimate is None:
        return []
    if hardware is not None and hardware.device.type != "cuda":
        return [
            f"training.cuda_graph: {hardware.name} records nothing; the same code runs the "
            "passes of every step"
        ]
    size = estimate.memory.activations_bytes_estimate / _GIB
    return [
        f"training.cuda_graph: replays keep the {size:.2g} GiB of activations between steps "
        "too; what evaluations and updates allocate comes on top of the memory estimate"
    ]


def _copy_notes(config: TrainConfig) -> list[str]:
    """Returns what copies of the ranks' states cost."""
    complete = estimates.with_vocabulary(config)
    if config.checkpoint.peer_every_steps is None or complete is None:
        return []
    if resolution.world_size(config) == 1:
        return [
            "checkpoint.peer_every_steps has no effect: a single rank has no partner to keep "
            "copies of its state"
        ]
    size = peer_copies_bytes(complete) / _GIB
    return [
        f"checkpoint.peer_every_steps: copies take up to {size:.2g} GiB of host memory per "
        f"rank, outside of the memory estimate; a node needs it for each of its ranks"
    ]


def _sync_notes(config: TrainConfig) -> list[str]:
    """Returns what replica groups send to each other when they synchronize."""
    complete = estimates.with_vocabulary(config)
    if config.parallel.local_sgd is None or complete is None:
        return []
    size = most_mean_sync_bytes(complete) / _MIB
    notes = [
        f"parallel.local_sgd: a rank averages up to {size:.3g} MiB of weights and moments per "
        "step with other replica groups, on average over many steps, beside its communication"
    ]
    if config.parallel.jobs > 1:
        kept = most_kept_bytes(complete) / _MIB
        state = peer_copies_bytes(complete) // NUM_PEER_COPIES / _MIB
        place = "on the device, when there are no activations"
        if config.optimizer.offload:
            place = "in host memory"
        notes.append(
            f"parallel.local_sgd.rendezvous: averages are kept until all ranks have them, up "
            f"to {kept:.3g} MiB per rank {place}; a job that gives or takes a state needs "
            f"{state:.3g} MiB of host memory per rank meanwhile; the estimates of memory and "
            "of step time include neither these nor the links between jobs"
        )
    return notes


def _precision_remedy(hardware: Hardware) -> str:
    """Returns the precision to set for which the device has timings."""
    for precision in _PRECISIONS:
        if precision in hardware.efficiencies:
            return f"set training.precision={precision}"
    return "name another device"


def _kernel_notes(config: TrainConfig, hardware: Hardware | None) -> list[str]:
    """Returns which kernels of a spec a device does not have."""
    if hardware is None:
        return []
    is_local = config.model.spec == "local"
    if not is_local and hardware.device.type != "cuda":
        return [
            f"{hardware.name} does not run transformer_engine, and no rank starts there; set "
            "model.spec to local"
        ]
    fp8 = config.training.fp8
    if fp8 is None or hardware.device.multiplies_fp8(fp8.recipe):
        return []
    if is_local:
        return [_emulation_note(fp8.recipe, hardware)]
    return [
        f"{hardware.name} does not multiply in FP8 with recipe={fp8.recipe}, which "
        "transformer_engine does not emulate, and no rank starts there; use another recipe, "
        "or set model.spec to local"
    ]


def _emulation_note(given: str, hardware: Hardware) -> str:
    """Returns that a device has no kernel for a recipe, and which recipes it has."""
    others = []
    for recipe in _FP8_RECIPES:
        if hardware.device.multiplies_fp8(recipe):
            others.append(recipe)
    remedy = "leave training.fp8 out for speed"
    if others:
        remedy = f"for speed set training.fp8.recipe to {others[0]}"
    return (
        f"{hardware.name} does not multiply in FP8 with recipe={given}: the products have its "
        f"numbers, and are slower than in bf16; {remedy}"
    )


def _assumption_notes(config: TrainConfig, hardware: Hardware | None) -> list[str]:
    """Returns what the memory estimate assumes of a device that its name leaves open."""
    if (
        hardware is None
        or hardware.device.type != "cpu"
        or config.training.precision != "bf16"
    ):
        return []
    # Which kernel attends in bf16 depends on the processor's instructions.
    if hardware.device.bf16_products:
        return ["memory is estimated for CPUs with bf16 products; others keep other bytes"]
    return ["memory is estimated for CPUs without bf16 products; others keep other bytes"]

"""Plans a config from itself alone, for a device that need not be anywhere.

Owns: what is judged without a cluster: the layout, the batch, memory and islands. Pure.
Must not know: paths, jobs, HTTP.
"""

from collections.abc import Sequence
from typing import Any

from megatron_ray.config.errors.messages import suggestion
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.answers import estimates
from megatron_ray.planning.answers.bodies import plan_body, suggestions_body
from megatron_ray.planning.hardware import HARDWARE, Hardware
from megatron_ray.validation import resolution


def unknown_hardware(name: str) -> str:
    """Returns the message for a device that is not in the tables."""
    hint = suggestion(name.upper(), HARDWARE) or f"known: {', '.join(HARDWARE)}"
    return f"unknown hardware {name[:80]!r}; {hint}"


def fewest_ranks(config: TrainConfig) -> int:
    """Returns the ranks of the smallest world that the config can run in."""
    parallel = config.parallel
    dp = parallel.dp
    if dp == "auto":
        dp = resolution.least_dp(config)
    return parallel.tp * parallel.pp * parallel.cp * dp


def misfits(resolved: TrainConfig, hardware: Hardware) -> list[Problem]:
    """Returns why a resolved config does not fit on any number of devices of a kind."""
    tp = resolved.parallel.tp
    # CPUs are cores here, of which a node may have any number.
    if hardware.memory_bytes is not None and tp > hardware.node_size:
        detail = (
            f"tp={tp} ranks must share a node, and a node has {hardware.node_size} "
            f"{hardware.name}; lower tp"
        )
        return [Problem("/parallel/tp", "island_fits", detail)]
    return estimates.check_memory(resolved, hardware)


def make_plan(
    config: TrainConfig,
    hardware: Hardware | None,
    ranks: int | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the plan of a config without problems, from itself alone.

    `notes` are added to those of the plan.
    """
    resolved = resolution.resolve(config, ranks or fewest_ranks(config))
    notes = [
        "planned from the spec alone: neither its paths nor a cluster were looked at",
        *notes,
    ]
    if ranks is None and config.parallel.dp == "auto":
        notes.append(
            f"dp: auto counts as {resolved.parallel.dp}, the least; set --ranks for more"
        )
    return device_plan(resolved, hardware, ranks, notes=notes)


def device_plan(
    resolved: TrainConfig,
    hardware: Hardware | None,
    ranks: int | None,
    *,
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the plan of a resolved config for devices of one kind.

    `ranks` is their number; None stands for as many as are needed.
    """
    problems = list(problems)
    notes = list(notes)
    num_ranks = resolution.world_size(resolved)
    if ranks is not None and num_ranks < ranks:
        notes.append(f"the layout and the batch use {num_ranks} of {ranks} ranks")
    if hardware is not None:
        problems += misfits(resolved, hardware)
    # Whether a cluster has room for the ranks is unknown.
    fits = None
    if problems:
        fits = False
    elif hardware is not None and _is_memory_known(resolved, hardware):
        notes.append(f"every rank fits into the memory of one {hardware.name}")
    return plan_body(resolved, hardware, fits=fits, problems=problems, notes=notes)


def _is_memory_known(config: TrainConfig, hardware: Hardware) -> bool:
    if hardware.memory_bytes is None:
        return False
    return estimates.with_vocabulary(config) is not None


def make_suggestions(
    config: TrainConfig, hardware: Hardware, ranks: int | None
) -> dict[str, Any]:
    """Returns the fastest layouts of a config, from itself alone."""
    notes = []
    if ranks is None:
        notes.append(
            f"{fewest_ranks(config)} ranks are the least that the job needs; set --ranks for "
            "more"
        )
    return suggestions_body(config, ranks or fewest_ranks(config), hardware, notes)

"""Reads the variables that Slurm sets for the processes that srun starts.

Owns: their names and formats, and the address of the store, which Slurm does not set.
Must not know: how the environment is read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_PORT = 20000
_NUM_PORTS = 10000
"""Ports below those that Linux gives to clients."""


@dataclass(frozen=True)
class SlurmTask:
    """One process of a job step."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    first_node: str
    port: int
    """Port for a server of this job step, the same for all of its processes."""


def is_started_by_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process.

    A batch script has most of the variables too, but is not a process of a step.
    """
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ


def read_task(environ: Mapping[str, str]) -> SlurmTask:
    """Returns the process that the variables describe. Raises ValueError."""
    node_rank = _number(environ, "SLURM_NODEID")
    tasks = _tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if node_rank >= len(tasks):
        raise ValueError(
            f"SLURM_NODEID={node_rank} is outside the {len(tasks)} nodes of "
            "SLURM_STEP_TASKS_PER_NODE"
        )
    step = _number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID")
    return SlurmTask(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_NTASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        first_node=_first_node(_text(environ, "SLURM_STEP_NODELIST")),
        port=_FIRST_PORT + step % _NUM_PORTS,
    )


def _tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks of each node, from a text such as `8(x2),4`."""
    tasks = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text!r} has an unknown format")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _first_node(text: str) -> str:
    """Returns the first name of a list such as `gpu[007-012,20],login1`."""
    # Commas inside brackets separate numbers, not names.
    match = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", text)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={text!r} has an unknown format")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def _text(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise ValueError(f"{name} is not set although others of srun's variables are")
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is not a whole number")
    return int(text)

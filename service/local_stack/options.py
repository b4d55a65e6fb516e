"""Defines the options of a local stack."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StackOptions:
    """Options of `megatron-ray up`."""

    data_dir: Path
    num_cpus: int | None = None
    """CPUs that Ray may schedule. None: all CPUs of the machine, at least 2."""
    ready_timeout_s: float = 120.0
    """Longest wait for the service, and then for agent and Ray, in seconds."""
    job_grace_s: float = 20.0
    """Seconds that jobs may take to pause before their processes are killed."""
    # Both command lines are options so that tests can run stand-ins.
    service_command: tuple[str, ...] = (sys.executable, "-m", "service.main")
    agent_command: tuple[str, ...] = (sys.executable, "-m", "workers.agent")

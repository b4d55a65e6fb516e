"""The process environment of agent, driver and ranks.

Owns: reading and writing it, priorities. Must not know: torch, Ray's API, HTTP.

No other file under workers/ or megatron_ray/ touches the environment. System names
cannot come from a job spec, and secrets come from mounted files, so neither Ray's
dashboard nor a log ever shows one.
"""

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from workers.exceptions import WorkersError

AGENT_TOKEN = "MEGATRON_RAY_AGENT_TOKEN"
AGENT_TOKEN_FILE = "MEGATRON_RAY_AGENT_TOKEN_FILE"

_SIOCGIFADDR = 0x8915  # Linux: address of a network interface


class ProcessEnvironmentError(WorkersError):
    """A variable that must be there is missing or malformed; the text names it and the
    remedy.
    """


@dataclass(frozen=True)
class RankEnv:
    """Where one rank stands, in torchrun's words."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int = 0
    master_addr: str | None = None
    """Host of the store; None when the store is handed over as a value."""
    master_port: int | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Self:
        """What torchrun exported; a process started without torchrun is the only rank
        of its world.

        Raises ProcessEnvironmentError.
        """
        source = os.environ if environ is None else environ
        if "RANK" not in source and "WORLD_SIZE" not in source:
            return cls(rank=0, world_size=1, local_rank=0, local_world_size=1)
        found = cls(
            rank=_integer(source, "RANK"),
            world_size=_integer(source, "WORLD_SIZE"),
            local_rank=_integer(source, "LOCAL_RANK"),
            local_world_size=_integer(source, "LOCAL_WORLD_SIZE"),
            node_rank=_integer(source, "GROUP_RANK", "NODE_RANK"),
            master_addr=source.get("MASTER_ADDR"),
            master_port=_integer(source, "MASTER_PORT"),
        )
        if not 0 <= found.rank < found.world_size:
            raise ProcessEnvironmentError(
                f"RANK={found.rank} is outside WORLD_SIZE={found.world_size}; start ranks "
                "with torchrun"
            )
        return found

    def to_environ(self) -> dict[str, str]:
        """The same as variables; what libraries below torch read."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "NODE_RANK": self.node_rank,
            "GROUP_RANK": self.node_rank,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    def export(self) -> None:
        """Writes the variables into this process's environment."""
        os.environ.update(self.to_environ())


def _integer(source: Mapping[str, str], *names: str) -> int:
    for name in names:
        if name in source:
            try:
                return int(source[name])
            except ValueError:
                raise ProcessEnvironmentError(
                    f"{name}={source[name]!r} is not a whole number; start ranks with torchrun"
                ) from None
    raise ProcessEnvironmentError(
        f"{names[0]} is not set although others of torchrun's variables are; start ranks "
        "with torchrun"
    )


def prepare_process(num_threads: int, address: str | None = None) -> None:
    """Settings that must be there before torch is imported: threads per rank, gloo's
    interface.

    An operator's own choice wins.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(max(1, num_threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    interface = interface_of(address) if address else None
    if interface:
        # Else gloo asks the host name for an address, which pods and laptops often
        # answer wrongly.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def see_gpu(index: int) -> None:
    """Makes one GPU of the node this process's only one; before CUDA is used."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index)


def run_before_others() -> None:
    """Gives this process the ordinary priority where that is permitted: all its
    threads, for they share the interpreter's lock.

    Ray starts its workers at niceness 15, so that anything else on a node takes the
    processor from a rank and, with it, from every other rank. Where a process may not
    raise itself the cluster must be started with RAY_worker_niceness=0.
    """
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread), 0)


def let_ranks_go_first() -> None:
    """Lowers the calling thread, and those it starts, below the ranks on its node."""
    os.nice(10)


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an IPv4 address; None when there is none
    (or this is not Linux).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def agent_token(
    token_file: Path | None = None, environ: Mapping[str, str] | None = None
) -> str:
    """The agent's token, from a file (given, or named by the environment) or from the
    environment.

    Raises ProcessEnvironmentError.
    """
    source = os.environ if environ is None else environ
    named = source.get(AGENT_TOKEN_FILE)
    path = token_file or (Path(named) if named else None)
    if path is not None:
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise ProcessEnvironmentError(
                f"cannot read the agent's token file {path}: {error.strerror}"
            ) from error
    else:
        token = source.get(AGENT_TOKEN, "").strip()
    if not token:
        raise ProcessEnvironmentError(
            f"no agent token: give --token-file, or set {AGENT_TOKEN_FILE} or {AGENT_TOKEN}"
        )
    return token


def prepare_ray_client() -> None:
    """Makes explicit what Ray would otherwise decide from files and history of this
    machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_AUTH_MODE",
        "token"
        if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        else "disabled",
    )


def forget_agent_token() -> None:
    """Removes the token from this process's environment, so that nothing started from
    here inherits it.
    """
    os.environ.pop(AGENT_TOKEN, None)

"""Reads and writes the process environment of agent, driver and ranks.

Owns: environment variables, GPU visibility, process priority. Must not know: torch, Ray's
API, HTTP.

No other file under workers/ or megatron_ray/ reads or writes the environment. A job
spec cannot set variables, and secrets are read from mounted files, so neither Ray's
dashboard nor a log ever contains one.
"""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_ray.exceptions import InputError
from workers.exceptions import WorkersError
from workers.rank.slurm import is_started_by_srun, read_task

AGENT_TOKEN = "MEGATRON_RAY_AGENT_TOKEN"
AGENT_TOKEN_FILE = "MEGATRON_RAY_AGENT_TOKEN_FILE"

CREDENTIALS_DIR = "MEGATRON_RAY_CREDENTIALS_DIR"
DEFAULT_CREDENTIALS_DIR = "/etc/megatron-ray/credentials"

_CREDENTIAL_VALUES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
"""Variables that object stores' libraries read, each from a file of that name."""
_CREDENTIAL_FILES = ("GOOGLE_APPLICATION_CREDENTIALS",)
"""Variables whose value is the path of such a file."""
_SIOCGIFADDR = 0x8915  # Linux ioctl: IPv4 address of a network interface
_SIOCGIFNETMASK = 0x891B  # and the mask of its network
_IPV6_INTERFACES = Path("/proc/net/if_inet6")
_LOWER_PRIORITY = 10
"""Niceness added to processes that must not slow down the ranks on their node."""


class ProcessEnvironmentError(WorkersError):
    """A variable is missing or malformed; the message names it and the remedy."""


class CredentialsError(InputError):
    """Credentials that a spec names cannot be used on this node."""


class InterfaceError(InputError):
    """A node lacks the network interface that a spec names."""


@dataclass(frozen=True)
class RankEnv:
    """Rank, world size and rendezvous of one process, named as by torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int = 0
    master_addr: str | None = None
    """Host of the store; None if the store's address is passed otherwise."""
    master_port: int | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Reads torchrun's variables, or Slurm's in a process that srun has started.

        Without them, the process is the only rank. Raises ProcessEnvironmentError.
        """
        if environ is None:
            environ = os.environ
        # torchrun sets all of them. A single one is an error and must not silently mean a
        # world of one rank.
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            if is_started_by_srun(environ):
                return cls._from_slurm(environ)
            return cls(rank=0, world_size=1, local_rank=0, local_world_size=1)
        env = cls(
            rank=_integer(environ, "RANK"),
            world_size=_integer(environ, "WORLD_SIZE"),
            local_rank=_integer(environ, "LOCAL_RANK"),
            local_world_size=_integer(environ, "LOCAL_WORLD_SIZE"),
            # torchrun exports GROUP_RANK; other launchers call it NODE_RANK.
            node_rank=_integer(environ, "GROUP_RANK", "NODE_RANK"),
            master_addr=environ.get("MASTER_ADDR"),
            master_port=_integer(environ, "MASTER_PORT"),
        )
        if not 0 <= env.rank < env.world_size:
            raise ProcessEnvironmentError(
                f"RANK={env.rank} is outside WORLD_SIZE={env.world_size}; start ranks with "
                "torchrun"
            )
        return env

    @classmethod
    def _from_slurm(cls, environ: Mapping[str, str]) -> Self:
        try:
            task = read_task(environ)
        except ValueError as error:
            raise ProcessEnvironmentError(f"{error}; start ranks with srun") from error
        port = task.port
        if "MASTER_PORT" in environ:
            port = _integer(environ, "MASTER_PORT")
        return cls(
            rank=task.rank,
            world_size=task.world_size,
            local_rank=task.local_rank,
            local_world_size=task.local_world_size,
            node_rank=task.node_rank,
            master_addr=environ.get("MASTER_ADDR", task.first_node),
            master_port=port,
        )

    def to_environ(self) -> dict[str, str]:
        """Returns the variables that torchrun would export; torch's libraries read them."""
        variables = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "NODE_RANK": str(self.node_rank),
            "GROUP_RANK": str(self.node_rank),
        }
        if self.master_addr is not None:
            variables["MASTER_ADDR"] = self.master_addr
        if self.master_port is not None:
            variables["MASTER_PORT"] = str(self.master_port)
        return variables

    def export(self) -> None:
        """Writes the variables into this process's environment."""
        os.environ.update(self.to_environ())


def _integer(environ: Mapping[str, str], *names: str) -> int:
    """Returns the first of the variables that is set, as a whole number."""
    for name in names:
        if name in environ:
            try:
                return int(environ[name])
            except ValueError:
                raise ProcessEnvironmentError(
                    f"{name}={environ[name]!r} is not a whole number; start ranks with torchrun"
                ) from None
    raise ProcessEnvironmentError(
        f"{names[0]} is not set although others of torchrun's variables are; start ranks "
        "with torchrun"
    )


def prepare_process(num_threads: int, address: str | None = None) -> None:
    """Sets the variables that torch and gloo read when they are imported.

    `address` is this node's address. An operator's own choice of gloo interface and
    tokenizer parallelism wins.
    """
    # Overwritten: Ray sets OMP_NUM_THREADS to the CPUs that an actor requests, and a
    # spare requests none.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(max(1, num_threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    interface = interface_of(address) if address else None
    if interface:
        # Otherwise gloo resolves the host name, which pods and laptops often map to
        # an address that other nodes cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def fix_kernels() -> None:
    """Has cuBLAS and NCCL compute the same bits each time; before either is used.

    What a user has set stays.
    """
    # torch refuses cuBLAS in its deterministic mode without a fixed workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Switches add in the order of arrival.
    os.environ.setdefault("NCCL_ALGO", "^NVLS")


def set_visible_gpu(index: int) -> None:
    """Makes one GPU of the node the only one visible; call it before CUDA is used."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index)


def raise_priority() -> None:
    """Gives all threads of this process the ordinary priority, where permitted.

    Ray starts its workers at niceness 15, so any other process on a node would delay a
    rank and, through its collectives, all other ranks. Where a process may not raise
    its own priority, start the cluster with RAY_worker_niceness=0.
    """
    # All threads, not only the training thread: a low-priority thread that holds the
    # interpreter's lock would block the others.
    for thread_id in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread_id), 0)


def lower_priority() -> None:
    """Lowers the calling thread, and threads it starts, below ranks on the node."""
    os.nice(_LOWER_PRIORITY)


def choose_interface(name: str | None) -> None:
    """Makes gloo and NCCL use a network interface; None leaves the choice as it is.

    Raises InterfaceError when the node has none of that name.
    """
    if name is None:
        return
    known = sorted(known for _, known in socket.if_nameindex())
    if name not in known:
        raise InterfaceError(
            f"/network/interface: node {socket.gethostname()} has no network interface "
            f"{name!r}; it has {', '.join(known)}"
        )
    os.environ.update(interface_variables(name))


def interface_variables(name: str) -> dict[str, str]:
    """Returns the variables from which gloo and NCCL take their network interface."""
    # NCCL takes a plain name as the beginning of one.
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def own_address() -> str:
    """Returns the address at which processes of other jobs reach this one.

    That of gloo's network interface where one is chosen, else that of the node's name, and
    of the loopback for a node whose name has none.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface is not None:
        network = _network_of(interface)
        if network is not None:
            return str(network.ip)
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Returns the name of the network interface with an address of this node.

    None if there is none, or the system is not Linux.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(parsed, ipaddress.IPv6Address):
        return _interface_of_ipv6(parsed)
    networks = {}
    for _, name in socket.if_nameindex():
        network = _network_of(name)
        if network is not None:
            networks[name] = network
    for name, network in networks.items():
        if network.ip == parsed:
            return name
    # A further address of an interface, such as 127.0.0.2.
    for name, network in networks.items():
        if parsed in network.network:
            return name
    return None


def _network_of(interface: str) -> ipaddress.IPv4Interface | None:
    """Returns an interface's first IPv4 address and its network."""
    parts = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for number in (_SIOCGIFADDR, _SIOCGIFNETMASK):
            request = struct.pack("256s", interface.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), number, request)
            except OSError:
                return None  # an interface without an IPv4 address
            # struct ifreq: 16 bytes of name, 2 of family, 2 of port, then the address.
            parts.append(socket.inet_ntoa(reply[20:24]))
    return ipaddress.IPv4Interface("/".join(parts))


def _interface_of_ipv6(address: ipaddress.IPv6Address) -> str | None:
    try:
        lines = _IPV6_INTERFACES.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        # Address in hex, index, prefix length, scope, flags, name.
        digits, *_, name = line.split()
        if int(digits, 16) == int(address):
            return name
    return None


def agent_token(
    token_file: Path | None = None, environ: Mapping[str, str] | None = None
) -> str:
    """Returns the agent's token.

    It is read from `token_file`, else from the file that the environment names, else from
    the environment. Raises ProcessEnvironmentError.
    """
    if environ is None:
        environ = os.environ
    path = token_file
    if path is None and environ.get(AGENT_TOKEN_FILE):
        path = Path(environ[AGENT_TOKEN_FILE])
    if path is None:
        token = environ.get(AGENT_TOKEN, "").strip()
    else:
        token = _read_token(path)
    if not token:
        raise ProcessEnvironmentError(
            f"no agent token: give --token-file, or set {AGENT_TOKEN_FILE} or {AGENT_TOKEN}"
        )
    return token


def _read_token(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip()
    except OSError as error:
        raise ProcessEnvironmentError(
            f"cannot read the agent's token file {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ProcessEnvironmentError(
            f"the agent's token file {path} is not a text file"
        ) from error


def unset_agent_token() -> None:
    """Removes the token from the environment, so that no child process inherits it."""
    os.environ.pop(AGENT_TOKEN, None)


def prepare_ray_client() -> None:
    """Sets options that Ray would otherwise derive from files of this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    auth_mode = "disabled"
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        auth_mode = "token"
    os.environ.setdefault("RAY_AUTH_MODE", auth_mode)


def export_credentials(names: Sequence[str]) -> None:
    """Makes mounted secrets available to the object stores of this process.

    Raises CredentialsError.
    """
    os.environ.update(_credential_variables(names))


@contextlib.contextmanager
def credentials(names: Sequence[str]) -> Iterator[None]:
    """Does the same for a while: a process of Ray's tasks serves one job after another.

    Raises CredentialsError.
    """
    variables = _credential_variables(names)
    before = {}
    for name in variables:
        before[name] = os.environ.get(name)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _credential_variables(names: Sequence[str]) -> dict[str, str]:
    root = Path(os.environ.get(CREDENTIALS_DIR) or DEFAULT_CREDENTIALS_DIR)
    variables: dict[str, str] = {}
    for index, name in enumerate(names):
        pointer = f"/credentials/{index}"
        # A name is one folder below the root, whatever it looks like.
        if Path(name).name != name or name in ("", ".."):
            raise CredentialsError(f"{pointer}: {name!r} is not the name of a secret")
        try:
            own = _variables_of(root / name)
        except (OSError, UnicodeDecodeError) as error:
            raise CredentialsError(
                f"{pointer}: cannot read {root / name}: {type(error).__name__}"
            ) from error
        if not own:
            raise CredentialsError(
                f"{pointer}: credentials {name!r} are not mounted on node "
                f"{socket.gethostname()}: {root / name} holds none of "
                f"{', '.join(_CREDENTIAL_VALUES + _CREDENTIAL_FILES)}"
            )
        for variable in own:
            if variable in variables:
                raise CredentialsError(
                    f"{pointer}: credentials {name!r} and others before both hold {variable}; "
                    "name one of them"
                )
        variables |= own
    return variables


def _variables_of(folder: Path) -> dict[str, str]:
    """Returns the variables that the files of one secret stand for."""
    variables = {}
    for name in _CREDENTIAL_VALUES:
        if (folder / name).is_file():
            variables[name] = (folder / name).read_text("utf-8").strip()
    for name in _CREDENTIAL_FILES:
        if (folder / name).is_file():
            variables[name] = str(folder / name)
    return variables

"""Runs the agent as a process.

Owns: its command line, signals and exit codes. Must not know: what the agent does.

    python -m workers.agent --service URL --cluster default --address RAY_ADDRESS
        [--token-file FILE] [--storage ROOT] [--node-groups FILE] [--until-idle]
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from workers.agent.agent import Agent, AgentOptions
from workers.agent.node_groups import NodeGroupsError, read_node_groups
from workers.protocol.wire import NodeGroup
from workers.rank.environment import (
    ProcessEnvironmentError,
    agent_token,
    prepare_ray_client,
    unset_agent_token,
)
from workers.service_client import ServiceRefusedError

_LOG = logging.getLogger("megatron_ray.agent")
_JOIN_S = 0.2
_STOP_S = 3.0
EXIT_BAD_START = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _http_url(url: str) -> str:
    """Returns the URL unchanged. Raises BadParameter if it is not an HTTP address."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise typer.BadParameter(f"{url!r} is not a URL such as http://host:port")
    return url


@app.command()
def main(
    service: Annotated[
        str,
        typer.Option(
            "--service", "--service-url", callback=_http_url, help="URL of the service."
        ),
    ],
    address: Annotated[
        str,
        typer.Option("--address", "--ray-address", help="Ray's head, as host:port."),
    ],
    cluster: Annotated[
        str, typer.Option(help="Name of this cluster in job specs.")
    ] = "default",
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the agent's token. Default: from the environment."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Folder or URI that all nodes can read. Default: the service's."),
    ] = None,
    node_groups: Annotated[
        Path | None,
        typer.Option(
            help="YAML list of the nodes that an autoscaler may give to the cluster: name, "
            "max_nodes, cpus, gpus, accelerator_type, labels. Default: none."
        ),
    ] = None,
    until_idle: Annotated[
        bool,
        typer.Option(
            "--until-idle",
            help="Exit once all jobs of the cluster have ended: 0 if they have succeeded, else "
            "1, also when there has been none for a minute.",
        ),
    ] = False,
) -> None:
    """Connect one Ray cluster to the service.

    Exit codes: 0 after SIGTERM or SIGINT, 2 if it cannot start, 3 if Ray is lost, and those
    of --until-idle.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # httpx logs every request, and there is one per poll.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    groups: tuple[NodeGroup, ...] = ()
    if node_groups is not None:
        try:
            groups = read_node_groups(node_groups)
        except NodeGroupsError as error:
            _LOG.error("%s", error)
            raise typer.Exit(EXIT_BAD_START) from error
    options = AgentOptions(
        service, cluster, address, storage, node_groups=groups, until_idle=until_idle
    )
    raise typer.Exit(run_agent(options, token_file))


def run_agent(options: AgentOptions, token_file: Path | None) -> int:
    """Runs the agent until a signal or until Ray is lost; returns the exit code."""
    try:
        token = agent_token(token_file)
    except ProcessEnvironmentError as error:
        _LOG.error("%s", error)
        return EXIT_BAD_START
    # Before Ray is used, so that no process that Ray starts inherits the token.
    unset_agent_token()
    prepare_ray_client()
    return _run_until_signal(Agent(options, token))


def _run_until_signal(agent: Agent) -> int:
    """Runs the agent in a thread, beside the main thread that receives signals.

    ray.init replaces signal handlers only when it runs in the main thread.
    """
    # For an error that `work` does not expect, whose traceback is in the log.
    exit_code = 1

    def work() -> None:
        nonlocal exit_code
        try:
            exit_code = agent.run()
        except ServiceRefusedError as error:
            _LOG.error("%s", error)
            exit_code = EXIT_BAD_START

    thread = threading.Thread(target=work, name="agent", daemon=True)
    # Python runs signal handlers between bytecodes of the main thread, so the joins
    # below are short.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    thread.start()
    stopped_at: float | None = None
    while thread.is_alive():
        thread.join(_JOIN_S)
        if agent.is_stopping:
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at > _STOP_S:
                # A call into Ray does not return; the agent has no state that an exit
                # could lose.
                os._exit(0)
    return exit_code


if __name__ == "__main__":
    app(prog_name="python -m workers.agent")

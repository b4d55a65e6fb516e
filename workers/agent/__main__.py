"""The agent as a process.

Owns: its command line, signals and exit codes. Must not know: what the agent does.

python -m workers.agent --service URL --cluster default --address RAY_ADDRESS
[--token-file FILE] [--storage ROOT]
"""

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from workers.agent.agent import Agent, AgentOptions
from workers.rank.environment import (
    ProcessEnvironmentError,
    agent_token,
    forget_agent_token,
    prepare_ray_client,
)
from workers.service_client import ServiceRefusedError

_LOG = logging.getLogger("megatron_ray.agent")
_STOP_S = 3.0
EXIT_BAD_START = 2


def parse(arguments: Sequence[str] | None = None) -> tuple[AgentOptions, Path | None]:
    """Command line to options and token file."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.agent",
        description="Connects one Ray cluster to the service.",
    )
    parser.add_argument(
        "--service",
        "--service-url",
        dest="service",
        required=True,
        help="URL of the service",
    )
    parser.add_argument(
        "--cluster", default="default", help="name of this cluster in job specs"
    )
    parser.add_argument(
        "--address",
        "--ray-address",
        dest="address",
        required=True,
        help="host:port of Ray's head",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        help="file with the agent's token; else from the environment",
    )
    parser.add_argument(
        "--storage",
        help="folder or URI that all nodes must see; else what the service says",
    )
    given = parser.parse_args(arguments)
    return AgentOptions(
        given.service, given.cluster, given.address, given.storage
    ), given.token_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM or SIGINT, 2 when it cannot start, 3 when Ray is lost."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options, token_file = parse(arguments)
    try:
        token = agent_token(token_file)
    except ProcessEnvironmentError as problem:
        _LOG.error("%s", problem)
        return EXIT_BAD_START
    forget_agent_token()
    prepare_ray_client()
    agent = Agent(options, token)
    return _run_until_signal(agent)


def _run_until_signal(agent: Agent) -> int:
    """The agent works beside the main thread: ray.init puts signal handlers of its own
    only where they can be put back.
    """
    outcome: list[int] = []

    def work() -> None:
        try:
            outcome.append(agent.run())
        except ServiceRefusedError as error:
            _LOG.error("%s", error)
            outcome.append(EXIT_BAD_START)

    thread = threading.Thread(target=work, name="agent", daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    thread.start()
    stopped_at: float | None = None
    while thread.is_alive():
        thread.join(0.2)
        if agent.stopping:
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at > _STOP_S:
                os._exit(
                    0
                )  # a call into Ray that does not come back; there is nothing to lose
    return outcome[0] if outcome else 1


if __name__ == "__main__":
    raise SystemExit(main())

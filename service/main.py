"""The service as a process: `python -m service.main`.

Owns: socket, port file, uvicorn. Must not know: routes, database.
"""

import contextlib
import ipaddress
import logging
import os
import socket
from pathlib import Path

import uvicorn

from service.app import create_app
from service.http.auth import has_configured_token
from service.http.notifier import Notifier
from service.settings import Settings, SettingsError

GRACEFUL_SHUTDOWN_S = 3
BACKLOG = 2048


def run(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM. Raises SettingsError for settings that cannot or
    must not be served.
    """
    refuse_open_bind(settings)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    listener = bind(settings.host, settings.port)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        timeout_keep_alive=75,
    )
    server = Server(config, app.state.hub, settings.port_file)
    with contextlib.suppress(
        KeyboardInterrupt
    ):  # uvicorn raises it again once it has shut down
        server.run(sockets=[listener])
    if not server.started:
        raise SystemExit(
            "megatron-ray service: start-up failed, the reason is in the log above"
        )


def refuse_open_bind(settings: Settings) -> None:
    """Raises SettingsError when the address is open to others and no token is
    configured.
    """
    if not is_loopback(settings.host) and not has_configured_token(settings):
        raise SettingsError(
            f"refusing to listen on {settings.host}: no token is configured; set "
            "MEGATRON_RAY_TOKENS_FILE to a file"
            ' {"user": "<token>", "agent": "<token>"}, or listen on 127.0.0.1'
        )


def is_loopback(host: str) -> bool:
    """Whether every address the host name stands for is loopback.

    Raises SettingsError for an unknown host.
    """
    try:
        found = {
            str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)
        }
    except OSError as error:
        raise SettingsError(
            f"MEGATRON_RAY_HOST={host!r}: {error.strerror or error}; use an address of this machine"
        ) from error
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 lets the kernel choose.

    Raises SettingsError when the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        # The protocol is named because asyncio turns Nagle's algorithm off only then:
        # without it each small answer takes 40 ms.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        text = (
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another "
            "MEGATRON_RAY_PORT, or 0 for any free one"
        )
        raise SettingsError(text) from error
    return listener


class Server(uvicorn.Server):
    """Writes the port once requests are answered; ends open streams and long polls
    before waiting for connections.
    """

    def __init__(
        self, config: uvicorn.Config, hub: Notifier, port_file: Path | None
    ) -> None:
        super().__init__(config)
        self.hub = hub
        self.port_file = port_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's hook: called with the listening sockets before the first request."""
        await super().startup(sockets=sockets)
        if self.started and self.port_file is not None and sockets:
            self.port_file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.port_file.with_name(f".{self.port_file.name}.{os.getpid()}")
            temporary.write_text(f"{sockets[0].getsockname()[1]}\n")
            temporary.replace(self.port_file)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's hook: called once on the way out."""
        self.hub.close()
        await super().shutdown(sockets=sockets)


def main() -> None:
    """Runs with settings from the environment; a wrong setting ends the process with
    one line on stderr.
    """
    try:
        run(Settings.from_environment())
    except SettingsError as error:
        raise SystemExit(f"megatron-ray service: {error}") from error


if __name__ == "__main__":
    main()

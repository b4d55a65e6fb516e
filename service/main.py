"""Runs the service as a process: `python -m service.main`.

Owns: socket, port file, uvicorn. Must not know: routes, database.
"""

import contextlib
import gc
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
KEEP_ALIVE_S = 75
BACKLOG = 2048
PRIVATE_UMASK = 0o077
"""Files and folders that only their owner may open."""
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def run(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises SettingsError for settings that cannot or must not be served.
    """
    refuse_open_bind(settings)
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    # Bound before the app starts: a taken port is reported without opening a database.
    listener = bind(settings.host, settings.port)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = Server(config, app.state.notifier, settings.port_file)
    # What was imported lives as long as the process: a full collection would look through all
    # of it while every request waits.
    gc.freeze()
    # uvicorn raises the interrupt again once it has shut down.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        raise SystemExit("megatron-ray service: start failed; see the log above")


def refuse_open_bind(settings: Settings) -> None:
    """Raises SettingsError when others can connect and no token is configured."""
    if not is_loopback(settings.host) and not has_configured_token(settings):
        raise SettingsError(
            f"refusing to listen on {settings.host}: no token is configured; set "
            'MEGATRON_RAY_TOKENS_FILE to a file {"user": "<token>", "agent": "<token>"}, or '
            "listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether every address of a host name is loopback.

    Raises SettingsError for an unknown host.
    """
    try:
        entries = socket.getaddrinfo(host, None)
    except OSError as error:
        raise SettingsError(
            f"MEGATRON_RAY_HOST={host!r}: {error.strerror or error}; use an address of this "
            "machine"
        ) from error
    for entry in entries:
        # An IPv6 address may carry a zone, as in fe80::1%eth0.
        address = str(entry[4][0]).partition("%")[0]
        if not ipaddress.ip_address(address).is_loopback:
            return False
    return True


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening TCP socket; with port 0 the kernel chooses the port.

    Raises SettingsError when the address cannot be used.
    """
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = entries[0]
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
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another "
            "MEGATRON_RAY_PORT, or 0 for any free one"
        ) from error
    return listener


class Server(uvicorn.Server):
    """A server that writes its port to a file and shuts down promptly.

    The file is written once requests are answered. Open streams and long polls are ended
    before the server waits for connections to close.
    """

    def __init__(
        self, config: uvicorn.Config, notifier: Notifier, port_file: Path | None
    ) -> None:
        super().__init__(config)
        self.notifier = notifier
        self.port_file = port_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts serving on the listening sockets; called by uvicorn."""
        await super().startup(sockets=sockets)
        if self.started and self.port_file is not None and sockets:
            self.port_file.parent.mkdir(parents=True, exist_ok=True)
            # Written beside it and renamed: a process that polls for it finds it complete.
            temporary = self.port_file.with_name(f".{self.port_file.name}.{os.getpid()}")
            temporary.write_text(f"{sockets[0].getsockname()[1]}\n")
            temporary.replace(self.port_file)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops serving; called by uvicorn."""
        # Before uvicorn waits for connections: streams do not end by themselves.
        self.notifier.close()
        await super().shutdown(sockets=sockets)


def main() -> None:
    """Runs the service with settings from the environment.

    A wrong setting ends the process with one line on stderr.
    """
    # The database holds what users sent, and the key signs tokens.
    os.umask(PRIVATE_UMASK)
    try:
        run(Settings.from_environment())
    except SettingsError as error:
        raise SystemExit(f"megatron-ray service: {error}") from error


if __name__ == "__main__":
    main()

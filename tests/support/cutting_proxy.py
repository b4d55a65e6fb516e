"""A TCP proxy that cuts connections after a random number of bytes: what a bad network
does to a stream.
"""

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

_PIECE = 4096
_EARLY_CUTS = 5
_REPLAY_BYTES = 200_000
# SO_LINGER of no time: closing sends RST instead of FIN
_RESET = struct.pack("ii", 1, 0)


class CuttingProxy:
    """Listens on a port of its own and passes everything on to the address that
    `upstream` returns; one connection at a time is enough.

    Cuts the first `most_cuts` connections, each after its own number of bytes from the
    server, some of them in the middle of the response's head; then it leaves them
    alone.
    """

    def __init__(
        self,
        upstream: Callable[[], tuple[str, int]],
        rng: random.Random,
        most_cuts: int,
        on_cut: Callable[[], None],
    ) -> None:
        self._upstream = upstream
        self._rng = rng
        self._most_cuts = most_cuts
        self._on_cut = on_cut
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.2)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                with client:
                    self._pass_on(client)

    def _pass_on(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._upstream(), timeout=5)
        except OSError:
            return  # the service is away: the client sees its connection closed
        with server:
            requests = threading.Thread(target=_pump, args=(client, server), daemon=True)
            requests.start()
            with contextlib.suppress(OSError):
                self._answers(server, client)
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes the other thread
            requests.join(10)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        left = self._bytes_until_cut()
        server.settimeout(0.2)
        while not self._ended.is_set():
            try:
                piece = server.recv(_PIECE)
            except TimeoutError:
                continue
            if not piece:
                return
            if left is None:
                client.sendall(piece)
                continue
            client.sendall(piece[:left])
            left -= len(piece)
            if left < 0:
                self.cuts += 1
                self._on_cut()
                if self._rng.random() < 0.5:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                return

    def _bytes_until_cut(self) -> int | None:
        """Few at first, within the replay and within heads; then enough for the whole
        replay; then few again, so that cuts come thick.
        """
        if self.cuts >= self._most_cuts:
            return None
        if self.cuts == _EARLY_CUTS:
            return _REPLAY_BYTES + self._rng.randrange(_REPLAY_BYTES)
        return self._rng.randrange(1, self._rng.choice((300, 3_000, 10_000, 40_000)))


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            sink.sendall(piece)

"""Sends copies between the processes of a job, over TCP.

Owns: the protocol, its server and its client. Must not know: Ray, torch, when copies are
made, what is in them.

A request is a line of JSON, followed by a copy's parts when the reply asks for them:

    {"token", "do": "put", "key", "copy"}  -> {"send": true}, parts -> {"kept": true}
                                           -> {"send": false}: it is there already
    {"token", "do": "get", "key"}          -> {"copy"}, parts
    any                                    -> {"error"}

`copy` is {header, checksum, sizes of parts}. Addresses and tokens of servers come from
the attempt's store.
"""

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from workers.rank.peer_copies import (
    CopyKey,
    KeptCopy,
    PeerCopies,
    PeerCopyError,
    empty_memory,
)

_CONNECT_S = 10.0
_SILENCE_S = 60.0
"""Seconds without a byte after which a connection is given up."""
_MAX_LINE = 16 << 20
"""Longest request: a header has no tensors, but the whole config."""
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class PeerAddress:
    """Where a process serves its copies, and the token that it asks for."""

    host: str
    port: int
    token: str

    def to_json(self) -> str:
        """Returns the fields as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "PeerAddress":
        """Returns the address that `to_json` described."""
        return cls(**json.loads(text))


class PeerServer:
    """Serves the copies of this process while it lives; the kernel chooses the port."""

    def __init__(self, copies: PeerCopies, host: str) -> None:
        self._copies = copies
        family = socket.AF_INET
        if ":" in host:
            family = socket.AF_INET6
        self._listener = socket.create_server((host, 0), family=family)
        port = self._listener.getsockname()[1]
        self.address = PeerAddress(host, port, secrets.token_hex(16))
        threading.Thread(target=self._accept, name="copies", daemon=True).start()

    def close(self) -> None:
        """Ends the server; open connections end with their clients."""
        # Without a shutdown the accepting thread would keep the socket open.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(connection,), name="copies", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        # A client that fails or sends nonsense connects again, or gives up.
        with (
            suppress(OSError, PeerCopyError, ValueError, KeyError, TypeError),
            _Wire(connection) as wire,
        ):
            while request := wire.read_line():
                self._answer(wire, request)

    def _answer(self, wire: "_Wire", request: dict[str, Any]) -> None:
        if not hmac.compare_digest(str(request.get("token")), self.address.token):
            wire.write_line({"error": "wrong token"})
            raise PeerCopyError("wrong token")
        key = CopyKey(**request["key"])
        try:
            if request["do"] == "put":
                self._receive(wire, key, request["copy"])
            else:
                self._send(wire, key)
        except PeerCopyError as error:
            wire.write_line({"error": str(error)})

    def _receive(self, wire: "_Wire", key: CopyKey, described: dict[str, Any]) -> None:
        self._copies.check(key)
        if self._copies.has(key):
            wire.write_line({"send": False})
            return
        first, *_ = described["sizes"]
        memory = self._copies.memory_for(key, int(first))
        wire.write_line({"send": True})
        self._copies.keep_received(wire.read_copy(key, described, memory))
        wire.write_line({"kept": True})

    def _send(self, wire: "_Wire", key: CopyKey) -> None:
        copy = self._copies.find(key.attempt, key.step, key.rank)
        if copy is None or copy.key != key:
            raise PeerCopyError(f"the copy of step {key.step} is not there")
        wire.write_line({"copy": _describe(copy)})
        wire.write_parts(copy)


class PeerClient:
    """A connection to the server of another process.

    Methods raise PeerCopyError when it refuses, OSError when it does not answer.
    """

    def __init__(self, address: PeerAddress) -> None:
        self._token = address.token
        self._wire = _Wire(
            socket.create_connection((address.host, address.port), _CONNECT_S)
        )

    def put(self, copy: KeptCopy) -> None:
        """Sends a copy, unless it is there; returns once it is whole there."""
        reply = self._ask(copy.key, {"do": "put", "copy": _describe(copy)})
        if reply["send"]:
            self._wire.write_parts(copy)
            self._wire.read_reply()

    def get(self, key: CopyKey) -> KeptCopy:
        """Returns a copy. Raises PeerCopyError also when it arrives damaged."""
        described = self._ask(key, {"do": "get"})["copy"]
        memory = empty_memory(described["sizes"][0])
        copy = self._wire.read_copy(key, described, memory)
        copy.verify()
        return copy

    def close(self) -> None:
        """Ends the connection, also while another thread uses it."""
        self._wire.close()

    def _ask(self, key: CopyKey, request: dict[str, Any]) -> dict[str, Any]:
        self._wire.write_line({"token": self._token, "key": asdict(key), **request})
        return self._wire.read_reply()


@contextmanager
def connected(address: PeerAddress) -> Iterator[PeerClient]:
    """Connects to a server. Raises OSError."""
    client = PeerClient(address)
    try:
        yield client
    finally:
        client.close()


class _Wire:
    """Lines and parts over one connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SILENCE_S)
        # Lines are short and each is waited for.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._input = connection.makefile("rb")

    def __enter__(self) -> "_Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        # Wakes a thread that waits in a read.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def write_line(self, values: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(values).encode() + b"\n")

    def read_line(self) -> dict[str, Any] | None:
        """Returns the next line; None at the end."""
        line = self._input.readline(_MAX_LINE)
        if not line:
            return None
        return dict(json.loads(line))

    def read_reply(self) -> dict[str, Any]:
        """Returns the next line. Raises PeerCopyError when it is an error or missing."""
        reply = self.read_line()
        if reply is None:
            raise ConnectionError("the peer has ended the connection")
        if "error" in reply:
            raise PeerCopyError(str(reply["error"]))
        return reply

    def write_parts(self, copy: KeptCopy) -> None:
        # In blocks, because the socket's timeout is one for all that `sendall` sends.
        for part in copy.parts:
            for position in range(0, len(part), _BLOCK_BYTES):
                self._socket.sendall(part[position : position + _BLOCK_BYTES])

    def read_copy(
        self, key: CopyKey, described: dict[str, Any], memory: memoryview
    ) -> KeptCopy:
        """Reads the parts of a copy, the first one into `memory`."""
        first, *others = described["sizes"]
        parts = [memory[:first]]
        for size in others:
            parts.append(empty_memory(size))
        self._read_into(parts)
        header = str(described["header"]).encode()
        return KeptCopy(key, header, tuple(parts), int(described["checksum"]))

    def _read_into(self, parts: Sequence[memoryview]) -> None:
        for part in parts:
            position = 0
            while position < len(part):
                count = self._input.readinto(part[position:])
                if not count:
                    raise ConnectionError("the peer has ended the connection")
                position += count


def _describe(copy: KeptCopy) -> dict[str, Any]:
    return {
        "header": copy.header.decode(),
        "checksum": copy.checksum,
        "sizes": list(map(len, copy.parts)),
    }

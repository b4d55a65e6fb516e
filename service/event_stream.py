"""Reads server-sent events (WHATWG HTML, section 9.2).

Must not know: HTTP, what the events mean.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StreamEvent:
    """One server-sent event; `data` is its parsed JSON."""

    event: str
    id: str | None
    data: Any


def parse_stream(lines: Iterator[str]) -> Iterator[StreamEvent]:
    """Yields the server-sent events in lines (WHATWG HTML, section 9.2).

    Comments are skipped and an unfinished event is dropped.
    """
    # The id stays in force until another one is sent; name and data belong to one event.
    name = "message"
    identity = None
    data: list[str] = []
    for line in lines:
        # An empty line ends an event; one without data, such as a comment, is none.
        if line == "":
            if data:
                yield StreamEvent(name, identity, json.loads("\n".join(data)))
            name = "message"
            data = []
            continue
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "data":
            data.append(value)
        elif key == "event":
            name = value
        elif key == "id":
            identity = value


def lines_of(chunks: Iterator[bytes]) -> Iterator[str]:
    """Yields whole lines, each ended by a line feed.

    Not `splitlines`: JSON may hold other characters that it takes for ends of lines.
    """
    rest = b""
    for chunk in chunks:
        # Bytes and not text: a chunk may end in the middle of a character.
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()

"""Copies in a process's memory, and sending them between processes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from workers.rank.peer_copies import (
    CopyKey,
    KeptCopy,
    PeerCopies,
    PeerCopyError,
    checksum_of,
)
from workers.rank.peer_server import PeerServer, connected

SIZE = 1000


def copy_of(step: int, *, rank: int = 1, attempt: int = 1) -> KeptCopy:
    key = CopyKey("job", "layout", attempt, step, rank)
    parts = (memoryview(bytearray([step % 251]) * SIZE), memoryview(b"reports"))
    return KeptCopy(key, b"{}", parts, checksum_of(b"{}", parts))


def steps(copies: PeerCopies) -> list[tuple[int, int]]:
    return [(copy.rank, copy.step) for copy in copies.facts()]


@pytest.fixture
def copies() -> PeerCopies:
    copies = PeerCopies("job")
    copies.begin("layout", 1, None)
    return copies


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(copies: PeerCopies, request: pytest.FixtureRequest) -> Iterator[PeerServer]:
    server = PeerServer(copies, request.param)
    yield server
    server.close()


def test_a_copy_arrives_whole_and_is_fetched_whole(
    server: PeerServer, copies: PeerCopies
) -> None:
    sent = copy_of(7)
    with connected(server.address) as client:
        client.put(sent)
        client.put(sent)
        fetched = client.get(sent.key)
    assert steps(copies) == [(1, 7)], "sent again, kept once"
    assert [bytes(part) for part in fetched.parts] == [bytes(part) for part in sent.parts]
    assert (fetched.key, fetched.header) == (sent.key, sent.header)


def test_two_copies_of_a_rank_are_kept_in_the_same_memory(
    server: PeerServer, copies: PeerCopies
) -> None:
    memories = set()
    with connected(server.address) as client:
        for step in range(1, 6):
            client.put(copy_of(step))
            kept = copies.find(1, step, 1)
            assert kept is not None
            memories.add(id(kept.parts[0].obj))
    assert steps(copies) == [(1, 4), (1, 5)]
    assert len(memories) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job_id": "other"}, "belongs to another run"),
        ({"layout": "other"}, "belongs to another run"),
        ({"attempt": 2}, "is from attempt 2, and this is attempt 1"),
    ],
)
def test_a_copy_of_another_run_is_refused(
    server: PeerServer, copies: PeerCopies, change: dict[str, object], message: str
) -> None:
    sent = copy_of(7)
    wrong = replace(sent, key=replace(sent.key, **change))  # type: ignore[arg-type]
    with connected(server.address) as client, pytest.raises(PeerCopyError, match=message):
        client.put(wrong)
    with (
        connected(server.address) as client,
        pytest.raises(PeerCopyError, match="not there"),
    ):
        client.get(wrong.key)
    assert steps(copies) == []


def test_damaged_bytes_are_refused_on_both_ways(
    server: PeerServer, copies: PeerCopies
) -> None:
    damaged = replace(copy_of(7), checksum=1)
    with connected(server.address) as client, pytest.raises(PeerCopyError, match="damaged"):
        client.put(damaged)
    assert steps(copies) == []
    sent = copy_of(8)
    with connected(server.address) as client:
        client.put(sent)
        kept = copies.find(1, 8, 1)
        assert kept is not None
        kept.parts[0][5] ^= 1
        with pytest.raises(PeerCopyError, match="damaged"):
            client.get(sent.key)


def test_a_client_without_the_token_gets_nothing(server: PeerServer) -> None:
    stranger = replace(server.address, token="guessed")
    with connected(stranger) as client, pytest.raises(PeerCopyError, match="wrong token"):
        client.get(copy_of(7).key)


def test_a_peer_that_has_ended_is_an_error(server: PeerServer) -> None:
    server.close()
    with pytest.raises(OSError, match="refused"), connected(server.address):
        pass


def own(copies: PeerCopies, step: int, attempt: int = 1) -> KeptCopy:
    memory = copies.next_memory()
    copy = replace(
        copy_of(step, rank=0, attempt=attempt),
        parts=(memory.data, memoryview(b"")),
        memory=memory,
    )
    copies.keep_own(copy)
    return copy


def allocate(num_bytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.zeros(num_bytes, dtype=np.uint8)


def test_own_copies_alternate_between_two_memories(copies: PeerCopies) -> None:
    copies.reserve(SIZE, allocate)
    kept = [own(copies, step) for step in range(3, 13, 3)]
    assert steps(copies) == [(0, 9), (0, 12)]
    assert len({id(copy.memory) for copy in kept}) == 2


def test_an_attempt_keeps_only_what_it_continues_from(copies: PeerCopies) -> None:
    copies.reserve(SIZE, allocate)
    for step in (3, 6):
        own(copies, step)
        copies.keep_received(copy_of(step))
    copies.begin("layout", 2, (1, 3))
    assert steps(copies) == [(0, 3), (1, 3)]
    copies.reserve(SIZE, allocate)
    own(copies, 5, attempt=2)
    # The attempt that continues from a copy still needs it, and sends it to others.
    copies.keep_received(copy_of(3, rank=2))
    assert steps(copies) == [(0, 3), (0, 5), (1, 3), (2, 3)]
    copies.memory_for(copy_of(6, rank=2, attempt=2).key, SIZE)
    assert steps(copies) == [(0, 3), (0, 5), (2, 3)], "rank 1 has another partner"
    own(copies, 4, attempt=1)
    assert (0, 4) not in steps(copies), "a copy of an ended attempt that came late"
    copies.begin("layout", 3, None)
    assert steps(copies) == []

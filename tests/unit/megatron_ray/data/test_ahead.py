"""Values that are computed while the ones before them are in use."""

import gc
import threading

import pytest

from megatron_ray.data.ahead import Ahead


class Squares:
    """Computes squares, and notes of which keys and on which threads."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.threads: set[int] = set()
        self.computed = threading.Semaphore(0)

    def __call__(self, key: int) -> int:
        self.keys.append(key)
        self.threads.add(threading.get_ident())
        self.computed.release()
        if key == 13:
            raise ValueError("13 has no square")
        return key**2


def test_the_following_value_is_computed_before_it_is_taken() -> None:
    squares = Squares()
    ahead = Ahead(squares)
    assert ahead.take(2, following=3) == 4
    for _ in range(2):
        assert squares.computed.acquire(timeout=10)
    assert squares.keys == [2, 3]
    assert ahead.take(3, following=5) == 9
    assert ahead.take(5, following=7) == 25
    # Elsewhere than was expected, and back.
    assert ahead.take(2, following=3) == 4
    assert ahead.take(3, following=3) == 9
    assert ahead.take(3, following=4) == 9
    assert threading.get_ident() not in squares.threads
    assert len(squares.threads) == 1


def test_an_error_belongs_to_the_value_that_is_taken() -> None:
    ahead = Ahead(Squares())
    assert ahead.take(12, following=13) == 144
    assert ahead.take(14, following=13) == 196
    with pytest.raises(ValueError, match="13 has no square"):
        ahead.take(13, following=14)
    assert ahead.take(14, following=15) == 196


def test_its_thread_ends_with_it() -> None:
    squares = Squares()
    ahead = Ahead(squares)
    ahead.take(1, following=2)
    (ident,) = squares.threads
    (thread,) = [each for each in threading.enumerate() if each.ident == ident]
    del ahead
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()

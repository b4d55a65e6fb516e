"""When a checkpoint takes too long."""

import pytest

from workers.decisions.faults.slow_storage import OpenCheckpoint, slow_storage


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        (OpenCheckpoint(8, 100.0), None),
        (OpenCheckpoint(8, 100.0, (1,)), None),
        (
            OpenCheckpoint(8, 60.0),
            "the storage is slow: committing the checkpoint of step 8 has taken 50 s so far",
        ),
        (OpenCheckpoint(8, 60.0, (1,)), None),
        (
            OpenCheckpoint(8, 40.0, (1, 5)),
            "the storage is slow: 70 s after other ranks, these have not written their part "
            "of the checkpoint of step 8: 1, 5",
        ),
        (
            OpenCheckpoint(8, 40.0, tuple(range(512))),
            "the storage is slow: 70 s after other ranks, these have not written their part "
            "of the checkpoint of step 8: 0, 1, 2, 3, 4, 5, 6, 7 and 504 more",
        ),
    ],
)
def test_a_slow_checkpoint_is_named(
    checkpoint: OpenCheckpoint, sentence: str | None
) -> None:
    assert slow_storage(checkpoint, now=110.0) == sentence

"""What a plan has to say of copies of the ranks' states in host memory."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.answers.bodies import plan_body
from megatron_ray.planning.answers.estimates import check_copies
from megatron_ray.planning.memory import peer_copies_bytes
from megatron_ray.validation.storage.disk_space import checkpoint_bytes

GIB = 2**30


def config(every_steps: int | None = 10, **parallel: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 256,
                "num_attention_heads": 4,
                "ffn_hidden_size": 512,
                "vocab_size": 4096,
                "max_sequence_length": 64,
            },
            "parallel": {"dp": 1, **parallel},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {"seq_length": 64, "global_batch_size": 8, "steps": 10},
            "optimizer": {"lr": 0.001},
            "checkpoint": {"peer_every_steps": every_steps},
        }
    )


@pytest.mark.parametrize("parallel", [{"dp": 2}, {"dp": 4}, {"dp": 1, "tp": 2}])
def test_a_rank_has_four_copies_of_its_share(parallel: dict[str, int]) -> None:
    ranks = parallel["dp"] * parallel.get("tp", 1)
    share = checkpoint_bytes(config()) / ranks
    # Norms are whole on each tp rank, and buffers are padded.
    assert peer_copies_bytes(config(**parallel)) == pytest.approx(4 * share, rel=0.05)


def notes(config: TrainConfig) -> list[str]:
    plan = plan_body(config, None, fits=None)
    return [note for note in plan["notes"] if "peer_every_steps" in note]


def test_a_plan_names_the_memory_of_copies() -> None:
    (note,) = notes(config(dp=2))
    size = peer_copies_bytes(config(dp=2)) / GIB
    assert note == (
        f"checkpoint.peer_every_steps: copies take up to {size:.2g} GiB of host memory per "
        "rank, outside of the memory estimate; a node needs it for each of its ranks"
    )
    assert notes(config(None, dp=2)) == []


def test_a_single_rank_has_no_partner() -> None:
    (note,) = notes(config())
    assert note.startswith("checkpoint.peer_every_steps has no effect: a single rank")


def test_copies_that_no_node_can_hold_are_refused() -> None:
    settings = config(dp=2)
    size = 2 * peer_copies_bytes(settings)
    (problem,) = check_copies(settings, 2, size - 1)
    assert (problem.pointer, problem.code) == (
        "/checkpoint/peer_every_steps",
        "memory_fits",
    )
    assert problem.detail.startswith("copies of the states of 2 ranks that share a node")
    assert check_copies(settings, 2, size) == []
    assert check_copies(settings, 2, 0) == [], "unknown"
    assert check_copies(config(None, dp=2), 2, 1) == []

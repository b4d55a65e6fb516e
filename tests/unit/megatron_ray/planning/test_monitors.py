"""The memory of what watches a run."""

from typing import Any

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.hardware import GPU
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.validation.storage.disk_space import checkpoint_bytes
from tests.unit.megatron_ray.planning.test_peer_copies import config


def optimizer_bytes(monitor: dict[str, Any] | None, **parallel: Any) -> int:
    fields = config(None, **parallel).model_dump()
    fields["callbacks"] = {"optimizer": monitor}
    return fullest_rank(TrainConfig.from_mapping(fields), GPU).optimizer_bytes


def test_updates_are_measured_with_a_copy_of_what_a_rank_updates() -> None:
    plain = optimizer_bytes(None, dp=2)
    # Two moments, and as much again as one of them.
    assert optimizer_bytes({}, dp=2) * 2 == plain * 3
    assert optimizer_bytes({"metrics": ["grad_norm", "moment_norms"]}, dp=2) == plain


def test_a_checkpoint_has_a_count_of_every_token() -> None:
    fields = config(None).model_dump()
    fields["callbacks"] = {"unigram": {}}
    watched = checkpoint_bytes(TrainConfig.from_mapping(fields))
    assert watched - checkpoint_bytes(config(None)) == 4096 * 8

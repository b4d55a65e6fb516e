"""Decides which copies of the ranks' states a next attempt continues from.

Owns: what identifies a copy to the driver, and when a set of them is complete. Pure. Must
not know: Ray, torch, how copies are sent.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_ray.checkpoint.records.rollbacks import Rollback, is_left_behind
from megatron_ray.config.train_config import TrainConfig


class CopyFacts(BaseModel):
    """A whole copy of one rank's state in a process, as the process reports it."""

    model_config = ConfigDict(frozen=True)

    layout: str
    """What it belongs to; see `layout_of`."""
    attempt: int
    step: int
    rank: int


class CopySet(BaseModel):
    """The copies of all ranks after one step of one attempt."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    step: int
    holders: tuple[int, ...]
    """Slot of a process that has the copy, by rank."""


def layout_of(spec: Mapping[str, Any], data: Mapping[str, Any], world_size: int) -> str:
    """Returns a digest of everything that a copy depends on.

    A copy fits no run with another config, other data or another number of ranks. `spec`
    and `data` are JobSpec and PreparedData as JSON.
    """
    config = {}
    for name in TrainConfig.model_fields:
        config[name] = spec.get(name)
    text = json.dumps([config, data, world_size], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def choose_copies(
    kept: Mapping[int, Sequence[CopyFacts]],
    layout: str,
    world_size: int,
    min_step: int,
    rollbacks: Sequence[Rollback] = (),
) -> CopySet | None:
    """Returns the newest set of copies from step `min_step` on that lacks no rank.

    `kept` are the copies in living processes, by slot; those that a rollback has left
    behind do not count. None when there is no such set.
    """
    sets: dict[tuple[int, int], dict[int, int]] = {}
    for slot in sorted(kept):
        for copy in kept[slot]:
            is_behind = is_left_behind(rollbacks, copy.attempt, copy.step)
            if copy.layout == layout and copy.step >= min_step and not is_behind:
                holders = sets.setdefault((copy.step, copy.attempt), {})
                holders.setdefault(copy.rank, slot)
    for step, attempt in sorted(sets, reverse=True):
        holders = sets[step, attempt]
        if len(holders) == world_size:
            slots = tuple(map(holders.__getitem__, range(world_size)))
            return CopySet(attempt=attempt, step=step, holders=slots)
    return None

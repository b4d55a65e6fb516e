"""Averages weights and moments over replica groups.

Owns: which tensors go into one collective, the mean. Must not know: how groups are made,
the update within a group, steps that are skipped.

Means are of fp32 main parameters and of moments in fp32, by element; so a rank averages
what it updates with the ranks in the same place of the other groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.config.local_sgd import LocalSGDConfig
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.optimizer.partition import Piece
from megatron_ray.optimizer.piece_boxes import add_boxes
from megatron_ray.optimizer.replica_groups.outer import OuterUpdate
from megatron_ray.sharding.sharded_state import ShardedState

OUTER = "local_sgd/"
"""Prefix of the names of the outer optimizer's state in checkpoints."""
_CHUNK = 1 << 24
"""Elements of one collective, which bounds the memory for it."""


@dataclass(frozen=True)
class SyncPlan:
    """What a run's replica groups synchronize, and with which ranks."""

    config: LocalSGDConfig
    num_steps: int
    """Steps of the run; weights are synchronized after the last one."""
    group: Group
    """Ranks in the same place of every replica group."""


@dataclass(frozen=True)
class SyncedPiece:
    """A part of a parameter that this rank updates; flat views of its memory."""

    piece: Piece
    weights: Tensor
    """fp32 main parameters."""
    moments: Mapping[str, Tensor]
    """The optimizer's state by name, fp32 or bf16."""


@dataclass(frozen=True)
class _Part:
    """Pieces that are averaged together."""

    fragment: int
    pieces: Sequence[Piece]
    weights: Sequence[Tensor]
    moments: Mapping[str, Sequence[Tensor]]
    """By name; not every piece has every moment."""
    outer: OuterUpdate | None

    @classmethod
    def of(
        cls, config: LocalSGDConfig, fragment: int, pieces: Sequence[SyncedPiece]
    ) -> "_Part":
        """Sorts the views of some pieces by what is averaged together."""
        kept = []
        weights = []
        moments: dict[str, list[Tensor]] = {}
        for piece in pieces:
            kept.append(piece.piece)
            weights.append(piece.weights)
            for name, flat in piece.moments.items():
                moments.setdefault(name, []).append(flat)
        outer = None
        if config.outer_optimizer is not None:
            outer = OuterUpdate(config.outer_optimizer, weights)
        return cls(fragment, kept, weights, moments, outer)


class GroupSync:
    """Synchronizes this rank's part of the state with that of other replica groups."""

    def __init__(self, plan: SyncPlan, pieces: Sequence[SyncedPiece]) -> None:
        self._plan = plan
        self._parts: list[_Part] = []
        self.group_index = collectives.rank(plan.group)
        """Which replica group this rank is in."""
        by_key: dict[tuple[int, bool], list[SyncedPiece]] = {}
        for piece in pieces:
            parameter = piece.piece.placed.parameter
            fragment = plan.config.fragment_of(parameter.parts[0].logical.name)
            # Tied embeddings of two stages go by themselves: only in the same place of a
            # collective are elements sure to be added up in the same order.
            key = (fragment, parameter.is_shared_embedding)
            by_key.setdefault(key, []).append(piece)
        for key in sorted(by_key):
            self._parts.append(_Part.of(plan.config, key[0], by_key[key]))

    @torch.no_grad()
    def begin(self) -> None:
        """Takes the current weights, equal in all groups, for the last synchronized ones."""
        for part in self._parts:
            if part.outer is not None:
                part.outer.begin()

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Synchronizes what is due after a step, from 1; all ranks must call it."""
        config = self._plan.config
        is_last = step == self._plan.num_steps
        for part in self._parts:
            if is_last or config.is_due(step, config.sync_every, part.fragment):
                self._average(part.weights)
                if part.outer is not None:
                    part.outer.step()
            for name, views in part.moments.items():
                every = config.sync_moments_every.get(name)
                if every is not None and config.is_due(step, every, part.fragment):
                    self._average(views)

    def _average(self, views: Sequence[Tensor]) -> None:
        """Replaces flat tensors by their means over the groups."""
        group = self._plan.group
        for chunk in _chunks(views):
            flat = torch.cat([view.float() for view in chunk])
            collectives.all_reduce(flat, group)
            flat.div_(collectives.size(group))
            start = 0
            for view in chunk:
                end = start + view.numel()
                view.copy_(flat[start:end])
                start = end

    def sharded_state(self) -> ShardedState:
        """Returns live views of the outer optimizer's state, equal in all groups."""
        state: ShardedState = {}
        for part in self._parts:
            if part.outer is None:
                continue
            for name, views in part.outer.state().items():
                for piece, flat in zip(part.pieces, views, strict=True):
                    add_boxes(state, f"{OUTER}{name}/", piece, flat)
        return state


def _chunks(views: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the tensors in lists of a bounded number of elements; cuts long ones."""
    chunk: list[Tensor] = []
    size = 0
    for view in views:
        for part in torch.split(view, _CHUNK):
            if chunk and size + part.numel() > _CHUNK:
                yield chunk
                chunk = []
                size = 0
            chunk.append(part)
            size += part.numel()
    if chunk:
        yield chunk

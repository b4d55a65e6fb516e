"""Averages weights and moments over replica groups.

Owns: which tensors go into one collective, and that all or none of a step's means are
taken. Must not know: how groups are made, the update within a group, steps that are
skipped.

Means are of fp32 main parameters and of moments in fp32, by element; so a rank averages
what it updates with the ranks in the same place of the other groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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


class SyncPeers(Protocol):
    """The ranks in the same place of every replica group.

    Every rank of a group must call each method, in the same order.
    """

    @property
    def group_index(self) -> int:
        """Which of the job's replica groups this rank is in."""

    @property
    def can_lose(self) -> bool:
        """Whether the group goes on when others are lost."""

    def meet(self, step: int) -> bool:
        """Waits for the others after a step; returns whether to synchronize."""

    def mean(self, flat: Tensor) -> None:
        """Replaces a flat fp32 tensor by its mean over the groups."""

    def confirm(self) -> bool:
        """Returns whether all means since `meet` are right on every rank of this group."""


class GroupPeers:
    """Peers in a process group of the job's own world, whose loss ends the job's attempt."""

    can_lose = False

    def __init__(self, group: Group) -> None:
        self._group = group
        self.group_index = collectives.rank(group)

    def meet(self, step: int) -> bool:
        """Returns True: all groups take their steps together."""
        return True

    def mean(self, flat: Tensor) -> None:
        """Replaces the tensor by its mean."""
        collectives.all_reduce(flat, self._group)
        flat.div_(collectives.size(self._group))

    def confirm(self) -> bool:
        """Returns True: a collective that fails ends the attempt."""
        return True


@dataclass(frozen=True)
class SyncPlan:
    """What a run's replica groups synchronize, and with which ranks."""

    config: LocalSGDConfig
    num_steps: int
    """Steps of the run; weights are synchronized after the last one."""
    peers: SyncPeers


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
        self.group_index = plan.peers.group_index
        """Which of the job's replica groups this rank is in."""
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
        due = self._due(step)
        peers = self._plan.peers
        while due and peers.meet(step):
            # Where a group may be lost meanwhile, nothing changes until it is sure that
            # every rank has all means: ranks with copies of a weight must stay equal.
            kept: list[tuple[list[Tensor], Tensor]] = []
            for views, _ in due:
                for chunk in _chunks(views):
                    flat = torch.cat([view.float() for view in chunk])
                    peers.mean(flat)
                    if peers.can_lose:
                        kept.append((chunk, flat))
                    else:
                        _copy(flat, chunk)
            if peers.confirm():
                for chunk, flat in kept:
                    _copy(flat, chunk)
                for _, outer in due:
                    if outer is not None:
                        outer.step()
                return

    def _due(self, step: int) -> list[tuple[Sequence[Tensor], OuterUpdate | None]]:
        """Returns the tensors that are averaged after a step, and what follows."""
        config = self._plan.config
        is_last = step == self._plan.num_steps
        due: list[tuple[Sequence[Tensor], OuterUpdate | None]] = []
        for part in self._parts:
            if is_last or config.is_due(step, config.sync_every, part.fragment):
                due.append((part.weights, part.outer))
            for name, views in part.moments.items():
                every = config.sync_moments_every.get(name)
                if every is not None and config.is_due(step, every, part.fragment):
                    due.append((views, None))
        return due

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


def _copy(flat: Tensor, views: Sequence[Tensor]) -> None:
    """Copies consecutive parts of a flat tensor to other tensors."""
    start = 0
    for view in views:
        end = start + view.numel()
        view.copy_(flat[start:end])
        start = end

"""Updates whole matrices by Muon, in rounds that bound the memory.

Momentum is elementwise, on this rank's ranges of flat memory. Its update is orthogonalized
where the matrix is whole (`matrix_exchange`), and the result is subtracted range by range.
Must not know: buckets, how ranges come about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.config.optimizer import MuonConfig
from megatron_ray.distributed.collectives import Group
from megatron_ray.optimizer.matrices.exchange import apply_to_whole
from megatron_ray.optimizer.rules.elements import Rates
from megatron_ray.optimizer.rules.muon import orthogonalize
from megatron_ray.optimizer.rules.sgd import with_momentum
from megatron_ray.optimizer.update_calls import (
    RunTensors,
    UpdatedRun,
    decay_of,
    replace_unless,
    widened,
)
from megatron_ray.optimizer.update_rule import UpdateRule
from megatron_ray.sharding.matrices import OwnedMatrix


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a matrix on this rank that have the same rule."""

    rule: UpdateRule
    run: UpdatedRun


@dataclass(frozen=True)
class LocalMatrix:
    """A matrix and this rank's range of it."""

    owned: OwnedMatrix
    segments: tuple[Segment, ...]
    """Together the range; none if this rank has no element."""


class MatrixUpdate:
    """The update of a group's matrices, round by round."""

    def __init__(
        self,
        muon: MuonConfig,
        rounds: Sequence[Sequence[LocalMatrix]],
        replica_group: Group,
        tp_group: Group,
        peak_lr: float,
        device: torch.device,
    ) -> None:
        self._muon = muon
        self._rounds = rounds
        self._replica_group = replica_group
        self._tp_group = tp_group
        self._peak_lr = peak_lr
        self._nothing = torch.empty(0, device=device)
        # There is no bias correction.
        self._count = torch.zeros((), device=device)
        self._rules: dict[UpdateRule, UpdateRule] = {}
        for round_ in rounds:
            for matrix in round_:
                for segment in matrix.segments:
                    self._rules[segment.rule] = segment.rule

    def step(self, lr: float, skip: Tensor | None) -> None:
        """Updates with the current gradients, unless the scalar `skip` is 1."""
        for round_ in self._rounds:
            matrices = []
            updates = []
            for matrix in round_:
                ranges = [self._nothing]
                for segment in matrix.segments:
                    rule = self._rules[segment.rule]
                    with segment.run.opened() as tensors:
                        ranges.append(_momentum(tensors, rule, skip))
                matrices.append(matrix.owned)
                updates.append(torch.cat(ranges))
            results = apply_to_whole(
                self._orthogonalize,
                matrices,
                updates,
                self._replica_group,
                self._tp_group,
            )
            for matrix, result in zip(round_, results, strict=True):
                self._move(matrix, result, lr, skip)

    def _orthogonalize(self, matrix: Tensor) -> Tensor:
        return orthogonalize(matrix, self._muon)

    def _move(
        self, matrix: LocalMatrix, result: Tensor, lr: float, skip: Tensor | None
    ) -> None:
        start = 0
        for segment in matrix.segments:
            rule = self._rules[segment.rule]
            decay = decay_of(rule, lr, self._peak_lr)
            rates = Rates(lr * rule.lr_scale, decay, self._count)
            with segment.run.opened() as tensors:
                old = tensors.weights
                end = start + old.numel()
                new = rates.decayed(old) - rates.lr * result[start:end].view(old.shape)
                replace_unless(skip, old, new)
            start = end

    def set_steps_taken(self, steps: int) -> None:
        """Does nothing, since updates do not depend on their number."""

    def set_numbers(self, peak_lr: float, numbers: Mapping[str, float]) -> None:
        """Sets numbers that replace those of the rules from the next update on."""
        self._peak_lr = peak_lr
        for rule in self._rules:
            self._rules[rule] = rule.with_numbers(numbers)


def _momentum(tensors: RunTensors, rule: UpdateRule, skip: Tensor | None) -> Tensor:
    """Returns the update of some elements, and stores their new momentum."""
    gradient = tensors.gradient
    if rule.decay == "l2" and rule.weight_decay > 0:
        gradient = gradient + rule.weight_decay * tensors.weights
    old = {name: widened(values) for name, values in tensors.state.items()}
    update, state = with_momentum(old, gradient, rule)
    for name, values in state.items():
        replace_unless(skip, tensors.state[name], values)
    return update

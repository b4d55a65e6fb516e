"""Keeps the scales of delayed scaling, which come from the steps before.

Owns: largest values of the current step, their history, the scales, and when these
change. Must not know: products, which layers there are.

Within a step scales stay as they are, and largest values are collected over all
microbatches and, at its end, over all ranks with the same layers. So they are the same
in every layout. The rule is that of Micikevicius et al. 2022 and Transformer Engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.fp8.quantize import scale_for
from megatron_ray.ops.fp8.recipe import ROLES, Recipe, Role


@dataclass(frozen=True)
class DelayedRule:
    """How scales follow from largest values."""

    history_length: int = 1
    """Steps whose largest values are kept."""
    takes_max: bool = False
    """Whether the largest of these counts, instead of the newest."""
    margin: int = 0
    """Scales are divided by 2^margin."""


class LayerScales:
    """The scales of one layer, and the largest values of the current step."""

    def __init__(self, scale: Tensor, amax: Tensor) -> None:
        self._scales = dict(zip(ROLES, scale.unbind(), strict=True))
        self._amaxes = dict(zip(ROLES, amax.unbind(), strict=True))

    def scale(self, role: Role) -> Tensor:
        """Returns the scale of an operand in this step, an fp32 scalar."""
        return self._scales[role]

    def record(self, role: Role, amax: Tensor) -> None:
        """Notes the largest value of an operand in one of the step's passes."""
        current = self._amaxes[role]
        torch.maximum(current, amax, out=current)


class DelayedScaling:
    """The scales of all layers on this rank that multiply in FP8."""

    def __init__(
        self,
        layers: Sequence[str],
        recipe: Recipe,
        rule: DelayedRule,
        device: torch.device,
    ) -> None:
        """Starts with scales of 1 and nothing recorded; `layers` are logical names."""
        self._layers = tuple(layers)
        self._rule = rule
        shape = (len(layers), len(ROLES))
        self._scale = torch.ones(shape, device=device)
        self._amax = torch.zeros(shape, device=device)
        self._history = torch.zeros((*shape, rule.history_length), device=device)
        self._formats = [recipe.dtype_of(role) for role in ROLES]

    def layer(self, index: int) -> LayerScales:
        """Returns the scales of one of the layers."""
        return LayerScales(self._scale[index], self._amax[index])

    def begin_step(self) -> None:
        """Forgets largest values, also those of an evaluation since the last step."""
        self._amax.zero_()

    @torch.no_grad()
    def update(self, groups: Sequence[Group], skip: Tensor | None = None) -> None:
        """Makes the next step's scales from this one's largest values.

        Together the groups have all ranks with these layers. If `skip` is 1 everything
        stays as it is.
        """
        for group in groups:
            collectives.all_reduce(self._amax, group, torch.distributed.ReduceOp.MAX)
        # A step that was not finite adds what the one before did.
        newest = torch.where(self._amax.isfinite(), self._amax, self._history[..., 0])
        history = torch.cat([newest[..., None], self._history[..., :-1]], dim=-1)
        used = newest
        if self._rule.takes_max:
            used = history.amax(-1)
        columns = []
        for amax, dtype in zip(used.unbind(1), self._formats, strict=True):
            columns.append(scale_for(amax, dtype, self._rule.margin))
        # Without a value, such as that of an expert that got no token, the last one stays.
        scale = torch.where(used > 0, torch.stack(columns, 1), self._scale)
        if skip is not None:
            scale = torch.where(skip == 1, self._scale, scale)
            history = torch.where(skip == 1, self._history, history)
        # In place, because layers and checkpoints have views of them.
        self._scale.copy_(scale)
        self._history.copy_(history)

    def state(self) -> dict[str, Tensor]:
        """Returns live views of what a run continues with, by name.

        Those are `<layer>/scale` [operands] and `<layer>/amax_history` [operands, steps],
        newest first; fp32, and equal on all ranks with this layer.
        """
        state = {}
        for index, name in enumerate(self._layers):
            state[f"{name}/scale"] = self._scale[index]
            state[f"{name}/amax_history"] = self._history[index]
        return state

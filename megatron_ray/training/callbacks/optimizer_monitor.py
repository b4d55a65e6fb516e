"""Measures gradients, weights, updates and moments, by scope.

Owns: `callbacks.optimizer`. Must not know: layouts; `counted_parts` knows which elements a
rank counts.
"""

import torch
from torch import Tensor

from megatron_ray.config.callbacks.monitors import OptimizerMonitorConfig
from megatron_ray.optimizer.counted_parts import (
    CountedPart,
    counted_parts,
    sum_of_squares,
)
from megatron_ray.optimizer.step_sums import StepSums
from megatron_ray.training.callbacks.protocol import Callback, CallbackContext, Partials
from megatron_ray.validation.parameters.monitored import monitored_parameters

_GRADIENT = "grad_norm"
_WEIGHT = "weight_norm"
_UPDATE = "update_norm"
_RATIO = "update_ratio"


class OptimizerMonitor(Callback):
    """Sums squares by quantity and scope, a row and a column of `_squares`."""

    def __init__(self, context: CallbackContext, config: OptimizerMonitorConfig) -> None:
        self._config = config
        self._device = context.mesh.device
        monitored = monitored_parameters(context.config, config)
        metrics_and_scopes = monitored.names(config)
        self.names = [f"{metric}/{scope}" for metric, scope in metrics_and_scopes]
        # Rows of the table of norms, the last one that of ratios.
        rows = [_GRADIENT, _WEIGHT, _UPDATE]
        rows += [f"{state}_norm" for state in monitored.states]
        self._rows = {metric: row for row, metric in enumerate(rows)}
        self._num_scopes = len(monitored.scopes)
        self._parts: list[tuple[int, CountedPart]] = []
        for part in counted_parts(context.optimizer, context.mesh.tp_rank):
            if part.name in monitored.scope_of:
                self._parts.append((monitored.scope_of[part.name], part))
        # Which numbers of the table are reported.
        chosen = []
        for metric, scope in metrics_and_scopes:
            row = self._rows.get(metric, len(self._rows))
            chosen.append(row * self._num_scopes + monitored.scopes[scope])
        self._chosen = torch.tensor(chosen, device=self._device)
        self._squares = self._zeros()
        self._old_weights: list[Tensor] = []
        self._grad_factor = torch.ones((), dtype=torch.float64, device=self._device)

    def _zeros(self) -> Tensor:
        shape = (len(self._rows), self._num_scopes)
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def after_backward(self, sums: StepSums) -> None:
        """Measures gradients and weights, and keeps the weights for the update."""
        # The norm is that of the mean gradient, as in the report of a step.
        self._grad_factor = sums.num_tokens.clamp(min=1.0)
        if sums.grad_factor is not None:
            self._grad_factor = self._grad_factor * sums.grad_factor
        self._squares = self._zeros()
        for scope, part in self._parts:
            self._add(_GRADIENT, scope, part.gradient)
            self._add(_WEIGHT, scope, part.main)
            if self._config.compares_weights:
                self._old_weights.append(part.main.clone())

    def after_update(self) -> Partials:
        """Measures updates and moments; returns all sums of squares."""
        for (scope, part), old in zip(self._parts, self._old_weights, strict=False):
            self._add(_UPDATE, scope, old.neg_().add_(part.main))
        self._old_weights.clear()
        if "moment_norms" in self._config.metrics:
            for scope, part in self._parts:
                for state, values in part.state.items():
                    self._add(f"{state}_norm", scope, values)
        return Partials(self._squares.flatten())

    def _add(self, metric: str, scope: int, flat: Tensor) -> None:
        self._squares[self._rows[metric], scope] += sum_of_squares(flat)

    def finish(self, reduced: Partials) -> Tensor:
        """Returns the norms and ratios that are reported."""
        norms = reduced.sums.view(len(self._rows), self._num_scopes).sqrt()
        norms[self._rows[_GRADIENT]] /= self._grad_factor
        ratios = norms[self._rows[_UPDATE]] / norms[self._rows[_WEIGHT]]
        return torch.cat([norms, ratios[None]]).flatten()[self._chosen]

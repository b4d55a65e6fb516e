"""Measures hidden states and attention logits of every layer.

Owns: `callbacks.activations`. It registers hooks for due steps only and removes them after
the backward pass.

Shapes: B batch, G key/value heads, D head width, S tokens of a sequence on this rank, L
tokens of a whole one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.config.callbacks.monitors import ActivationMonitorConfig
from megatron_ray.distributed import collectives
from megatron_ray.models.attention import CausalAttention
from megatron_ray.models.block import Block
from megatron_ray.models.forward_context import ForwardContext
from megatron_ray.models.multi_token_prediction import MultiTokenPredictionLayer
from megatron_ray.optimizer.step_sums import StepSums
from megatron_ray.sharding.sequence_split import SequenceCut
from megatron_ray.training.callbacks.attention_logits import Visibility, largest_logit
from megatron_ray.training.callbacks.protocol import Callback, CallbackContext, Partials


class ActivationMonitor(Callback):
    """Adds up squares and elements by scope, and keeps largest values."""

    def __init__(self, context: CallbackContext, config: ActivationMonitorConfig) -> None:
        mesh = context.mesh
        self._mesh = mesh
        self._module = context.model.module
        # Without sequence parallelism all tp ranks have the same hidden states.
        self._counts_hidden = context.model.sequence_parallel or mesh.tp_rank == 0
        model = context.config.model
        layers = [f"layers.{index}" for index in range(model.num_layers)]
        layers += [f"mtp.{depth}" for depth in range(model.num_mtp_layers)]
        self._scopes = ["embedding", *layers, "final_norm"]
        self._layers: list[str] = []
        if config.attention_logits:
            self._layers = layers
        self.names = [
            *[f"activation_rms/{scope}" for scope in self._scopes],
            *[f"activation_max/{scope}" for scope in self._scopes],
            *[f"attention_logit_max/{layer}" for layer in self._layers],
        ]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._cuts: dict[int, tuple[Tensor, Tensor]] = {}
        self._reset()

    def _reset(self) -> None:
        device = self._mesh.device
        num_scopes = len(self._scopes)
        num_maxima = num_scopes + len(self._layers)
        self._squares = torch.zeros(num_scopes, dtype=torch.float64, device=device)
        self._elements = torch.zeros_like(self._squares)
        maxima = torch.full((num_maxima,), -torch.inf, dtype=torch.float64, device=device)
        self._maxima = maxima
        self._is_first_run = True

    def begin_step(self) -> None:
        """Registers the hooks of this step."""
        self._reset()
        for scope, block in self._blocks():
            self._hooks.append(block.register_forward_pre_hook(self._note_mode))
            if self._counts_hidden:
                self._watch_hidden(scope, block)
            if self._layers:
                self._watch_logits(scope, block.attention)
        if self._counts_hidden and self._module.has_head:
            index = self._scopes.index("final_norm")
            self._hooks.append(
                self._module.final_norm.register_forward_hook(
                    lambda module, inputs, output: self._add(index, output)
                )
            )

    def _blocks(self) -> Sequence[tuple[str, Block]]:
        """Returns the blocks on this rank, by scope."""
        blocks = list[tuple[str, Block]]()
        for index, block in self._module.layers.items():
            assert isinstance(block, Block)
            blocks.append((f"layers.{index}", block))
        for depth, layer in self._module.mtp.items():
            assert isinstance(layer, MultiTokenPredictionLayer)
            blocks.append((f"mtp.{depth}", layer.block))
        return blocks

    def _note_mode(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # A recomputed layer runs again in the backward pass.
        context: ForwardContext = inputs[1]
        self._is_first_run = context.mode.is_first_run

    def _watch_hidden(self, scope: str, block: Block) -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._is_first_run:
                self._add(0, inputs[0])

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if self._is_first_run:
                self._add(index, output)

        index = self._scopes.index(scope)
        if scope == "layers.0":
            self._hooks.append(block.register_forward_pre_hook(before))
        self._hooks.append(block.register_forward_hook(after))

    def _add(self, index: int, hidden: Tensor) -> None:
        rows = hidden.detach().flatten(0, -2)
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
        self._squares[index] += norms.double().square().sum()
        self._elements[index] += rows.numel()
        self._raise(index, torch.linalg.vector_norm(rows, torch.inf))

    def _raise(self, index: int, value: Tensor) -> None:
        self._maxima[index] = torch.maximum(self._maxima[index], value.double())

    def _watch_logits(self, scope: str, attention: CausalAttention) -> None:
        index = len(self._scopes) + self._layers.index(scope)
        window = attention.window

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self._is_first_run:
                return
            with torch.no_grad():
                self._raise(index, self._logit(window, inputs[0], inputs[1], inputs[3]))

        for core in (attention.core, attention.core_with_dropout):
            if core is not None:
                self._hooks.append(core.register_forward_pre_hook(before))

    def _logit(
        self, window: int | None, q_BNSD: Tensor, k_BGSD: Tensor, packed: Any
    ) -> Tensor:
        """Returns the largest logit of this rank's queries, with the keys of all ranks."""
        queries_S, keys_L = self._positions(q_BNSD.shape[2])
        k_BGLD = self._all_keys(k_BGSD)
        documents_BL = None
        if packed is not None:
            documents_BL = packed.documents_BS
        return largest_logit(
            q_BNSD, k_BGLD, Visibility(queries_S, keys_L, window, documents_BL)
        )

    def _all_keys(self, k_BGSD: Tensor) -> Tensor:
        """Returns the keys of all context-parallel ranks, in the order of ranks."""
        group = self._mesh.cp_group
        if group is None:
            return k_BGSD
        k_RBGSD = collectives.all_gather_rows(k_BGSD.detach()[None].contiguous(), group)
        return torch.cat(k_RBGSD.unbind(0), dim=2)

    def _positions(self, length: int) -> tuple[Tensor, Tensor]:
        """Returns the places of this rank's tokens, and of all in the order of ranks."""
        if length not in self._cuts:
            cp = self._mesh.dims.cp
            parts = []
            for rank in range(cp):
                positions = SequenceCut(cp, rank).positions(length * cp)
                parts.append(torch.from_numpy(positions).to(self._mesh.device))
            self._cuts[length] = (parts[self._mesh.cp_rank], torch.cat(parts))
        return self._cuts[length]

    def after_backward(self, sums: StepSums) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def after_update(self) -> Partials:
        """Returns squares, numbers of elements and largest values."""
        return Partials(torch.cat([self._squares, self._elements]), self._maxima)

    def finish(self, reduced: Partials) -> Tensor:
        """Returns the root mean squares and the largest values."""
        squares, elements = reduced.sums.chunk(2)
        return torch.cat([(squares / elements).sqrt(), reduced.maxima])

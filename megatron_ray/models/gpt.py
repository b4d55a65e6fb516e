"""A GPT-class decoder.

Owns: the order of its parts. Must not know: ranks, groups, where a batch comes from.

Shapes: B batch, S sequence, T = B x S tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import ForwardContext, KeyValueCache
from megatron_ray.models.batch import Batch
from megatron_ray.models.block import Block, run_sequentially
from megatron_ray.models.layers import Layers
from megatron_ray.models.multi_token_prediction import MultiTokenPredictionLayer
from megatron_ray.models.rope import rotary_angles
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.sharding.model_specs import (
    norm_spec,
    position_embedding_spec,
    vocabulary_spec,
)
from megatron_ray.sharding.parameters import whole_model


class GPT(nn.Module):
    """Embedding, blocks, norm, head; parameter names are those of the parameter table."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Layers,
        held: Sequence[StageContents] | None = None,
    ) -> None:
        """With the parts of the pipeline stages `held`; all of them when not given."""
        super().__init__()
        self.config = config
        self.held = whole_model(config) if held is None else tuple(held)
        self.on_route: Callable[[int, Tensor], None] | None = None
        """Hears of every router's choice, see `Positions`; for whoever records them."""
        begins, ends = (
            any(getattr(stage, part) for stage in self.held)
            for part in ("embedding", "loss")
        )
        depths = [depth for stage in self.held for depth in stage.mtp_layers]
        uses = begins + len(depths)
        self.embedding = layers.embedding(vocabulary_spec(config), uses) if uses else None
        if begins and config.position_embedding == "learned":
            self.position_embedding = layers.position_embedding(
                position_embedding_spec(config)
            )
        self.embedding_dropout = layers.hidden_dropout("embedding")
        # A dictionary, so that a layer keeps its name when a pipeline cut leaves only
        # some of them.
        self.layers = nn.ModuleDict(
            {
                str(index): Block(config, layers, index)
                for stage in self.held
                for index in stage.layers
            }
        )
        self.through = run_sequentially
        """How activations go through the blocks of a stage; recomputation puts its own
        way here."""
        if ends:
            self.final_norm = layers.norm(norm_spec(config, config.hidden_size))
            self.head = layers.head(
                vocabulary_spec(config),
                self.embedding if config.tie_embeddings else None,
                1 + len(depths),
            )
        self.mtp = nn.ModuleDict(
            {
                str(depth): MultiTokenPredictionLayer(config, layers, depth)
                for depth in depths
            }
        )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All that are here, those that predict further tokens included."""
        found = [*self.layers.values(), *(predict.block for predict in self.mtp.values())]
        return tuple(block for block in found if isinstance(block, Block))

    def forward(self, batch: Batch) -> Tensor:
        """Sum over tokens of loss_mask x -log p(label), fp32 scalar."""
        (whole,) = self.held
        return self.stage(whole, None, batch)

    def stage(
        self, stage: StageContents, received_TH: Tensor | None, batch: Batch
    ) -> Tensor:
        """One of the stages held: activations [T, H] from those of the stage before, or
        the loss from the last one.
        """
        hidden_TH = (
            self._embed(batch.tokens_BS, batch.position_ids, batch.first_sample)
            if received_TH is None
            else received_TH
        )
        positions = self.positions_of(batch, hidden_TH)
        hidden_TH = self.through(
            [self.layers[str(index)] for index in stage.layers], hidden_TH, positions
        )
        if not stage.loss:
            return hidden_TH
        hidden_TH = self.final_norm(hidden_TH)
        loss: Tensor = self.head(
            hidden_TH, batch.labels_BS.reshape(-1), batch.loss_mask_BS.reshape(-1)
        )
        if self.mtp and torch.is_grad_enabled():
            loss = self._with_further_tokens(loss, hidden_TH, batch, positions)
        return loss

    def _with_further_tokens(
        self, loss: Tensor, hidden_TH: Tensor, batch: Batch, positions: ForwardContext
    ) -> Tensor:
        """The loss with the gradients of the losses of further tokens attached.

        Each is a sum over the tokens that have such a label, times loss_coeff / depths,
        and is divided by the tokens of the step as the loss itself is: the mean over T
        tokens of DeepSeek-V3's equation 24, whatever the layout. (T and not the
        somewhat fewer tokens with such a label, as in Megatron-LM with
        calculate_per_token_loss.)
        """
        mtp = self.config.mtp
        further = batch.further
        assert mtp is not None
        assert self.embedding is not None
        if further is None:
            raise ValueError(
                "a model that predicts further tokens is trained on batches with further labels"
            )
        tokens_BS = batch.labels_BS
        for predict, labels_BS, mask_BS in zip(
            self.mtp.values(), further.labels_DBS, further.loss_mask_DBS, strict=True
        ):
            assert isinstance(predict, MultiTokenPredictionLayer)
            hidden_TH = predict(hidden_TH, self._words(tokens_BS), positions, self.through)
            loss = predict.loss(
                loss,
                self.head(
                    hidden_TH, labels_BS.reshape(-1), mask_BS.reshape(-1) * mtp.weight
                ),
            )
            tokens_BS = labels_BS
        return loss

    def _words(self, tokens_BS: Tensor) -> Tensor:
        assert self.embedding is not None
        words_TH: Tensor = self.embedding(tokens_BS.reshape(-1))
        if self.config.embedding_scale != 1.0:
            words_TH = words_TH * self.config.embedding_scale
        return words_TH

    def _embed(
        self, tokens_BS: Tensor, position_ids: Tensor, first_sample: int | None = None
    ) -> Tensor:
        hidden_TH = self._words(tokens_BS)
        if self.config.position_embedding == "learned":
            hidden_TH = hidden_TH + self.position_embedding(
                position_ids.expand(tokens_BS.shape).reshape(-1)
            )
        if self.embedding_dropout is not None and first_sample is not None:
            hidden_TH = self.embedding_dropout(hidden_TH, first_sample)
        return hidden_TH

    def hidden(
        self,
        tokens_BS: Tensor,
        position_ids: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Activations [T, H] after the last norm, of a whole model."""
        hidden_TH = self._embed(tokens_BS, position_ids)
        positions = self._positions(tokens_BS.shape, position_ids, hidden_TH)
        for index, block in enumerate(self.layers.values()):
            hidden_TH = block(
                hidden_TH, positions, caches[index] if caches is not None else None
            )
        output: Tensor = self.final_norm(hidden_TH)
        return output

    def logits(
        self,
        tokens_BS: Tensor,
        position_ids: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """[B, S, V], for inference and judges."""
        logits: Tensor = self.head.logits(self.hidden(tokens_BS, position_ids, caches))  # type: ignore[operator]
        return logits.reshape(*tokens_BS.shape, -1)

    def positions_of(self, batch: Batch, like: Tensor) -> ForwardContext:
        """What blocks need to know of a batch; angles are on the device of `like` and
        fit its type.
        """
        return replace(
            self._positions(batch.tokens_BS.shape, batch.position_ids, like),
            packed=batch.packed,
            first_sample=batch.first_sample,
            routing_replay=_by_token(batch.routing_replay),
            on_route=self.on_route,
        )

    def _positions(
        self, shape: tuple[int, ...], position_ids: Tensor, like: Tensor
    ) -> ForwardContext:
        batch, sequence = shape
        if self.config.position_embedding != "rope":
            return ForwardContext(batch, sequence, None, None)
        cos, sin = rotary_angles(
            position_ids,
            self.config.rotated_width,
            self.config.rope_theta,
            like.dtype,
            self.config.rope_scaling,
        )
        return ForwardContext(batch, sequence, cos, sin)


def _by_token(choices_BSLK: Tensor | None) -> Tensor | None:
    return None if choices_BSLK is None else choices_BSLK.flatten(0, 1)

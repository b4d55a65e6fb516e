"""Assembles a GPT-class decoder.

Owns: the order of its parts, and the parts of each pipeline stage. Must not know:
ranks, groups, the source of batches.

Shapes: B batch, S sequence, T = B x S tokens, H hidden, V vocabulary, L layers, K
experts of a token.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.models.attention import KeyValueCache
from megatron_ray.models.batch import Batch
from megatron_ray.models.block import Block, RunBlocks, run_sequentially
from megatron_ray.models.forward_context import ForwardContext, ForwardMode
from megatron_ray.models.layers import LayerFactory
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
    """Embedding, blocks, norm and head of some pipeline stages, or of a whole model.

    Parameter names are those of the parameter table for any stages.
    """

    activation_dtype: torch.dtype | None = None
    """Type of activations inside of blocks where hidden states between them are fp32; None
    where both have the same type."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerFactory,
        stages: Sequence[StageContents] | None = None,
    ) -> None:
        """Creates the parts of `stages`; all parts when None."""
        super().__init__()
        self.config = config
        self.stages = whole_model(config) if stages is None else tuple(stages)
        self.run_blocks: RunBlocks = run_sequentially
        """Runs the blocks of a stage; `apply_recompute` replaces it."""
        self.on_route: Callable[[int, Tensor], None] | None = None
        """Called for every router's choice, see `ForwardContext`."""
        self.has_embedding = any(stage.embedding for stage in self.stages)
        self.has_head = any(stage.loss for stage in self.stages)
        indices = list[int]()
        depths = list[int]()
        for stage in self.stages:
            indices.extend(stage.layers)
            depths.extend(stage.mtp_layers)

        # MTP layers embed tokens too, so the last stage has a copy of the embedding.
        self._make_embeddings(layers, int(self.has_embedding) + len(depths))
        # Created on every stage, since it has no weights; only the first stage uses it.
        self.embedding_dropout = layers.hidden_dropout("embedding")
        # Dictionaries, so that layers keep their names in a stage with some of them.
        self.layers = nn.ModuleDict()
        for index in indices:
            self.layers[str(index)] = Block(config, layers, index)
        if self.has_head:
            self.final_norm = layers.norm(norm_spec(config, config.hidden_size))
            tied_embedding = self.embedding if config.tie_embeddings else None
            self.head = layers.head(
                vocabulary_spec(config), tied_embedding, 1 + len(depths)
            )
        self.mtp = nn.ModuleDict()
        for depth in depths:
            self.mtp[str(depth)] = MultiTokenPredictionLayer(config, layers, depth)

    def _make_embeddings(self, layers: LayerFactory, uses: int) -> None:
        """Creates the embedding, with `uses` calls per microbatch, and what goes with it."""
        config = self.config
        self.embedding: nn.Module | None = None
        if uses:
            self.embedding = layers.embedding(vocabulary_spec(config), uses)
        self.embedding_norm: nn.Module | None = None
        if self.has_embedding and config.embedding_norm:
            self.embedding_norm = layers.norm(norm_spec(config, config.hidden_size))
        if self.has_embedding and config.position_embedding == "learned":
            self.position_embedding = layers.position_embedding(
                position_embedding_spec(config)
            )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks on this rank, including those of MTP layers."""
        blocks = list[Block]()
        for block in self.layers.values():
            assert isinstance(block, Block)
            blocks.append(block)
        for mtp_layer in self.mtp.values():
            assert isinstance(mtp_layer, MultiTokenPredictionLayer)
            blocks.append(mtp_layer.block)
        return tuple(blocks)

    def forward(self, batch: Batch, mode: ForwardMode = ForwardMode.TRAIN) -> Tensor:
        """Returns the sum over tokens of loss_mask x -log p(label), an fp32 scalar.

        The model must be a single stage.
        """
        # Pipeline runners call `stage` instead.
        (whole,) = self.stages
        return self.stage(whole, None, batch, mode)

    def stage(
        self,
        stage: StageContents,
        received_TH: Tensor | None,
        batch: Batch,
        mode: ForwardMode = ForwardMode.TRAIN,
    ) -> Tensor:
        """Runs one of this rank's pipeline stages.

        `received_TH` is the output of the previous stage, None for the first one.
        Returns hidden states [T, H], or the loss for the last stage.
        """
        if received_TH is None:
            hidden_TH = self._widened(self._embed(batch.tokens_BS, batch.position_ids))
        else:
            hidden_TH = received_TH
        context = self.forward_context(batch, mode, hidden_TH)
        # Later stages receive states to which the first stage has already applied dropout.
        if received_TH is None:
            hidden_TH = self._drop_embedded(hidden_TH, context)
        # A rank may have several (virtual) stages; only the blocks of this one run.
        blocks = [self.layers[str(index)] for index in stage.layers]
        # A stage may have no blocks, only an embedding or a head.
        hidden_TH = self.run_blocks(blocks, hidden_TH, context)
        if not stage.loss:
            return hidden_TH
        # The last stage. MTP layers start from the normalised states, as the head does.
        hidden_TH = self.final_norm(hidden_TH)
        loss: Tensor = self.head(
            self.head_input(hidden_TH),
            batch.labels_BS.reshape(-1),
            batch.loss_mask_BS.reshape(-1),
        )
        # MTP layers only affect gradients, so other passes skip them.
        if self.mtp and mode.attaches_losses:
            loss = self._attach_mtp_losses(loss, hidden_TH, batch, context)
        return loss

    def _attach_mtp_losses(
        self, loss: Tensor, hidden_TH: Tensor, batch: Batch, context: ForwardContext
    ) -> Tensor:
        """Returns `loss` with the gradients of the MTP losses attached.

        Each is a sum over the tokens with such a label, times loss_coeff / depths, and
        is divided by the tokens of the step like the loss itself. This is the mean over
        T tokens of DeepSeek-V3's equation 24 for any layout. (T includes the few tokens
        without such a label, as in Megatron-LM with calculate_per_token_loss.)
        """
        assert self.config.mtp is not None
        weight = self.config.mtp.weight
        targets = batch.mtp_targets
        if targets is None:
            raise ValueError(
                "a model with MTP layers needs batches with mtp_targets in training"
            )
        tokens_BS = batch.labels_BS
        for mtp_layer, labels_BS, mask_BS in zip(
            self.mtp.values(), targets.labels_DBS, targets.loss_mask_DBS, strict=True
        ):
            assert isinstance(mtp_layer, MultiTokenPredictionLayer)
            hidden_TH = mtp_layer(
                hidden_TH, self._embed_tokens(tokens_BS), context, self._run_widened
            )
            # The mask contains the weight, because the gradient of the loss must be one.
            mtp_loss = self.head(
                self.head_input(hidden_TH),
                labels_BS.reshape(-1),
                mask_BS.reshape(-1) * weight,
            )
            loss = mtp_layer.loss(loss, mtp_loss)
            # The next depth embeds the token that this depth predicts.
            tokens_BS = labels_BS
        return loss

    def _run_widened(
        self, blocks: Iterable[nn.Module], hidden_TH: Tensor, context: ForwardContext
    ) -> Tensor:
        """Runs blocks on states that do not come from a block."""
        return self.run_blocks(blocks, self._widened(hidden_TH), context)

    def _widened(self, hidden_TH: Tensor) -> Tensor:
        """Returns hidden states in their type between blocks."""
        if self.activation_dtype is None:
            return hidden_TH
        return hidden_TH.float()

    def head_input(self, hidden_TH: Tensor) -> Tensor:
        """Returns normalised hidden states with the factor of the logits."""
        if self.config.logit_factor == 1.0:
            return hidden_TH
        return hidden_TH * self.config.logit_factor

    def _embed_tokens(self, tokens_BS: Tensor, norm: nn.Module | None = None) -> Tensor:
        assert self.embedding is not None
        embedded_TH: Tensor = self.embedding(tokens_BS.reshape(-1))
        if norm is not None:
            embedded_TH = norm(embedded_TH)
        if self.config.embedding_scale != 1.0:
            embedded_TH = embedded_TH * self.config.embedding_scale
        return embedded_TH

    def _embed(self, tokens_BS: Tensor, position_ids: Tensor) -> Tensor:
        hidden_TH = self._embed_tokens(tokens_BS, self.embedding_norm)
        if self.config.position_embedding == "learned":
            hidden_TH = hidden_TH + self.position_embedding(
                position_ids.expand(tokens_BS.shape).reshape(-1)
            )
        return hidden_TH

    def _drop_embedded(self, hidden_TH: Tensor, context: ForwardContext) -> Tensor:
        if self.embedding_dropout is None or not context.mode.is_training:
            return hidden_TH
        dropped: Tensor = self.embedding_dropout(hidden_TH, context.dropout_sample)
        return dropped

    def hidden(
        self,
        tokens_BS: Tensor,
        position_ids: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Returns hidden states [T, H] after the last norm, for generation.

        The model must be a single stage. `caches`: one per layer, with the previous
        tokens.
        """
        # Without the head, since generation needs logits of the last token only.
        hidden_TH = self._embed(tokens_BS, position_ids)
        context = self._base_context(
            ForwardMode.GENERATE, tokens_BS.shape, position_ids, hidden_TH
        )
        for index, block in enumerate(self.layers.values()):
            cache = None
            if caches is not None:
                cache = caches[index]
            hidden_TH = block(hidden_TH, context, cache)
        output: Tensor = self.final_norm(hidden_TH)
        return output

    def logits(
        self,
        tokens_BS: Tensor,
        position_ids: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Returns logits [B, S, V]; arguments as in `hidden`."""
        hidden_TH = self.hidden(tokens_BS, position_ids, caches)
        logits: Tensor = self.head.logits(self.head_input(hidden_TH))  # type: ignore[operator]
        return logits.reshape(*tokens_BS.shape, -1)

    def forward_context(
        self, batch: Batch, mode: ForwardMode, like: Tensor
    ) -> ForwardContext:
        """Returns the context of a batch for the blocks.

        Its tensors have the device of `like` and the type of activations.
        """
        # Routers process tokens flattened to [B x S].
        routing_replay_TLK = None
        if batch.routing_replay is not None:
            routing_replay_TLK = batch.routing_replay.flatten(0, 1)
        return replace(
            self._base_context(mode, batch.tokens_BS.shape, batch.position_ids, like),
            packed=batch.packed,
            first_sample=batch.first_sample,
            routing_replay=routing_replay_TLK,
            on_route=self.on_route,
        )

    def _base_context(
        self,
        mode: ForwardMode,
        shape: tuple[int, ...],
        position_ids: Tensor,
        like: Tensor,
    ) -> ForwardContext:
        """Returns a context with positions only."""
        batch_size, seq_length = shape
        if self.config.position_embedding != "rope":
            return ForwardContext(mode, batch_size, seq_length, None, None)
        # Angles are computed once per microbatch and shared by all layers.
        cos, sin = rotary_angles(
            position_ids,
            self.config.rotated_width,
            self.config.rope_theta,
            self.activation_dtype or like.dtype,
            self.config.rope_scaling,
        )
        return ForwardContext(mode, batch_size, seq_length, cos, sin)

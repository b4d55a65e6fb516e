"""Lists the layers of a rank's pipeline stages with the names of their modules.

Pure Python. Must not know: torch, sharding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from megatron_ray.config.model import ModelConfig
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.sharding.layer_specs import LayerSpec
from megatron_ray.sharding.model_specs import (
    block_spec,
    mtp_spec,
    norm_spec,
    position_embedding_spec,
    vocabulary_spec,
)

NamedLayer = tuple[str, LayerSpec]


def named_layers(
    model: ModelConfig, stages: Sequence[StageContents]
) -> Iterator[NamedLayer]:
    """Yields the layers of some pipeline stages with their names, in forward order."""
    # The order matters: buckets are filled in reverse order, in which a backward pass
    # completes gradients.
    has_embedding = any(stage.embedding for stage in stages)
    has_head = any(stage.loss for stage in stages)
    yield from _embeddings(model, has_embedding, has_head)
    for stage in stages:
        for layer in stage.layers:
            yield from _layers_of(block_spec(model, layer), f"layers.{layer}.")
    if has_head:
        yield "final_norm", norm_spec(model, model.hidden_size)
        yield from _head(model, has_embedding)
    # After the head, because MTP layers use the final hidden states.
    for stage in stages:
        for depth in stage.mtp_layers:
            yield from _layers_of(mtp_spec(model, depth), f"mtp.{depth}.")


def _embeddings(
    model: ModelConfig, has_embedding: bool, has_head: bool
) -> Iterator[NamedLayer]:
    # The last stage needs the word embedding for a tied head and for MTP layers. If that is
    # not the first stage, both have it, and the global norm counts that of the first.
    if has_embedding:
        is_needed_last = model.tie_embeddings or model.num_mtp_layers > 0
        is_shared = is_needed_last and not has_head
        yield "embedding", vocabulary_spec(model, is_shared_embedding=is_shared)
        if model.embedding_norm:
            yield "embedding_norm", norm_spec(model, model.hidden_size)
        if model.position_embedding == "learned":
            yield "position_embedding", position_embedding_spec(model)
    elif has_head and model.num_mtp_layers:
        copy = vocabulary_spec(model, is_shared_embedding=True, owns_norm=False)
        yield "embedding", copy


def _head(model: ModelConfig, has_embedding: bool) -> Iterator[NamedLayer]:
    if not model.tie_embeddings:
        yield "head", vocabulary_spec(model)
    elif not has_embedding and not model.num_mtp_layers:
        # A tied head on a stage without the embedding has its own copy of the first stage's
        # embedding.
        copy = vocabulary_spec(
            model,
            logical_name="embedding.weight",
            is_shared_embedding=True,
            owns_norm=False,
        )
        yield "head", copy


def _layers_of(spec: Any, prefix: str) -> Iterator[NamedLayer]:
    """Yields the leaves of a tree of dataclasses, named by the path of fields."""
    for field in fields(spec):
        # None: a part that this model lacks, such as the norms of queries.
        child = getattr(spec, field.name)
        name = prefix + field.name
        if isinstance(child, LayerSpec):
            yield name, child
        elif child is not None:
            yield from _layers_of(child, name + ".")

"""Compares a run's config with that of the checkpoint that it resumes from.

Owns: reading the checkpoint's config, and the sizes of the corpora that it was trained
on. Torch-free. Must not know: which fields may change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.train_state import model_values, read_train_state
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.initial_weights import with_latent_eps_of
from megatron_ray.validation.resume.comparison import (
    CorpusSize,
    ResumeComparison,
    compare,
    with_corpora,
)

CORPORA = "corpora"
"""Key of the train state with the sizes of the corpora of `data.train`."""


def compare_with_checkpoint(
    path: str, config: TrainConfig, corpora: Sequence[CorpusSize] | None = None
) -> ResumeComparison:
    """Returns how a run's config differs from that of its checkpoint.

    `corpora` are the sizes of the prepared corpora to train on, once they are known.
    Raises CheckpointError when the checkpoint cannot be read or has no valid config.
    """
    try:
        state = read_train_state(path, 0)
        values = {**state["config"], "model": model_values(state)}
        saved = TrainConfig.from_mapping(values)
        saved_corpora = _corpora(state)
    except (KeyError, TypeError, ValueError) as error:
        cause = f"it does not say how its run was configured: {error}"
        raise CheckpointError("resume from", path, cause) from error
    # The run takes over the latents' eps of its checkpoint, so it is no change.
    model = with_latent_eps_of(config.model, saved.model)
    config = config.model_copy(update={"model": model})
    comparison = compare(config, saved, f"the checkpoint {path} was made with")
    if corpora is None or saved_corpora is None:
        return comparison
    return with_corpora(comparison, config, corpora, saved_corpora)


def _corpora(state: Mapping[str, Any]) -> list[CorpusSize] | None:
    # Checkpoints of earlier versions have no sizes.
    if CORPORA not in state:
        return None
    return [(int(tokens), int(documents)) for tokens, documents in state[CORPORA]]

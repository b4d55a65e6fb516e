"""Compares a run's config with that of the checkpoint that it resumes from.

Owns: reading the checkpoint's config. Torch-free. Must not know: which fields may
change.
"""

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.checkpoint.train_state import model_values, read_train_state
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.initial_weights import with_latent_eps_of
from megatron_ray.validation.resume import ResumeComparison, compare


def compare_with_checkpoint(path: str, config: TrainConfig) -> ResumeComparison:
    """Returns how a run's config differs from that of its checkpoint.

    Raises CheckpointError when the checkpoint cannot be read or has no valid config.
    """
    try:
        state = read_train_state(path, 0)
        values = {**state["config"], "model": model_values(state)}
        saved = TrainConfig.from_mapping(values)
    except (KeyError, TypeError, ValueError) as error:
        cause = f"it does not say how its run was configured: {error}"
        raise CheckpointError("resume from", path, cause) from error
    # The run takes over the latents' eps of its checkpoint, so it is no change.
    model = with_latent_eps_of(config.model, saved.model)
    config = config.model_copy(update={"model": model})
    return compare(config, saved, f"the checkpoint {path} was made with")

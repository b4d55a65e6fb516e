"""Loads the weights that a new run starts from.

Owns: the choice between the readers of native checkpoints and Hugging Face folders.
Must not know: optimizers, layouts, the run.
"""

from megatron_ray.checkpoint.hf.weights import HfWeights
from megatron_ray.checkpoint.initial_model import is_native_checkpoint
from megatron_ray.checkpoint.load import load_into
from megatron_ray.sharding.sharded_state import ShardedState

_MODEL_PREFIX = "model/"


def load_initial_weights(path: str, state: ShardedState) -> None:
    """Fills every `model/...` box of `state` and leaves the others alone.

    Every rank reads its own boxes. Raises CheckpointError, ConfigError.
    """
    weights = {}
    # The optimizer's moments are left out, because a new run starts with zero moments.
    for name, tensor in state.items():
        if name.startswith(_MODEL_PREFIX):
            weights[name] = tensor
    if is_native_checkpoint(path):
        load_into(path, weights)
    else:
        HfWeights(path).load_into(weights)

"""Weights that a new run begins with: a committed checkpoint of ours or a Hugging Face
folder.

Owns: reading either, box by box.

Must not know: optimizers, layouts, the run.
"""

from megatron_ray.checkpoint.hf.weights import HfWeights
from megatron_ray.checkpoint.initial_model import is_native_checkpoint
from megatron_ray.checkpoint.load import load_into
from megatron_ray.sharding.sharded_state import ShardedState


def load_initial_weights(path: str, state: ShardedState) -> None:
    """Fills every `model/...` box of `state` and leaves the others alone; every rank
    reads what it holds. Raises CheckpointError, ConfigError.
    """
    wanted = {name: held for name, held in state.items() if name.startswith("model/")}
    if is_native_checkpoint(path):
        load_into(path, wanted)
    else:
        HfWeights(path).load_into(wanted)

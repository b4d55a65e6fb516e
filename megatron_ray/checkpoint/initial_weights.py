"""Loads the weights that a new run starts from.

Owns: the choice between the readers of native checkpoints and Hugging Face folders, and
rows of the vocabulary that the weights lack. Must not know: optimizers, layouts, the run.
"""

from collections.abc import Callable

from megatron_ray.checkpoint.hf.weights import HfWeights
from megatron_ray.checkpoint.initial_model import is_native_checkpoint
from megatron_ray.checkpoint.load import SavedCheckpoint
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor, TensorBox

_MODEL_PREFIX = "model/"
_VOCABULARY = ("model/embedding.weight", "model/head.weight")
"""Tensors with a row for each token."""


def load_initial_weights(
    path: str, state: ShardedState, draw: Callable[[str], None]
) -> None:
    """Fills every `model/...` box of `state` and leaves the others alone.

    Every rank reads its own boxes. A model may have more tokens than the weights: for
    each tensor with rows that they lack, `draw` is called with its logical name and must
    set them; the other rows are loaded afterwards. Raises CheckpointError, ConfigError.
    """
    reader: SavedCheckpoint | HfWeights
    shapes = {}
    if is_native_checkpoint(path):
        reader = SavedCheckpoint(path)
        for fqn, saved in reader.tensors.items():
            shapes[fqn] = saved.shape
    else:
        reader = HfWeights(path)
        for name, shape in reader.shapes.items():
            shapes[_MODEL_PREFIX + name] = shape
    weights = {}
    # The optimizer's moments are left out, because a new run starts with zero moments.
    for fqn, tensor in state.items():
        if not fqn.startswith(_MODEL_PREFIX):
            continue
        if fqn in _VOCABULARY and fqn in shapes and tensor.shape[0] > shapes[fqn][0]:
            draw(fqn.removeprefix(_MODEL_PREFIX))
            tensor = _first_rows(tensor, shapes[fqn][0])
        weights[fqn] = tensor
    reader.load_into(weights)


def _first_rows(tensor: ShardedTensor, rows: int) -> ShardedTensor:
    """Returns the first rows of a logical tensor, in the same memory."""
    shape = (rows, *tensor.shape[1:])
    whole = Box((0,) * len(shape), shape)
    first_rows = ShardedTensor(shape, [])
    for local in tensor.nonempty():
        box = local.box.intersection(whole)
        if box is not None:
            # Only rows are cut off, and only at the end.
            first_rows.boxes.append(TensorBox(box, local.tensor.narrow(0, 0, box.size[0])))
    return first_rows

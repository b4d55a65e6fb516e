"""When to save and what to keep. Owns: that. Must not know: formats."""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class CheckpointConfig(Config):
    """Checkpoints are written in the background and count only once their COMMITTED
    marker is there.
    """

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; only one after the last step when not given."""
    keep_last: int = Field(default=2, ge=1)
    """Committed checkpoints kept; older ones are deleted once a newer is committed."""
    mode: Literal["async", "sync"] = "async"
    """`async` copies the shard to host memory and writes in the background; `sync`
    waits."""
    start_from: str | None = Field(default=None, min_length=1, max_length=4096)
    """Path or URI of weights that a new run begins with, at step 0 and with a fresh
    optimizer: a committed checkpoint, or a folder in Hugging Face's format. A run that
    goes on takes its own checkpoint."""


class StorageConfig(Config):
    """Where everything a job writes lives, one namespace for all nodes."""

    path: str = Field(min_length=1, max_length=4096)
    """Folder or URI (`s3://`, `gs://`): checkpoints, data, reports, logs, the job's
    journal."""

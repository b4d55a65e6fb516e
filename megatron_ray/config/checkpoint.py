"""Defines when checkpoints are saved, how many are kept and where files are written.

Must not know: the formats of those files.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ray.config.base import Config


class CheckpointConfig(Config):
    """When checkpoints are saved, how many are kept, and the initial weights.

    A checkpoint is complete once its COMMITTED marker is written. Incomplete ones are
    never loaded.
    """

    every_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Steps between checkpoints. Default: a single checkpoint after the last step. Set
    it for every run that is long enough to fail."""
    keep_last: int = Field(default=2, ge=1, le=1 << 40)
    """Number of committed checkpoints to keep. Older ones are deleted when a newer one
    is committed."""
    peer_every_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Steps between copies of each rank's state in host memory: one in its own process and
    one in that of a partner, a rank on another node where there is one. After the loss
    of ranks or of a node, a job of the service then continues from the newest step of
    which all copies are left, and reads no checkpoint; after any other failure, or the
    loss of a rank together with its partner, from the newest checkpoint. A copy begins
    once the last one has arrived, so a slow network may lengthen the interval. Each rank
    needs host memory for four times its parameters and optimizer state. Has no effect on
    a single rank and under torchrun, which ends all processes with one. Default: no
    copies."""
    mode: Literal["async", "sync"] = "async"
    """`async` copies each rank's shard to host memory and writes it in the background
    while training continues; `sync` blocks training until the files are written and
    needs no second copy in host memory."""
    start_from: str | None = Field(default=None, min_length=1, max_length=4096)
    """Path or URI of initial weights for a new run: a committed checkpoint of another
    run, or a folder in Hugging Face format. The run starts at step 0 with a fresh
    optimizer state. Ignored when the run resumes from a checkpoint of its own. Default:
    random initial weights."""
    resume_changes: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        default=(), max_length=64
    )
    """Fields, such as `training.steps` or `optimizer.lr`, in which the job may differ from
    the checkpoint that it resumes from; a section such as `schedule` stands for all its
    fields. Any other change of the model, of the learning rate or of the samples is
    refused. How the run is executed may always change: `parallel` except local_sgd,
    `callbacks`, `checkpoint`, `storage`, `data.cache`, and of `training`
    micro_batch_size, recompute, compile, cuda_graph, deterministic, eval_every_steps,
    eval_samples, skip_steps, max_skipped_steps, max_consecutive_skipped_steps, rules,
    max_rollbacks, inject_faults, check_replicas_every_steps, loss_scale,
    grad_reduce_in_fp32, fp8.param_gather, max_duration_s, exit_every_steps and profile; of
    `optimizer` store_param_remainders and offload. Default: nothing else may change."""


class StorageConfig(Config):
    """Where a job writes its files; every node must see the same contents there."""

    path: str = Field(min_length=1, max_length=4096)
    """Folder or URI (`s3://`, `gs://`) of the job's checkpoints, prepared data, reports,
    logs and journal."""

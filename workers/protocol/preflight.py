"""Defines whether and how nodes are measured before training.

Owns: what a spec may choose of it. Must not know: how anything is measured.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class PreflightConfig(Config):
    """Measurements of a job's nodes and links before it trains on them.

    Every rank multiplies matrices and copies memory; then the ranks of a node reduce among
    themselves, nodes exchange messages in pairs, and all ranks reduce together. A node that
    is much slower than its peers, or whose products are wrong, is excluded, and the job
    starts elsewhere, which is no failure of the job. It takes some seconds, on CPU a few.
    Under torchrun and Ray Train it has no effect.
    """

    mode: Literal["never", "before_training", "only"] = "never"
    """`before_training`: measure whenever the job starts on a node that it has not yet
    measured; `only`: measure and end, without data or training. `megatron-ray cluster check`
    submits such a job."""
    min_ratio: float = Field(default=0.8, gt=0, lt=1)
    """A node is bad below this share of the median of its peers: those with equal devices.
    Ranks that share CPU cores with other processes vary more than GPUs."""
    timeout_s: float = Field(default=60.0, ge=5, le=3600)
    """Seconds without any result after which a measurement counts as hung."""

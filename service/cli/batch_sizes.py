"""Reads the samples of each step from a spec as JSON, of any version of the service.

Must not know: commands.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ray.config.schedules.batch_sizes import BatchSizes, RampupConfig
from service.cli.output import nested


def batch_sizes(training: Mapping[str, Any]) -> BatchSizes | None:
    """Returns the samples of each step; None when the spec has no batch size."""
    full = training.get("global_batch_size")
    if not isinstance(full, int):
        return None
    sizes = {}
    for name in RampupConfig.model_fields:
        size = nested(training, f"rampup_batch_size.{name}")
        # Also without a ramp-up.
        if not isinstance(size, int):
            return BatchSizes(full)
        sizes[name] = size
    return BatchSizes(full, RampupConfig(**sizes))


def in_words(sizes: BatchSizes) -> str:
    """Returns the samples of a step: one number, or the first and the last."""
    first = sizes.at(0)
    if first == sizes.full:
        return str(first)
    return f"{first} to {sizes.full}"

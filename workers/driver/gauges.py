"""Training gauges on Ray's own metrics port, for its dashboard and Prometheus.

Owns: their names. Live curves go another way.
"""

import math
from typing import Any

from ray.util.metrics import Gauge

_GAUGES = {
    "step": ("megatron_ray_step", "Optimizer updates done"),
    "loss": ("megatron_ray_loss", "Training loss, nats per token"),
    "tokens_per_s": ("megatron_ray_tokens_per_s", "Tokens per second, all ranks"),
}


class TrainingGauges:
    """Gauges of one job, labelled with its id."""

    def __init__(self, job_id: str) -> None:
        self._gauges = {
            key: Gauge(name, description=text, tag_keys=("job",))
            for key, (name, text) in _GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"job": job_id})

    def show(self, step: dict[str, Any]) -> None:
        """The newest step report."""
        for key, gauge in self._gauges.items():
            value = step.get(key)
            if value is not None and math.isfinite(value):
                gauge.set(float(value))

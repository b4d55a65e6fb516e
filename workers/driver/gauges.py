"""Exports training gauges on Ray's metrics port, for its dashboard and Prometheus.

Owns: their names. The service's live curves use step reports instead.
"""

import math
from typing import Any

from ray.util.metrics import Gauge

_GAUGES = {
    "step": ("megatron_ray_step", "Optimizer updates done"),
    "loss": ("megatron_ray_loss", "Training loss, nats per token"),
    "skipped_steps": ("megatron_ray_skipped_steps", "Steps skipped, not finite"),
    "tokens_per_s": ("megatron_ray_tokens_per_s", "Tokens per second, all ranks"),
}


class TrainingGauges:
    """The gauges of one job, labelled with its id."""

    def __init__(self, job_id: str) -> None:
        self._gauges = {}
        for key, (name, description) in _GAUGES.items():
            gauge = Gauge(name, description=description, tag_keys=("job",))
            gauge.set_default_tags({"job": job_id})
            self._gauges[key] = gauge

    def update(self, step: dict[str, Any]) -> None:
        """Sets the gauges to the newest step report."""
        for key, gauge in self._gauges.items():
            value = step.get(key)
            # Prometheus accepts infinities, but dashboards cannot plot them.
            if value is not None and math.isfinite(value):
                gauge.set(float(value))

"""Exports training gauges on Ray's metrics port, for its dashboard and Prometheus.

Owns: their names and labels. The service's live curves use step reports instead.

`deploy/grafana/megatron-ray.json` shows them; a test compares the names.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Gauge

_INTERVAL_S = 1.0
"""Shortest time between two updates; Ray exports every few seconds."""
_GROUP = "trainer"
"""The rank group of a training job."""


@dataclass(frozen=True)
class GaugeSpec:
    """The name, labels and description of one gauge; Ray adds the prefix `ray_`."""

    name: str
    description: str
    labels: tuple[str, ...] = ("job_id", "group")


GAUGES = {
    "step": GaugeSpec("megatron_ray_step", "Optimizer updates done"),
    "loss": GaugeSpec("megatron_ray_loss", "Training loss, nats per token"),
    "grad_norm": GaugeSpec("megatron_ray_grad_norm", "Gradient norm before clipping"),
    "skipped_steps": GaugeSpec("megatron_ray_skipped_steps", "Steps skipped, not finite"),
    "step_s": GaugeSpec("megatron_ray_step_seconds", "Duration of a step"),
    "tokens_per_s": GaugeSpec("megatron_ray_tokens_per_s", "Tokens per second, all ranks"),
    "mfu": GaugeSpec("megatron_ray_mfu", "Model FLOPs utilisation, 0 to 1"),
    "memory_bytes": GaugeSpec(
        "megatron_ray_memory_bytes", "Peak memory of rank 0: of its GPU, on CPU resident"
    ),
    "attempt": GaugeSpec("megatron_ray_attempt", "Number of the attempt"),
    "goodput": GaugeSpec(
        "megatron_ray_goodput", "Share of the time with resources spent on new steps"
    ),
    "split_s": GaugeSpec(
        "megatron_ray_step_part_seconds",
        "Duration of a part of a step on rank 0",
        ("job_id", "group", "part"),
    ),
}
"""The gauges, by the field of a step report or the argument of `update` they show.

Labels are bounded: jobs that run, groups of ranks, parts of a step.
"""


class TrainingGauges:
    """The gauges of one job."""

    def __init__(self, job_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._updated_at = -math.inf
        self._gauges = {}
        for key, spec in GAUGES.items():
            gauge = Gauge(spec.name, description=spec.description, tag_keys=spec.labels)
            gauge.set_default_tags({"job_id": job_id, "group": _GROUP})
            self._gauges[key] = gauge

    def update(self, step: Mapping[str, Any], attempt: int, goodput: float | None) -> None:
        """Sets the gauges to the newest step report, at most once a second."""
        now = self._clock()
        if now - self._updated_at < _INTERVAL_S:
            return
        self._updated_at = now
        for key, value, labels in gauge_values(step, attempt, goodput):
            self._gauges[key].set(value, tags=labels)


def gauge_values(
    step: Mapping[str, Any], attempt: int, goodput: float | None
) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Yields key, value and labels of each gauge that has a finite value."""
    values = {**step, "attempt": attempt, "goodput": goodput}
    for key in GAUGES:
        value = values.get(key)
        parts: Mapping[str, Any] = {"": value}
        if isinstance(value, Mapping):
            parts = value
        for part, number in parts.items():
            # Prometheus accepts infinities, but dashboards cannot plot them.
            if number is not None and math.isfinite(number):
                labels = {"part": part} if part else {}
                yield key, float(number), labels

"""Numbers about the service for Prometheus.

Owns: metric names, and keeping their number bounded. Must not know: routes.
"""

import contextlib
from collections.abc import Iterable, Iterator

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy.orm import Session

from service.store.schema import JobRow
from workers.protocol.states import JobState

MOST_JOBS = 200
"""Newest running jobs that get gauges of their own."""
UNKNOWN_ROUTE = "unknown"


class Telemetry:
    """One registry per service; label values are route templates, methods, states and
    job ids, never what a caller sends.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        buckets = (
            0.001,
            0.0025,
            0.005,
            0.01,
            0.025,
            0.05,
            0.1,
            0.25,
            0.5,
            1.0,
            2.5,
            10.0,
            30.0,
        )
        labels = ("method", "route", "status")
        text = "Time to answer; event streams and long polls are not counted."
        self.latency = Histogram(
            "megatron_ray_http_request_seconds",
            text,
            labels,
            buckets=buckets,
            registry=self.registry,
        )
        self.requests = Counter(
            "megatron_ray_http_requests",
            "Requests by route and status class.",
            labels,
            registry=self.registry,
        )
        self.jobs_created = Counter(
            "megatron_ray_jobs_created",
            "Jobs accepted since the start.",
            registry=self.registry,
        )
        self.records = Counter(
            "megatron_ray_records_received",
            "Records in batches that were stored.",
            registry=self.registry,
        )
        self._open_streams = 0
        self.streams = Gauge(
            "megatron_ray_streams_open", "Event streams open now.", registry=self.registry
        )

    @property
    def open_streams(self) -> int:
        """Event streams open now."""
        return self._open_streams

    @contextlib.contextmanager
    def stream_open(self) -> Iterator[None]:
        """Counts one stream for as long as the block runs; on the event loop only."""
        self._open_streams += 1
        self.streams.set(self._open_streams)
        try:
            yield
        finally:
            self._open_streams -= 1
            self.streams.set(self._open_streams)

    def observe(
        self, method: str, route: str, status: int, seconds: float, *, waits: bool
    ) -> None:
        """One request is answered; `waits`: it was meant to take long."""
        labels = (method if method in _METHODS else "other", route, f"{status // 100}xx")
        self.requests.labels(*labels).inc()
        if not waits:
            self.latency.labels(*labels).observe(seconds)

    def render(self, session: Session, agent_silence_s: dict[str, float | None]) -> bytes:
        """Text in Prometheus' format: the counters, and the jobs as they are in the
        database.
        """
        registry = CollectorRegistry()
        registry.register(
            _Snapshot(
                [
                    *_jobs_by_state(session),
                    *_running_jobs(session),
                    _agents(agent_silence_s),
                ]
            )
        )
        return generate_latest(self.registry) + generate_latest(registry)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class _Snapshot:
    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._families


def _jobs_by_state(session: Session) -> list[GaugeMetricFamily]:
    statement = (
        sa.select(JobRow.status, sa.func.count())
        .where(JobRow.deleted_at.is_(None))
        .group_by(JobRow.status)
    )
    counts = {str(status): int(count) for status, count in session.execute(statement)}
    family = GaugeMetricFamily("megatron_ray_jobs", "Jobs by state.", labels=["state"])
    for state in JobState:
        family.add_metric([state.value], counts.get(state.value, 0))
    return [family]


def _running_jobs(session: Session) -> list[GaugeMetricFamily]:
    statement = sa.select(JobRow.id, JobRow.name, JobRow.progress).where(
        JobRow.status == JobState.RUNNING
    )
    rows = session.execute(statement.order_by(JobRow.number.desc()).limit(MOST_JOBS)).all()
    families = []
    for key, text in {
        "step": "Last step seen.",
        "loss": "Loss of that step.",
        "tokens_per_s": "Tokens per second of that step.",
        "mfu": "Share of the devices' peak FLOP/s.",
    }.items():
        family = GaugeMetricFamily(f"megatron_ray_job_{key}", text, labels=["job", "name"])
        for job_id, name, progress in rows:
            if progress.get(key) is not None:
                family.add_metric([job_id, name], progress[key])
        families.append(family)
    return families


def _agents(agent_silence_s: dict[str, float | None]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "megatron_ray_agent_silence_seconds",
        "Time since an agent spoke.",
        labels=["cluster"],
    )
    for cluster, silence in agent_silence_s.items():
        if silence is not None:
            family.add_metric([cluster], silence)
    return family

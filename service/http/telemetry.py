"""Collects the service's metrics for Prometheus.

Owns: metric names, and keeping the number of time series bounded. Must not know: routes.
"""

import contextlib
from collections.abc import Iterable, Iterator

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy.orm import Session

from service.store.schema import JobRow
from workers.protocol.states import JobState

MAX_JOBS = 200
"""Newest running jobs that get gauges of their own."""
UNKNOWN_ROUTE = "unknown"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# fmt: off
_LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0,
)
# fmt: on
"""Upper bounds in seconds."""
_JOB_GAUGES = {
    "step": "Last reported step.",
    "loss": "Loss of the last reported step.",
    "tokens_per_s": "Tokens per second of the last reported step.",
    "mfu": "Model FLOPs utilisation of the last reported step.",
}
"""Entry of a job's progress -> help text."""


class Telemetry:
    """The metrics of one service.

    Label values are route templates, methods, states and job ids, never what a client
    sends.
    """

    def __init__(self) -> None:
        registry = CollectorRegistry(auto_describe=True)
        labels = ("method", "route", "status")
        self.registry = registry
        self.latency = Histogram(
            "megatron_ray_http_request_seconds",
            "Time to answer a request, without event streams and long polls.",
            labels,
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.requests = Counter(
            "megatron_ray_http_requests",
            "Requests by route and status class.",
            labels,
            registry=registry,
        )
        self.jobs_created = Counter(
            "megatron_ray_jobs_created",
            "Jobs accepted since the service started.",
            registry=registry,
        )
        self.records = Counter(
            "megatron_ray_records_received",
            "Records of drivers in batches that were stored.",
            registry=registry,
        )
        self._open_streams = 0
        self.streams = Gauge(
            "megatron_ray_streams_open", "Event streams open now.", registry=registry
        )

    @property
    def open_streams(self) -> int:
        """Event streams open now."""
        return self._open_streams

    @contextlib.contextmanager
    def stream_open(self) -> Iterator[None]:
        """Counts one stream while the block runs; only on the event loop's thread."""
        # An integer of our own: the limit on streams must not read a metric.
        self._open_streams += 1
        self.streams.set(self._open_streams)
        try:
            yield
        finally:
            self._open_streams -= 1
            self.streams.set(self._open_streams)

    def observe(
        self, method: str, route: str, status: int, seconds: float, *, is_long_wait: bool
    ) -> None:
        """Counts a request that was answered.

        `is_long_wait`: a stream or long poll, whose duration is no measure of speed.
        """
        if method not in _METHODS:
            # A method may be any word the client likes.
            method = "other"
        labels = (method, route, f"{status // 100}xx")
        self.requests.labels(*labels).inc()
        # They are counted as requests, but their seconds would drown all others.
        if not is_long_wait:
            self.latency.labels(*labels).observe(seconds)

    def render(self, session: Session, agent_silence_s: dict[str, float | None]) -> bytes:
        """Returns all metrics in Prometheus' text format.

        The gauges of jobs are read from the database now; `agent_silence_s` holds seconds
        by cluster.
        """
        families = [_jobs_by_state(session), *_running_jobs(session)]
        families.append(_agent_silence(agent_silence_s))
        # A registry per call, so that gauges of jobs that have ended disappear.
        snapshot = CollectorRegistry()
        snapshot.register(_Snapshot(families))
        return generate_latest(self.registry) + generate_latest(snapshot)


class _Snapshot:
    """A collector of values that were read before."""

    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Returns the values to Prometheus' client."""
        return self._families


def _jobs_by_state(session: Session) -> GaugeMetricFamily:
    statement = (
        sa.select(JobRow.status, sa.func.count())
        .where(JobRow.deleted_at.is_(None))
        .group_by(JobRow.status)
    )
    counts: dict[str, int] = {}
    for status, count in session.execute(statement):
        counts[status] = count
    family = GaugeMetricFamily("megatron_ray_jobs", "Jobs by state.", labels=["state"])
    # States without jobs are reported as 0: a missing series cannot be alerted on.
    for state in JobState:
        family.add_metric([state.value], counts.get(state.value, 0))
    return family


def _running_jobs(session: Session) -> list[GaugeMetricFamily]:
    statement = (
        sa.select(JobRow.id, JobRow.name, JobRow.progress)
        .where(JobRow.status == JobState.RUNNING)
        .order_by(JobRow.number.desc())
        .limit(MAX_JOBS)
    )
    rows = session.execute(statement).all()
    families = []
    for key, help_text in _JOB_GAUGES.items():
        family = GaugeMetricFamily(
            f"megatron_ray_job_{key}", help_text, labels=["job", "name"]
        )
        for job_id, name, progress in rows:
            value = progress.get(key)
            if value is not None:
                family.add_metric([job_id, name], value)
        families.append(family)
    return families


def _agent_silence(agent_silence_s: dict[str, float | None]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "megatron_ray_agent_silence_seconds",
        "Seconds since the agent's last request.",
        labels=["cluster"],
    )
    for cluster, silence_s in agent_silence_s.items():
        if silence_s is not None:
            family.add_metric([cluster], silence_s)
    return family

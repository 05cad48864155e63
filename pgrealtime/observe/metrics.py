"""What is measured, in Prometheus' form. The rooms count by themselves; here it gets its names."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pgrealtime import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIX = "pgrealtime_"
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Reading(Struct, kw_only=True):
    """What the rooms say at one moment. Labels are bounded by the configuration or the program."""

    connections: int
    subscriptions: Mapping[str, int]
    """By collection."""
    events_sent: int
    closed: Mapping[str, int]
    """Connections, by reason."""
    gaps: Mapping[str, int]
    """Told to connections, by reason."""
    resumes: Mapping[str, int]
    """By result."""
    filters_refused: int
    left_out: Mapping[str, int]
    """Records without a column, by collection."""
    rule_errors: Mapping[tuple[str, str], int]
    """By collection and reason."""
    auth_checks: Mapping[str, int]
    """By result."""
    logins: Mapping[str, int]
    """By password, by result."""
    changes: int
    """Taken from the stream."""
    stream_breaks: Mapping[str, int]
    """By error code."""
    changelog_bytes: int
    is_streaming: bool
    lag_bytes: int | None
    """What the slot has not confirmed of what the server wrote; None if it can't be asked."""
    retained_bytes: int | None
    """WAL that the slot keeps; None if it can't be asked."""


class Metrics:
    """What is measured as it happens; all else is read when somebody looks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._rule_query_seconds = Histogram(
            _PREFIX + "rule_query_seconds",
            "Statements that asked about rules and filters, of many rows and subscribers each.",
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def note_rule_query(self, seconds: float) -> None:
        """Take note of how long a statement took."""
        self._rule_query_seconds.observe(seconds)

    def exposition(self, reading: Reading) -> bytes:
        """Return all of it as text, of the type ``CONTENT_TYPE``."""
        return generate_latest(_Together(self._registry, reading))


class _Together(Collector):
    """The registry and a reading as one."""

    def __init__(self, registry: CollectorRegistry, reading: Reading) -> None:
        self._registry = registry
        self._reading = reading

    def collect(self) -> Iterable[Metric]:
        yield from _families(self._reading)
        yield from self._registry.collect()


def _families(reading: Reading) -> Iterable[Metric]:
    versions = {"version": __version__, "python": platform.python_version()}
    yield _gauge("build_info", "What runs.", tuple(versions), [(tuple(versions.values()), 1)])
    yield _gauge("connections", "Open connections.", (), _alone(reading.connections))
    yield _gauge(
        "subscriptions",
        "Topics of open connections that something can match.",
        ("collection",),
        _labelled(reading.subscriptions),
    )
    yield _counter("events_sent", "Events written to connections.", (), _alone(reading.events_sent))
    yield _counter(
        "connections_closed", "Connections that ended.", ("reason",), _labelled(reading.closed)
    )
    yield _counter(
        "gaps",
        "Connections that were told of a gap, or ended for one.",
        ("reason",),
        _labelled(reading.gaps),
    )
    yield _counter(
        "resumes",
        "Connections that came back with a position.",
        ("result",),
        _labelled(reading.resumes),
    )
    yield _counter(
        "expensive_filters_refused",
        "Calls that were refused because they had too many options of one kind.",
        (),
        _alone(reading.filters_refused),
    )
    yield _counter(
        "incomplete_records",
        "Records that were shown to somebody without a column that a later change had written.",
        ("collection",),
        _labelled(reading.left_out),
    )
    yield _counter(
        "rule_query_errors",
        "Statements about rules that failed, and questions that were not put.",
        ("collection", "reason"),
        reading.rule_errors.items(),
    )
    yield _counter(
        "auth_checks", "Callers, by their tokens.", ("result",), _labelled(reading.auth_checks)
    )
    yield _counter(
        "logins",
        "Attempts to sign in by a password: ok, or the code of the refusal.",
        ("result",),
        _labelled(reading.logins),
    )
    yield _counter(
        "replication_changes", "Changes taken from the stream.", (), _alone(reading.changes)
    )
    yield _counter(
        "replication_breaks",
        "How often the stream broke, or could not be opened.",
        ("code",),
        _labelled(reading.stream_breaks),
    )
    yield _gauge("changelog_bytes", "Changes that are held.", (), _alone(reading.changelog_bytes))
    yield _gauge(
        "replication_connected",
        "Whether changes are being read.",
        (),
        _alone(int(reading.is_streaming)),
    )
    if reading.lag_bytes is not None:
        yield _gauge(
            "replication_lag_bytes",
            "WAL that was written and is not yet confirmed.",
            (),
            _alone(reading.lag_bytes),
        )
    if reading.retained_bytes is not None:
        yield _gauge(
            "slot_retained_bytes",
            "WAL that the server keeps for the slot.",
            (),
            _alone(reading.retained_bytes),
        )


_Values: TypeAlias = Iterable[tuple[Sequence[str], int]]
"""Of each combination of labels."""


def _alone(value: int) -> _Values:
    return [((), value)]


def _labelled(values: Mapping[str, int]) -> _Values:
    return [((label,), value) for label, value in values.items()]


def _gauge(name: str, what: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, what, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def _counter(name: str, what: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, what, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family

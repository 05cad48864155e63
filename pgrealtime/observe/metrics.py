"""The metrics in Prometheus' text format. Other packages count; this one names the metrics."""

import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

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
_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)

_PREFIX = "pgrealtime_"
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class LogValues(Struct, frozen=True, kw_only=True):
    """How the log between owner and replicas fares, as one of them sees it."""

    is_owner: bool
    taken_count: int
    """How often this process became the owner."""
    term: int
    lag_messages: int
    """Messages of the log that this process has yet to read, by the owner's last beat."""
    lag_seconds: float
    """Since this process last had them all; 0 if it has."""
    append_seconds: float
    """How long the owner's last message took to be stored; 0 elsewhere."""
    void_count: int
    fetched_count: int
    replicas: Mapping[str, int]
    """Replicas that are there, by the digest of their configurations."""


class MetricValues(Struct, kw_only=True):
    """Counters and gauges of one moment. The configuration or the program bounds all labels."""

    open_connections: int
    subscription_counts: Mapping[str, int]
    """By collection."""
    events_sent: int
    closed_connections: Mapping[str, int]
    """Connections, by reason."""
    gaps_notified: Mapping[str, int]
    """Gaps notified to connections, by reason."""
    mirror_frames: Mapping[str, int]
    """Events sent to mirrors, by action."""
    mirror_resyncs: Mapping[str, int]
    """Mirrors told to load anew, by reason."""
    resume_outcomes: Mapping[str, int]
    """By result."""
    refused_subscribe_calls: int
    incomplete_records: Mapping[str, int]
    """Records delivered without a column, by collection."""
    rule_query_errors: Mapping[tuple[str, str], int]
    """By collection and reason."""
    auth_checks: Mapping[str, int]
    """By result."""
    login_results: Mapping[str, int]
    """Logins by password, by result."""
    read_outcomes: Mapping[tuple[str, str], int]
    """Lists, single records and lists sent to mirrors, by kind and result."""
    forwarded_calls: Mapping[str, int]
    """Subscribe calls that were passed on to other processes, by result."""
    ignored_bus_messages: Mapping[str, int]
    """By error code."""
    changes_received: int
    """Changes received from the stream."""
    stream_breaks: Mapping[str, int]
    """Streams that broke, by error code."""
    changelog_bytes: int
    is_replication_connected: bool
    log: LogValues | None = None
    """None without a log."""
    lag_bytes: int | None
    """WAL that the slot hasn't confirmed; None if PostgreSQL doesn't answer."""
    retained_bytes: int | None
    """WAL that the server keeps for the slot; None if PostgreSQL doesn't answer."""


def sum_values(processes: Sequence[MetricValues]) -> MetricValues:
    """Return the values of several processes together; what is unknown in one is left out."""

    def total(values: Sequence[Any]) -> Any:
        known = [value for value in values if value is not None]
        match known:
            case []:
                return None
            case [bool(), *_]:
                return any(known)
            case [int(), *_]:
                return sum(known)
            case _:
                return sum(map(Counter, known), Counter())

    names = MetricValues.__struct_fields__
    return MetricValues(**{name: total([getattr(p, name) for p in processes]) for name in names})


Sample: TypeAlias = tuple[str, Mapping[str, str], float]
"""Name, labels and value."""

_SampleKey: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]


def _sample_key(name: str, labels: Mapping[str, str]) -> _SampleKey:
    return name, tuple(sorted(labels.items()))


_OF_ONE_PROCESS = ("process_start_time_seconds", "process_max_fds")
"""Samples that can't be summed over processes; also those with the suffix ``_created``."""


def sum_samples(processes: Iterable[Sequence[Sample]]) -> Sequence[Sample]:
    """Return the samples of several processes together, without those that can't be summed."""
    sums: defaultdict[_SampleKey, float] = defaultdict(float)
    for name, labels, value in (sample for samples in processes for sample in samples):
        if name not in _OF_ONE_PROCESS and not name.endswith("_created"):
            sums[_sample_key(name, labels)] += value
    return [(name, dict(labels), value) for (name, labels), value in sums.items()]


class Metrics:
    """The histogram that is filled as queries run; all other values are read at each scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._rule_query_seconds = Histogram(
            _PREFIX + "rule_query_seconds",
            "Statements that evaluated rules and filters, each for many rows and subscribers.",
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def observe_rule_query(self, seconds: float) -> None:
        """Record how long a statement took."""
        self._rule_query_seconds.observe(seconds)

    def samples(self) -> Sequence[Sample]:
        """Return what this process measures of itself: CPU, memory, and its statements' times."""
        return [(s.name, s.labels, s.value) for f in self._registry.collect() for s in f.samples]

    def exposition(
        self, values: MetricValues, others: Sequence[Sequence[Sample]] = (), workers: int = 0
    ) -> bytes:
        """Return all metrics as text of the type ``CONTENT_TYPE``.

        ``others`` are the samples of other processes, which are added to this one's; ``workers`` is
        their number, if they serve the port.
        """
        more = {_sample_key(name, labels): value for name, labels, value in sum_samples(others)}
        return generate_latest(_CombinedCollector(self._registry, values, more, workers))


class _CombinedCollector(Collector):
    """The registry and the values of a scrape as one collector."""

    def __init__(
        self,
        registry: CollectorRegistry,
        values: MetricValues,
        more: Mapping[_SampleKey, float],
        workers: int,
    ) -> None:
        self._registry = registry
        self._values = values
        self._more = more
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        yield from _families(self._values)
        if self._workers:
            yield _gauge("workers", self._workers)
        for family in self._registry.collect():
            family.samples = [
                s._replace(value=s.value + self._more.get(_sample_key(s.name, s.labels), 0))
                for s in family.samples
            ]
            yield family


_HELP = {
    "build_info": "Versions of pgrealtime and Python.",
    "workers": "Processes that serve the port and answer.",
    "connections": "Open connections.",
    "subscriptions": "Subscriptions of open connections that an event can match.",
    "events_sent": "Events written to connections.",
    "connections_closed": "Connections that ended.",
    "gaps": "Connections that were notified of a gap, or closed for one.",
    "mirror_frames": "Events written to connections for mirrors, by action.",
    "mirror_resyncs": "Mirrors that were told to load their lists anew.",
    "resumes": "Connections that submitted a position to resume from.",
    "expensive_filters_refused": "Subscribe calls that were refused because of too many options"
    " of one kind.",
    "incomplete_records": "Records that were sent without a column that a later change had"
    " written.",
    "rule_query_errors": "Rule statements that failed or were not sent.",
    "auth_checks": "Authentications of callers by token.",
    "logins": "Password logins: ok, or the error code.",
    "reads": "Lists and single records on request, and lists sent to mirrors: ok, or the error"
    " code.",
    "calls_forwarded": "Subscribe calls that were passed on to the process that has the connection:"
    " ok, or the error code.",
    "bus_messages_ignored": "Messages on the bus that were ignored, by the reason.",
    "replication_changes": "Changes received from the stream.",
    "replication_breaks": "Times that the stream was interrupted or could not be opened.",
    "changelog_bytes": "Size of the changes in the changelog.",
    "replication_connected": "Whether changes are being received.",
    "replication_lag_bytes": "WAL that was written and is not confirmed yet.",
    "owner": "Whether this process reads the slot for all that follow the log.",
    "owner_changes": "Times that this process became the owner.",
    "log_term": "Term of the log's owner.",
    "log_lag_messages": "Messages of the log that this process has yet to read.",
    "log_lag_seconds": "Time since this process had read the whole log.",
    "log_append_seconds": "How long the last message of this owner took to be stored.",
    "log_void": "Messages of the log that did not count.",
    "log_fetched": "Messages of the log that were asked for singly.",
    "replicas": "Replicas that follow the log, by a digest of their configuration.",
    "slot_retained_bytes": "WAL that the server keeps for the slot.",
}
"""Metric -> what it counts or measures."""


def _families(values: MetricValues) -> Iterable[Metric]:
    versions = (__version__, platform.python_version())
    yield _gauge("build_info", {versions: 1}, "version", "python")
    yield _gauge("connections", values.open_connections)
    yield _gauge("subscriptions", values.subscription_counts, "collection")
    yield _counter("events_sent", values.events_sent)
    yield _counter("connections_closed", values.closed_connections, "reason")
    yield _counter("gaps", values.gaps_notified, "reason")
    yield _counter("mirror_frames", values.mirror_frames, "action")
    yield _counter("mirror_resyncs", values.mirror_resyncs, "reason")
    yield _counter("resumes", values.resume_outcomes, "result")
    yield _counter("expensive_filters_refused", values.refused_subscribe_calls)
    yield _counter("incomplete_records", values.incomplete_records, "collection")
    yield _counter("rule_query_errors", values.rule_query_errors, "collection", "reason")
    yield _counter("auth_checks", values.auth_checks, "result")
    yield _counter("logins", values.login_results, "result")
    yield _counter("reads", values.read_outcomes, "kind", "result")
    yield _counter("calls_forwarded", values.forwarded_calls, "result")
    yield _counter("bus_messages_ignored", values.ignored_bus_messages, "code")
    yield _counter("replication_changes", values.changes_received)
    yield _counter("replication_breaks", values.stream_breaks, "code")
    yield _gauge("changelog_bytes", values.changelog_bytes)
    yield _gauge("replication_connected", int(values.is_replication_connected))
    if values.log is not None:
        yield from _log_families(values.log)
    if values.lag_bytes is not None:
        yield _gauge("replication_lag_bytes", values.lag_bytes)
    if values.retained_bytes is not None:
        yield _gauge("slot_retained_bytes", values.retained_bytes)


def _log_families(log: LogValues) -> Iterable[Metric]:
    yield _gauge("owner", int(log.is_owner))
    yield _counter("owner_changes", log.taken_count)
    yield _gauge("log_term", log.term)
    yield _gauge("log_lag_messages", log.lag_messages)
    yield _gauge("log_lag_seconds", log.lag_seconds)
    yield _gauge("log_append_seconds", log.append_seconds)
    yield _counter("log_void", log.void_count)
    yield _counter("log_fetched", log.fetched_count)
    yield _gauge("replicas", log.replicas, "configuration")


_Samples: TypeAlias = int | float | Mapping[str, int] | Mapping[tuple[str, str], int]
"""The value of a metric without labels, or a value for each label or labels."""


def _gauge(name: str, samples: _Samples, *labels: str) -> Metric:
    return _with_samples(GaugeMetricFamily(_PREFIX + name, _HELP[name], labels=labels), samples)


def _counter(name: str, samples: _Samples, *labels: str) -> Metric:
    return _with_samples(CounterMetricFamily(_PREFIX + name, _HELP[name], labels=labels), samples)


def _with_samples(family: _Family, samples: _Samples) -> _Family:
    if isinstance(samples, int | float):
        family.add_metric((), samples)
        return family
    for labels, value in samples.items():
        family.add_metric((labels,) if isinstance(labels, str) else labels, value)
    return family

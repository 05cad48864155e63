"""The metrics of a service of several processes."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgrealtime.observe.metrics import Metrics, MetricValues, sum_values
from pgrealtime.workers.messages import Counts, Envelope, decode_envelope, encode_envelope
from pgrealtime.workers.past_counts import PastCounts, of_worker


def values(number: int) -> MetricValues:
    """Return values that depend on the number, and have labels of their own."""
    made: dict[str, object] = {}
    for n, field in enumerate(msgspec.structs.fields(MetricValues)):
        if field.type is bool:
            made[field.name] = number > 1
        elif field.type is int:
            made[field.name] = number * 100 + n
        elif "tuple" in str(field.type):
            made[field.name] = {("a", "b"): number}
        else:
            made[field.name] = {"a": number, f"b{number}": 1}
    unknown = {"lag_bytes": None, "retained_bytes": None, "log": None}
    return msgspec.convert(made | unknown, MetricValues)


def counts_of(number: int, seconds: float) -> Counts:
    metrics = Metrics()
    metrics.observe_rule_query(seconds)
    return Counts(values=values(number), samples=metrics.samples(), not_ready_reasons=["x"])


def test_values_are_summed_by_label() -> None:
    one, other = values(1), values(2)
    total = sum_values([one, other])
    assert total.events_sent == one.events_sent + other.events_sent
    assert total.closed_connections == {"a": 3, "b1": 1, "b2": 1}
    assert total.rule_query_errors == {("a", "b"): 3}
    assert total.is_replication_connected is True
    assert total.lag_bytes is None


def test_counts_arrive_as_they_were() -> None:
    sent = counts_of(1, 0.2)
    arrived = decode_envelope(encode_envelope(Envelope(sent, answers=7))).message
    assert isinstance(arrived, Counts)
    assert arrived == sent


def test_the_time_of_statements_and_the_cpu_of_all_processes_are_one() -> None:
    others = [counts_of(1, 0.2).samples, counts_of(2, 0.3).samples]
    text = Metrics().exposition(values(1), others, workers=2).decode()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["pgrealtime_workers",] == 2
    assert found["pgrealtime_rule_query_seconds_count",] == 2
    assert found["pgrealtime_rule_query_seconds_sum",] == pytest.approx(0.5)
    assert found["pgrealtime_rule_query_seconds_bucket", "0.25"] == 1
    own = {name: value for name, _, value in Metrics().samples()}
    assert found["process_resident_memory_bytes",] > own["process_resident_memory_bytes"] * 2
    assert found["process_max_fds",] == own["process_max_fds"]


def test_totals_don_t_go_down_when_a_worker_ends() -> None:
    """What it had open is gone."""
    past = PastCounts()
    past.add(None)
    past.add(counts_of(1, 0.2))
    past.add(counts_of(2, 0.3))
    assert past.values.events_sent == values(1).events_sent + values(2).events_sent
    assert past.values.open_connections == 0
    assert past.values.subscription_counts == {}
    kept = {name for name, _, _ in past.samples}
    assert "process_cpu_seconds_total" in kept
    assert "process_resident_memory_bytes" not in kept


def test_what_the_main_process_counts_is_not_summed() -> None:
    """Every worker receives all changes."""
    own = of_worker(values(2))
    assert (own.changes_received, own.stream_breaks, own.changelog_bytes) == (0, {}, 0)
    assert own.events_sent == values(2).events_sent

"""What workers that have ended have counted: the totals of the service must not go down."""

from collections.abc import Sequence

import msgspec

from pgrealtime.observe.metrics import MetricValues, Sample, sum_samples, sum_values
from pgrealtime.workers.messages import Counts

_NOTHING = MetricValues(
    open_connections=0,
    subscription_counts={},
    events_sent=0,
    closed_connections={},
    gaps_notified={},
    mirror_frames={},
    mirror_resyncs={},
    resume_outcomes={},
    refused_subscribe_calls=0,
    incomplete_records={},
    rule_query_errors={},
    auth_checks={},
    login_results={},
    forwarded_calls={},
    ignored_bus_messages={},
    read_outcomes={},
    changes_received=0,
    stream_breaks={},
    changelog_bytes=0,
    is_replication_connected=False,
    lag_bytes=None,
    retained_bytes=None,
)
_GAUGES_OF_A_PROCESS = (
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_open_fds",
)


class PastCounts:
    """Totals of the workers that have ended, as of their last answer."""

    def __init__(self) -> None:
        self.values = _NOTHING
        self.samples: Sequence[Sample] = ()

    def add(self, counts: Counts | None) -> None:
        """Add what a worker had counted; what it had open is gone."""
        if counts is None:
            return
        ended = msgspec.structs.replace(
            of_worker(counts.values), open_connections=0, subscription_counts={}
        )
        self.values = sum_values([self.values, ended])
        kept = [sample for sample in counts.samples if sample[0] not in _GAUGES_OF_A_PROCESS]
        self.samples = sum_samples([self.samples, kept])


def of_worker(values: MetricValues) -> MetricValues:
    """Return what is a worker's own of its values: every worker receives all changes."""
    return msgspec.structs.replace(
        values,
        changes_received=0,
        stream_breaks={},
        changelog_bytes=0,
        is_replication_connected=False,
        lag_bytes=None,
        retained_bytes=None,
    )

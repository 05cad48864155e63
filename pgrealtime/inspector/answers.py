"""The answers of the inspector, and how those of several processes become one.

All are JSON of bounded size. Times are Unix seconds, sizes bytes. No row value, token or full
client id is in them; record ids, accounts and addresses are.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from pgrealtime import __version__
from pgrealtime.config.model import Config
from pgrealtime.errors import LookError
from pgrealtime.observe.metrics import MetricValues

MAX_ROWS = 500
"""Of any table; a search narrows it."""
_NO_REFUSALS = ("accepted", "token_missing")
"""Of authentications: who has no token is a guest."""


class ConnectionRow(Struct, frozen=True, kw_only=True):
    """One open connection."""

    ref: str
    """The beginning of its client id: enough to find it in the log, too little to use it."""
    state: str
    """As ``ConnectionState``."""
    why: str
    """Why it is not live; empty if it is."""
    caller: str
    """``guest``, ``superuser``, or collection and id of the account."""
    token_expires_at: float | None
    address: str
    opened_at: float
    last_event_at: float | None
    """None before the first one."""
    topics: Sequence[str]
    """The first few; values of their options are left out."""
    topic_count: int
    behind_bytes: int
    """Changes in the changelog that it has yet to read."""
    waiting_bytes: int
    """Written for it, and not taken by its client yet."""
    events_sent: int
    worker: int = 0
    """0 if there is one process."""


class Connections(Struct, frozen=True, kw_only=True, tag=True):
    """Open connections: those that are not live first, then the newest."""

    total: int
    matching: int
    """Those that the search finds."""
    rows: Sequence[ConnectionRow]


class TopicRow(Struct, frozen=True, kw_only=True):
    """Subscriptions that cost the same: of one collection, with a filter of one form."""

    collection: str
    """Empty if there is no such collection."""
    is_record: bool
    """Whether the topics are of single records."""
    filter: str
    """Its form: values are replaced by ``…``."""
    options: Sequence[str]
    """Names of further options."""
    is_mirror: bool
    subscriptions: int
    groups: int
    """Each is evaluated once, for all its subscriptions."""
    found_by: str
    """How a change finds them, see ``topics``."""
    asks_postgres: bool
    """Whether rule or filter need PostgreSQL for some changes."""
    isolated: int
    """Subscriptions whose filter was slow: evaluated for each connection alone."""
    why_none: str = ""
    """Why no event can match; empty if one can."""


class Topics(Struct, frozen=True, kw_only=True, tag=True):
    """What is subscribed to, the most widely used first."""

    rows: Sequence[TopicRow]
    other_rows: int
    other_subscriptions: int


class ChangeRow(Struct, frozen=True, kw_only=True):
    """A change or a gap in the changelog."""

    lsn: str
    """End of its commit."""
    ordinal: int
    """Of the change in its transaction, from 1 on; 0 for a gap."""
    at: float | None
    """Of the commit, by the server's clock."""
    kind: str
    """``create``, ``update``, ``delete``, ``truncate`` or ``gap``."""
    table: str
    collection: str
    """Empty if the table is none: rules read it, or records show its links."""
    record: str
    reason: str = ""
    """Of a gap."""


class Changes(Struct, frozen=True, kw_only=True, tag=True):
    """The newest changes in the changelog, newest first."""

    rows: Sequence[ChangeRow]
    is_complete: bool
    """Whether nothing older is held that the search would find."""
    next_before: str = ""
    """The LSN from which on to look for older ones."""


class ReceiverRow(Struct, frozen=True, kw_only=True):
    """A subscription that a change matches."""

    ref: str
    caller: str
    address: str
    topic: str
    status: str
    """``delivered``, ``waiting`` (the connection is behind) or ``later`` (it came after it)."""
    worker: int = 0


class Receivers(Struct, frozen=True, kw_only=True, tag=True):
    """Who a change matches, by the connections and rules of this moment."""

    change: ChangeRow
    subscriptions: int
    """That match."""
    rows: Sequence[ReceiverRow]
    undecided: int
    """Subscriptions whose filters took too long here, or that PostgreSQL gave no answer for."""
    isolated: int
    """Connections whose filters are evaluated for each alone; they aren't asked here."""
    notes: Sequence[str]


class CollectionRow(Struct, frozen=True, kw_only=True):
    """A collection in force."""

    name: str
    type: str
    table: str
    key: str
    list_rule: str | None
    view_rule: str | None
    manage_rule: str | None
    auth_rule: str | None
    is_streamed: bool
    subscriptions: int
    problem: str
    """Why it is locked; empty if it isn't."""


class CollectionList(Struct, frozen=True, kw_only=True, tag=True):
    """The collections in force."""

    rows: Sequence[CollectionRow]
    left_out: Sequence[str]
    """What is wrong with configured collections that can't be served at all."""


class RuleSql(Struct, frozen=True, kw_only=True):
    """A rule as SQL."""

    rule: str
    """``list_rule`` or ``view_rule``."""
    caller: str
    """For whom: a collection of accounts, or ``guest``."""
    sql: str
    """Empty if no statement is needed; then ``text`` says who passes."""
    text: str
    decided_by: str
    """``the process``, ``PostgreSQL``, or empty."""


class CollectionSql(Struct, frozen=True, kw_only=True, tag=True):
    """The rules of one collection as SQL."""

    name: str
    rules: Sequence[RuleSql]


class Explained(Struct, frozen=True, kw_only=True, tag=True):
    """The answer of ``explain``."""

    is_delivered: bool
    lines: Sequence[str]


class States(Struct, frozen=True, kw_only=True, tag=True):
    """How many connections are in which state, and when the last change came."""

    by_state: Mapping[str, int]
    last_change_at: float | None
    """Of the newest transaction held, by the server's clock; None if none is."""


class NotHere(Struct, frozen=True, tag=True):
    """The connection that was asked for is not this process's."""


View: TypeAlias = (
    Connections
    | Topics
    | Changes
    | Receivers
    | CollectionList
    | CollectionSql
    | Explained
    | States
    | NotHere
)
"""What a process answers."""


class Slot(Struct, frozen=True, kw_only=True):
    """The replication slot, as the server has it."""

    name: str
    wal_status: str
    is_temporary: bool
    retained_bytes: int
    unconfirmed_bytes: int
    max_retained_bytes: int
    """``replication.slot.max_retained_wal``; 0 is no limit."""
    server_limit_bytes: int
    """``max_slot_wal_keep_size``; negative is no limit."""


class Worker(Struct, frozen=True, kw_only=True):
    """One of the processes that serve the port."""

    number: int
    connections: int
    is_answering: bool


class Overview(Struct, frozen=True, kw_only=True):
    """How the service fares. Totals are since its start."""

    version: str
    at: float
    started_at: float
    not_ready: Sequence[str]
    """As ``/ready`` has it."""
    workers: Sequence[Worker]
    """Empty if there is one process."""
    connections: int
    max_connections: int
    states: Mapping[str, int]
    subscriptions: Mapping[str, int]
    events_sent: int
    closed: Mapping[str, int]
    gaps: Mapping[str, int]
    resyncs: Mapping[str, int]
    resumes: Mapping[str, int]
    refusals: Mapping[str, int]
    """Of tokens, logins, reads and subscribe calls, by what and why."""
    rule_errors: Mapping[str, int]
    """By collection and reason."""
    incomplete_records: Mapping[str, int]
    is_streaming: bool
    breaks: Mapping[str, int]
    changes_received: int
    last_change_at: float | None
    slot: Slot | None
    """None if this process reads none, or PostgreSQL doesn't answer."""
    changelog_bytes: int
    changelog_max_bytes: int
    changelog_max_age: float


def make_overview(
    values: MetricValues,
    states: States,
    config: Config,
    *,
    started_at: float,
    not_ready: Sequence[str],
    slot: Slot | None,
    workers: Sequence[Worker] = (),
) -> Overview:
    """Return the overview that metrics and states make."""
    reads, tokens = values.read_outcomes, values.auth_checks
    refusals = {
        **{f"token: {name}": n for name, n in tokens.items() if name not in _NO_REFUSALS},
        **{f"login: {name}": n for name, n in values.login_results.items() if name != "ok"},
        **{f"{kind}: {name}": n for (kind, name), n in reads.items() if name != "ok"},
        "subscribe: too many options": values.refused_subscribe_calls,
    }
    errors = values.rule_query_errors
    return Overview(
        version=__version__,
        at=time.time(),
        started_at=started_at,
        not_ready=not_ready,
        workers=workers,
        connections=values.open_connections,
        max_connections=config.realtime.max_connections,
        states=states.by_state,
        subscriptions=values.subscription_counts,
        events_sent=values.events_sent,
        closed=values.closed_connections,
        gaps=values.gaps_notified,
        resyncs=values.mirror_resyncs,
        resumes=values.resume_outcomes,
        refusals={name: count for name, count in refusals.items() if count},
        rule_errors={f"{name}: {reason}": count for (name, reason), count in errors.items()},
        incomplete_records=values.incomplete_records,
        is_streaming=values.is_replication_connected,
        breaks=values.stream_breaks,
        changes_received=values.changes_received,
        last_change_at=states.last_change_at,
        slot=slot,
        changelog_bytes=values.changelog_bytes,
        changelog_max_bytes=config.changelog.max_size,
        changelog_max_age=config.changelog.max_age,
    )


def urgency(row: ConnectionRow) -> tuple[bool, int, float]:
    """Return what connections are sorted by."""
    return row.state == "live", -row.waiting_bytes, -row.opened_at


def merge(answers: Sequence[Any], limit: int) -> Any:
    """Return the answer of all processes, of the answer of each.

    Raises:
        LookError: No process has what was asked for.
    """
    found = [answer for answer in answers if not isinstance(answer, NotHere)]
    if not found:
        raise LookError(
            "there is no such connection", hint="It may have ended: look at the list again."
        )
    if len(found) == 1:
        return found[0]
    match found[0]:
        case Connections():
            rows = sorted((row for one in found for row in one.rows), key=urgency)
            return Connections(
                total=sum(one.total for one in found),
                matching=sum(one.matching for one in found),
                rows=rows[:limit],
            )
        case Topics():
            return _merge_topics(found, limit)
        case Receivers() as first:
            rows = [row for one in found for row in one.rows]
            return replace(
                first,
                subscriptions=sum(one.subscriptions for one in found),
                rows=rows[:limit],
                undecided=sum(one.undecided for one in found),
                isolated=sum(one.isolated for one in found),
                notes=list(dict.fromkeys(note for one in found for note in one.notes)),
            )
        case States():
            by_state: Counter[str] = Counter()
            for one in found:
                by_state.update(one.by_state)
            newest = [one.last_change_at for one in found if one.last_change_at is not None]
            return States(by_state=by_state, last_change_at=max(newest, default=None))
        case CollectionList() as first:
            counts: Counter[str] = Counter()
            for one in found:
                counts.update({row.name: row.subscriptions for row in one.rows})
            rows = [replace(row, subscriptions=counts[row.name]) for row in first.rows]
            return replace(first, rows=rows)
        case first:
            return first


ALIKE_VIEWS = ("changes", "sql")
"""Views that are the same in every process."""


def of_worker_number(answer: View, number: int) -> View:
    """Return an answer whose rows say which worker they are of."""
    match answer:
        case Connections() | Receivers():
            return replace(answer, rows=[replace(row, worker=number) for row in answer.rows])
        case _:
            return answer


def topic_key(row: TopicRow) -> tuple[object, ...]:
    """Return what subscriptions have in common that are one row."""
    return (
        *(row.collection, row.is_record, row.filter, tuple(row.options), row.is_mirror),
        *(row.found_by, row.asks_postgres, row.why_none),
    )


def _merge_topics(found: Sequence[Topics], limit: int) -> Topics:
    rows: dict[tuple[object, ...], TopicRow] = {}
    for row in (row for one in found for row in one.rows):
        other = rows.get(topic_key(row))
        rows[topic_key(row)] = (
            row
            if other is None
            else replace(
                row,
                subscriptions=row.subscriptions + other.subscriptions,
                groups=row.groups + other.groups,
                isolated=row.isolated + other.isolated,
            )
        )
    ordered = sorted(rows.values(), key=lambda row: -row.subscriptions)
    rest = ordered[limit:]
    return Topics(
        rows=ordered[:limit],
        other_rows=len(rest) + max(one.other_rows for one in found),
        other_subscriptions=sum(row.subscriptions for row in rest)
        + sum(one.other_subscriptions for one in found),
    )

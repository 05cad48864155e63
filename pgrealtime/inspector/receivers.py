"""Finds who a change in the changelog matches, with the connections and rules of this moment.

It is the evaluation of the hub, of the row as the change wrote it, for nobody: nothing is sent, and
no filter is judged slow by it.
"""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from msgspec import Struct

from pgrealtime.changes import Transaction
from pgrealtime.errors import LookError
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.connections.connection import LIVE, Group, Subscription
from pgrealtime.hub.evaluation.filter_limits import FilterBudget
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event, TruncatedCollections, transaction_events
from pgrealtime.hub.hub import Hub
from pgrealtime.inspector.answers import ReceiverRow, Receivers
from pgrealtime.inspector.changes import change_row
from pgrealtime.inspector.shown import caller_name, ref_of, topic_text
from pgrealtime.lsn import Cursor
from pgrealtime.rule_queries.executor import QueryExecutor


class _Found(Struct):
    """Groups that a change matches, and those that nothing is known of."""

    hits: set[Group] = set()
    undecided: set[Group] = set()
    unasked: frozenset[str] = frozenset()


async def find_receivers(
    hub: Hub, executor: QueryExecutor, transaction: Transaction, ordinal: int, *, limit: int
) -> Receivers:
    """Return who a change matches, yielding to the loop.

    Raises:
        LookError: There is no such change, or it makes no event.
    """
    generation = hub.progress.generation
    row = change_row(transaction, ordinal, generation.collections)
    notes: list[str] = []
    found = _Found()
    if not row.collection:
        notes.append(
            f"{row.table} is no collection: rules read it, or records that show its links got an"
            " update, which isn't evaluated here"
        )
    else:
        events = event_of(hub, transaction, ordinal)
        missing = sorted({name for event in events for name in event.missing_columns})
        if missing:
            notes.append(
                f"the change doesn't carry {', '.join(missing)}: rules that read them admit nobody"
                " here; for events they are read from the table"
            )
        found = await _evaluate(generation.matcher, executor, events)
        if found.unasked:
            notes.append("PostgreSQL doesn't answer: rules that need it are not decided")
    rows: list[ReceiverRow] = []
    cursor, timer = Cursor(transaction.end_lsn, ordinal), YieldTimer()
    count = undecided = 0
    for subscription in _subscriptions_of(found.hits):
        count += 1
        if len(rows) < limit:
            rows.append(_receiver(hub, subscription, transaction, cursor))
        if timer.is_due():
            await timer.pause()
    for _ in _subscriptions_of(found.undecided - found.hits):
        undecided += 1
        if timer.is_due():
            await timer.pause()
    return Receivers(
        change=row,
        subscriptions=count,
        rows=rows,
        undecided=undecided,
        isolated=sum(connection.is_isolated for connection in hub.connections),
        notes=notes,
    )


def event_of(hub: Hub, transaction: Transaction, ordinal: int) -> list[Event]:
    """Return the events that one change makes: two if it moves the key.

    Raises:
        LookError: It makes none.
    """
    generation = hub.progress.generation
    if not generation.shape_checker.fits(transaction):
        raise LookError("the table had other columns then", detail="The change became a gap.")
    events: list[Event] = []
    for event in transaction_events(transaction, generation.collections, ordinal - 1):
        if event.cursor.ordinal > ordinal:
            break
        if isinstance(event, TruncatedCollections):
            raise LookError(
                "a truncate names no record", detail="Everybody with a topic of it got a gap."
            )
        events.append(event)
    if not events:
        raise LookError("the change makes no event", detail="Its table is no collection.")
    return events


async def _evaluate(matcher: Matcher, executor: QueryExecutor, events: list[Event]) -> _Found:
    """Evaluate as the hub does; what filters take is within a budget of its own."""
    found, now = _Found(), datetime.now(UTC)
    for of_mirrors in (False, True):
        budget = FilterBudget.for_slice(len(events))
        rules = matcher.start_evaluation(
            events, now, of_mirrors=of_mirrors, work_budget=budget.work_budget
        )
        await budget.run_in_process(rules)
        found.unasked |= await executor.answer_questions(rules)
        deferred = rules.deferred_members
        filters = matcher.start_evaluation(
            events,
            now,
            has_remote_filter=True,
            of_mirrors=of_mirrors,
            work_budget=budget.work_budget,
            deferred_groups=deferred,
        )
        await budget.run_in_process(filters)
        found.unasked |= await executor.answer_questions(filters, budget)
        for evaluation in (rules, filters):
            for index in range(len(events)):
                found.hits.update(evaluation.hits(index))
        found.undecided.update(filters.undecided_members, budget.work_budget.late_members)
        if found.unasked:
            found.undecided.update(rules.undecided_members)
    return found


def _subscriptions_of(groups: Iterable[Group]) -> Iterable[Subscription]:
    for group in groups:
        for render_group in list(group.render_groups):
            yield from list(render_group)


def _receiver(
    hub: Hub, subscription: Subscription, transaction: Transaction, cursor: Cursor
) -> ReceiverRow:
    connection = subscription.connection
    position = hub.head if connection.state is LIVE else connection.cursor
    opened_at = time.time() - (time.monotonic() - connection.opened_at)
    read_point = subscription.read_point
    is_later = opened_at > transaction.commit_time_us / 1e6 or (
        read_point is not None and not read_point.predates(transaction.xid, cursor.lsn)
    )
    reached = "delivered" if position >= cursor else "waiting"
    return ReceiverRow(
        ref=ref_of(connection.id),
        caller=caller_name(connection.caller),
        address=connection.address,
        topic=topic_text(subscription.topic),
        status="later" if is_later and reached == "delivered" else reached,
    )

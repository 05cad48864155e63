"""Events whose rows lack columns, completed with live rows for groups that may see the live rows.

A column that the WAL left out, and whose value at the event can't be proved (``evaluation.toast``),
is shown only to groups whose rules admit the live row: they may know what it holds. To all others
the record is shown without the column. The enricher uses these within a read session.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from datetime import UTC, datetime
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.evaluation.filter_limits import FilterBudget
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.rule_queries.session import ReadSession, fetch_rows_by_id

CheckCallers: TypeAlias = Callable[
    [ReadSession, Sized[ExpandViewer], Sized[Group]], Awaitable[frozenset[Group]]
]
"""Finds the viewers and groups whose callers have changed since, and who must not be shown what was
read live; returns those of the groups (``hub.state.caller_check``)."""


class LiveRowEvent(Struct):
    """An event whose row has the columns of a live row where it lacks its own."""

    event: Event
    groups: frozenset[Group]
    """The groups that may see the live row."""
    live_junction_ids: Mapping[str, Sequence[str]] | None = None
    """By field, the ids to which the live row leads through junction tables; None if it is known
    to which the event's own row led."""


class LiveRowEvents:
    """The live row events of one slice; callers are checked at the end of each read session."""

    def __init__(
        self,
        matcher: Matcher,
        events: Sequence[Event],
        hits: Sequence[Iterable[Group]],
        check_callers: CheckCallers,
    ) -> None:
        self._matcher = matcher
        self._events = events
        self._hits = hits
        self._check_callers = check_callers
        self._unchecked: dict[int, LiveRowEvent] = {}
        self.checked: dict[int, LiveRowEvent] = {}
        """By index of the event. Nothing is in it before its callers were checked: if the check
        fails, no live row is shown."""

    async def load(self, session: ReadSession, event_indexes: Sized[int]) -> None:
        """Read live rows and find the groups that may see them."""
        self._unchecked = {}  # the session may be a second attempt
        rows = await _fetch_rows(session, [self._events[index] for index in event_indexes])
        loaded = [
            (index, event, row)
            for index, event in ((index, self._events[index]) for index in event_indexes)
            if (row := rows.get((event.collection.name, event.record_id))) is not None
            and event.action != "delete"
        ]
        budget = FilterBudget.for_slice(len(loaded))
        evaluation = self._matcher.start_evaluation_of_pairs(
            [(replace(event, row=row), self._hits[index]) for index, event, row in loaded],
            datetime.now(UTC),
            budget.work_budget,
        )
        await budget.run_in_process(evaluation)
        await session.answer_questions(evaluation)
        self._unchecked = {
            index: LiveRowEvent(
                replace(event, row=_without_email(event, row) | event.row), frozenset(groups)
            )
            for row_key, (index, event, row) in enumerate(loaded)
            if (groups := evaluation.hits(row_key))
        }

    async def check_callers(self, session: ReadSession, viewers: Sized[ExpandViewer]) -> None:
        """Check the callers of the viewers, and of the groups that would see live rows."""
        groups = frozenset[Group]().union(
            *(live_row.groups for live_row in self._unchecked.values())
        )
        withheld = await self._check_callers(session, viewers, groups)
        for live_row in self._unchecked.values():
            live_row.groups -= withheld
        self.checked.update(self._unchecked)
        self._unchecked.clear()


async def _fetch_rows(session: ReadSession, events: Iterable[Event]) -> dict[tuple[str, str], Row]:
    """Return the whole live rows of the events' records, by collection name and record id."""
    ids_by_collection: dict[str, tuple[Collection, dict[str, None]]] = {}
    for event in events:
        collection = event.collection
        ids_by_collection.setdefault(collection.name, (collection, {}))[1][event.record_id] = None
    rows: dict[tuple[str, str], Row] = {}
    for name, (collection, ids) in ids_by_collection.items():
        fetched = await fetch_rows_by_id(session, collection, ids) or {}
        for record_id in ids:
            row = fetched.get(unpadded_id(collection, record_id))
            if row is not None:
                rows[name, record_id] = row
    return rows


def _without_email(event: Event, row: Row) -> Row:
    """Return the live row without the e-mail address, which the event's own columns decide."""
    email = event.collection.fields_by_name.get("email")
    column = email.column if email is not None and event.collection.type == "auth" else None
    if column is None:
        return row
    return {name: text for name, text in row.items() if name != column.name}

"""Fetches related records: those that subscriptions expand, and the ids in junction tables.

Level by level for a whole batch: whatever viewers and records want of one relation is one query, of
one collection's rows another, and rules are asked once for all who ask the same. Nothing here keeps
an event back: what can't be fetched is left out, and said to be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from dataclasses import dataclass, field
from typing import TypeAlias

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from pgrealtime.changelog.row_history import RowHistory, TableHistory
from pgrealtime.changes import Change, Row, Truncate
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.expand.batch import _LoadBatch
from pgrealtime.expand.link_history import TransactionLinkChanges
from pgrealtime.expand.node import ChangedRecord, LaterLinkChanges, RecordNode
from pgrealtime.expand.plan import (
    ExpandViewer,
    RelationKey,
    junction_hops,
)
from pgrealtime.expand.relation_sql import relation_query
from pgrealtime.expand.render import ExpandTooLargeError, RenderRecord, render_expand
from pgrealtime.fairness import YieldTimer
from pgrealtime.lsn import LSN
from pgrealtime.postgres.outage import CONNECTION_RETRY_DELAYS
from pgrealtime.rule_queries.session import (
    ReadSession,
    ReadSessionFactory,
)
from pgrealtime.rules.engine.before_state import BeforeState

log = structlog.get_logger(__name__)

_MAX_CHANGES_UNDONE = 1000
"""Changes of a transaction that are taken back for each record that it deleted."""
_MAX_BATCH_BYTES = 64 * 2**20
"""Of what a batch shows in all; beyond, only what is small is shown."""
_MAX_RECORD_BYTES = 4 * 2**20
"""Bytes of what one record shows at most."""
_GUARANTEED_RECORD_BYTES = 64 * 2**10
"""Bytes that are always shown: whoever asks for more than there is to give mustn't take it from
those who ask for little."""
_MAX_BATCH_SECONDS = 5.0
"""For one batch in all. Events wait meanwhile, those of other clients too."""


ExpandRequest: TypeAlias = tuple[int, ExpandViewer]
"""An event's place, and for whom."""

LoadLiveRows: TypeAlias = Callable[[ReadSession, Sized[int]], Awaitable[None]]
"""Takes places of events whose live rows are of interest."""

CheckViewers: TypeAlias = Callable[[ReadSession, Sized[ExpandViewer]], Awaitable[None]]
"""Takes the viewers that related records were read for, at the end of a reading."""


@dataclass(slots=True)
class RelatedRecords:
    """What is shown of events beside their rows.

    Attributes:
        junction_ids: By place: ids by field name, of relations through junction tables.
        expand_json: The JSON of the member ``expand``; None for a record without one.
    """

    junction_ids: dict[int, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    expand_json: dict[ExpandRequest, bytes | None] = field(default_factory=dict)
    live_junction_ids: dict[int, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """As ``ids``, by places of which it isn't known what they were at the event."""
    failed: set[tuple[int, ExpandViewer | None]] = field(default_factory=set)
    """Of which events something couldn't be had, be it for one viewer alone."""
    load_seconds: float = 0.0
    """What finding and writing the expanded records took, without the wait for a connection."""


class RelatedRecordLoader:
    """Fetches what is wanted of batches.

    Args:
        sessions: Where to ask.
        collections: All there are.
        render_record: Makes records.
        row_history: Knows what was done to junction tables later; without it they are as they are.
    """

    def __init__(
        self,
        sessions: ReadSessionFactory,
        collections: Collections,
        render_record: RenderRecord,
        row_history: RowHistory | None = None,
    ) -> None:
        self._sessions = sessions
        self._row_history = row_history
        self._link_changes = TransactionLinkChanges()
        self._tables = reachable_tables(collections)
        self._junction_hops = {
            one.name: junction_hops(collections, one) for one in collections.values()
        }
        self._render_record = render_record

    async def load_for_events(
        self,
        events: Sequence[ChangedRecord],
        event_indexes: Iterable[int],
        requests: Iterable[ExpandRequest],
        partial_row_indexes: Iterable[int] = (),
        *,
        load_live_rows: LoadLiveRows | None = None,
        check_viewers: CheckViewers | None = None,
    ) -> RelatedRecords:
        """Return what is wanted, as far as it can be had in time.

        Args:
            events: The batch.
            event_indexes: Of those that anybody hears of; ids in junction tables are found for
                them.
            requests: What is expanded, and for whom.
            partial_row_indexes: Places of those whose rows lack columns.
            load_live_rows: Told, in the same snapshot, of which events it isn't known what they
                held.
            check_viewers: Told, in the same snapshot, for whom something was read.
        """
        lacking = [p for p in event_indexes if self._junction_hops[events[p].collection.name]]
        asked, partial_row_indexes = list(dict.fromkeys(requests)), list(partial_row_indexes)
        if not (lacking or asked or partial_row_indexes):
            return RelatedRecords()
        for patience in CONNECTION_RETRY_DELAYS:
            found = RelatedRecords()
            try:
                async with asyncio.timeout(_MAX_BATCH_SECONDS):
                    await self._load(
                        events,
                        lacking,
                        asked,
                        found,
                        partial_row_indexes=partial_row_indexes,
                        load_live_rows=load_live_rows,
                        check_viewers=check_viewers,
                    )
            except (psycopg.Error, PoolTimeout, TimeoutError) as error:
                log.warning("expand.failed", error=type(error).__name__)
                # A connection that broke says nothing of the next one.
                if patience is None or isinstance(error, PoolTimeout | TimeoutError):
                    break
                await asyncio.sleep(patience)
            else:
                return found
        return RelatedRecords(
            failed={*asked, *((place, None) for place in (*lacking, *partial_row_indexes))}
        )

    async def load_expands_within(
        self,
        max_seconds: float,
        events: Sequence[ChangedRecord],
        requests: Iterable[ExpandRequest],
        partial_row_indexes: Sequence[int],
        *,
        check_viewers: CheckViewers | None = None,
    ) -> RelatedRecords | None:
        """Return what is expanded for some viewers if that takes no longer than so many seconds.

        None is that it does, or that it failed: those viewers are served apart, where nobody waits
        for them.

        Args:
            max_seconds: For all of it.
            events: The batch.
            requests: What is expanded, and for whom.
            partial_row_indexes: Places of events whose rows lack columns.
            check_viewers: As for ``related``.
        """
        asked, found = list(dict.fromkeys(requests)), RelatedRecords()
        try:
            async with asyncio.timeout(_MAX_BATCH_SECONDS):
                await self._load(
                    events,
                    [],
                    asked,
                    found,
                    partial_row_indexes=partial_row_indexes,
                    check_viewers=check_viewers,
                    max_seconds=max_seconds,
                )
        except (psycopg.Error, PoolTimeout, TimeoutError):
            return None
        return found

    async def load_for_row(
        self, collection: Collection, row: Row, viewer: ExpandViewer | None
    ) -> tuple[Mapping[str, Sequence[str]], bytes | None]:
        """As ``related``, of a row as the table has it, for one viewer or none.

        Returns:
            Ids by field name, and the JSON of the member ``expand``.
        """
        root = RecordNode(collection, unpadded_id(collection, row[collection.key.name] or ""), row)
        if viewer is None and not self._junction_hops[collection.name]:
            return root.junction_ids, None
        try:
            async with (
                asyncio.timeout(_MAX_BATCH_SECONDS),
                self._sessions.read_session(frozenset()) as reading,
            ):
                fetching = _LoadBatch(reading, self._junction_hops)
                await fetching.load_junction_ids([root])
                await fetching.load_expands([] if viewer is None else [(root, viewer)])
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            log.warning("expand.failed", error=type(error).__name__)
        try:
            return root.junction_ids, None if viewer is None else self._try_render_expand(
                root, viewer, _MAX_RECORD_BYTES
            )
        except ExpandTooLargeError:
            log.debug("expand.too_large", collection=collection.name, limit=_MAX_RECORD_BYTES)
            return root.junction_ids, None

    async def _load(
        self,
        events: Sequence[ChangedRecord],
        junction_indexes: Sequence[int],
        requests: Sequence[ExpandRequest],
        found: RelatedRecords,
        *,
        partial_row_indexes: Sequence[int] = (),
        load_live_rows: LoadLiveRows | None = None,
        check_viewers: CheckViewers | None = None,
        max_seconds: float | None = None,
    ) -> None:
        concerned = dict.fromkeys(
            [*junction_indexes, *(place for place, _ in requests), *partial_row_indexes]
        )
        pasts = {place: self._before_state(events[place]) for place in concerned}
        xids = frozenset(events[place].xid for place in concerned)
        began_all = time.perf_counter()
        async with self._sessions.read_session(xids, max_seconds) as reading:
            fetching = _LoadBatch(reading, self._junction_hops)
            linked = [p for p in concerned if self._junction_hops[events[p].collection.name]]
            undone = await self._later_link_changes(reading, events, linked)
            nodes = {
                place: _event_node(events[place], pasts[place], undone.get(place, {}))
                for place in concerned
            }
            own = {place: nodes[place] for place in junction_indexes}
            await fetching.load_junction_ids(own.values())
            found.junction_ids.update((place, node.junction_ids) for place, node in own.items())
            unknown = {place: fetching.live_junction_ids(node) for place, node in own.items()}
            found.live_junction_ids.update((place, ids) for place, ids in unknown.items() if ids)
            if load_live_rows is not None and (found.live_junction_ids or partial_row_indexes):
                await load_live_rows(reading, {*found.live_junction_ids, *partial_row_indexes})
            if reading.has_failed:
                found.failed.update(
                    (place, None) for place in (*junction_indexes, *partial_row_indexes)
                )
            roots = [
                (_event_node(events[place], pasts[place], undone.get(place, {})), viewer)
                for place, viewer in requests
            ]
            began = time.perf_counter()
            await fetching.load_expands(roots)
            found.load_seconds = time.perf_counter() - began
            if reading.has_failed:
                found.failed.update(requests)
            found.failed.update(
                (place, viewer)
                for (place, viewer), (root, _) in zip(requests, roots, strict=True)
                if (root.state_key, viewer) in fetching.unknown_states
            )
            began_check = time.perf_counter()
            if check_viewers is not None:
                await check_viewers(reading, {viewer for _, viewer in requests})
            began_all += time.perf_counter() - began_check
        lacking_columns = frozenset(partial_row_indexes)
        found.failed.update(
            (place, viewer)
            for place, viewer in requests
            if place in lacking_columns and _lacks_relation_column(viewer, events[place].row)
        )
        left, turn = _MAX_BATCH_BYTES, YieldTimer()
        for one, (root, viewer) in zip(requests, roots, strict=True):
            began = time.perf_counter()
            if max_seconds is not None and began - began_all > max_seconds:
                raise TimeoutError
            most = min(_MAX_RECORD_BYTES, max(left, _GUARANTEED_RECORD_BYTES))
            try:
                shown = found.expand_json[one] = self._try_render_expand(root, viewer, most)
                size = len(shown or b"")
            except ExpandTooLargeError:
                log.debug("expand.too_large", collection=root.collection.name, limit=most)
                size = most
            if size > _GUARANTEED_RECORD_BYTES:
                left -= size
            found.load_seconds += time.perf_counter() - began
            if turn.is_due():
                await turn.pause()

    async def _later_link_changes(
        self, session: ReadSession, events: Sequence[ChangedRecord], junction_indexes: Sequence[int]
    ) -> dict[int, LaterLinkChanges]:
        """Return what was done to the links of records later, as far as the reading sees it.

        A record leads where it led when its transaction was over or, if that changed the record
        once more, right before. What follows is another version's, that others may see.
        """
        if self._row_history is None or not junction_indexes:
            return {}
        is_complete = await self._row_history.wait_for_lsn(session.insert_lsn)
        first = LSN(min(events[place].cursor.lsn for place in junction_indexes))
        undone: dict[int, LaterLinkChanges] = {}
        turn = YieldTimer()
        for place in junction_indexes:
            if turn.is_due():
                await turn.pause()
            event = events[place]
            by_link: dict[RelationKey, Sequence[Change] | None] = {}
            for step in self._junction_hops[event.collection.name]:
                linking = relation_query(step)
                table, column = linking.table.name, linking.match_column.name
                own: Sequence[Change] | None = ()
                if event.action != "delete":  # the past of which goes back behind it
                    own = self._link_changes.after_next_version(event, table, column)
                history = (
                    await self._row_history.table_history(table, column, first)
                    if is_complete
                    else None
                )
                later = None if history is None else _visible_link_changes(history, event, session)
                if later is None or own is None:
                    by_link[step.relation_key] = None
                elif own or later:
                    by_link[step.relation_key] = [*own, *later]
            if by_link:
                undone[place] = by_link
        return undone

    def _before_state(self, event: ChangedRecord) -> BeforeState | None:
        """Return the state that a deleted record is shown in: that in which it was deleted.

        What its transaction did before has been done, what followed has not: records that go with
        their parent don't find it any more, while the parent still had them.
        """
        if event.action != "delete":
            return None
        first = event.cursor.ordinal - 1
        return BeforeState(
            event.transaction_changes[first : first + _MAX_CHANGES_UNDONE], self._tables
        )

    def _try_render_expand(
        self, root: RecordNode, viewer: ExpandViewer, max_bytes: int
    ) -> bytes | None:
        try:
            return render_expand(root, viewer, self._render_record, max_bytes=max_bytes)
        except (ValueError, LookupError) as error:
            # A value that isn't of the type that the catalogue gave its column.
            log.error(  # noqa: TRY400 (the message may not show the row)
                "expand.failed", collection=root.collection.name, error=type(error).__name__
            )
            return None


def _event_node(
    event: ChangedRecord, before_state: BeforeState | None, later_link_changes: LaterLinkChanges
) -> RecordNode:
    record_id = unpadded_id(event.collection, event.record_id)
    return RecordNode(
        event.collection,
        record_id,
        event.row,
        before_state=before_state,
        later_link_changes=later_link_changes,
    )


def _lacks_relation_column(viewer: ExpandViewer, row: Row) -> bool:
    """Whether the viewer expands a relation whose column isn't known."""
    steps = (branch.hop for branch in viewer.plan.branches.values())
    columns = (step.field.column for step in steps if step.is_in_row)
    return any(column is not None and column.name not in row for column in columns)


def _visible_link_changes(
    table_history: TableHistory, event: ChangedRecord, session: ReadSession
) -> list[Change] | None:
    """Return later transactions' changes of the links; None if some aren't known."""
    found: list[Change] = []
    ids = {event.record_id, unpadded_id(event.collection, event.record_id)}
    writes = [write for one in ids for write in table_history.writes(one, event.cursor.lsn)]
    for write in writes:
        if write.xid is not None and not session.snapshot.sees(write.xid):
            continue
        if write.change is None or isinstance(write.change, Truncate):
            return None
        found.append(write.change)
    return found

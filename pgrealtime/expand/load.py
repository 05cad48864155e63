"""Loads related records, and ids in junction tables, for the records of events.

``hub.delivery.enrichment`` calls it for the events of a slice, ``reads`` for one row. It makes
nodes of the events' records, ``batch`` loads what they lead to, and ``render`` writes it. Nothing
here holds an event back: what can't be loaded is left out and reported as failed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from dataclasses import dataclass, field
from typing import TypeAlias

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.expand.batch import LoadBatch
from pgrealtime.expand.link_history import LinkHistory
from pgrealtime.expand.node import ChangedRecord, LaterLinkChanges, RecordNode
from pgrealtime.expand.plan import ExpandViewer, JunctionHops, junction_hops
from pgrealtime.expand.render import ExpandTooLargeError, RenderRecord, render_expand
from pgrealtime.fairness import YieldTimer
from pgrealtime.lsn import Xid
from pgrealtime.postgres.session import CONNECTION_RETRY_DELAYS
from pgrealtime.rule_queries.session import ReadSession, ReadSessionFactory
from pgrealtime.rules.engine.before_state import BeforeState

log = structlog.get_logger(__name__)

_MAX_CHANGES_UNDONE = 1000
"""Changes of a transaction that are undone for each record that it deleted."""
_MAX_BATCH_BYTES = 64 * 2**20
"""JSON of all ``expand`` members of a batch; beyond, only small ones are shown."""
_MAX_RECORD_BYTES = 4 * 2**20
"""JSON of the ``expand`` member of one record. Few rows make many bytes: a path that leads back and
forth shows a hundred posts of one author a million times in six hops."""
_GUARANTEED_RECORD_BYTES = 64 * 2**10
"""JSON that each record may have even if the batch's bytes are used up, so that a client that
expands much doesn't take it from those that expand little."""
_MAX_BATCH_SECONDS = 5.0
"""Limit for one whole batch. The events of all live connections wait for it."""

ExpandRequest: TypeAlias = tuple[int, ExpandViewer]
"""The index of an event, and for which viewer its record is expanded."""
LoadLiveRows: TypeAlias = Callable[[ReadSession, Sized[int]], Awaitable[None]]
"""Takes the indexes of events of which the state at the event isn't fully known, to read their live
rows in the same snapshot."""
CheckViewers: TypeAlias = Callable[[ReadSession, Sized[ExpandViewer]], Awaitable[None]]
"""Takes the viewers for which related records were read, before the snapshot ends."""
JunctionIds: TypeAlias = Mapping[str, Sequence[str]]
"""Ids by field name, of relations through junction tables."""


@dataclass(slots=True)
class RelatedRecords:
    """Related records and junction ids of events, by event index."""

    junction_ids: dict[int, JunctionIds] = field(default_factory=dict)
    live_junction_ids: dict[int, JunctionIds] = field(default_factory=dict)
    """The present ids, for events of which those at the event aren't all known."""
    expand_json: dict[ExpandRequest, bytes | None] = field(default_factory=dict)
    """The JSON of the member ``expand``; None for a record without one."""
    failed: set[tuple[int, ExpandViewer | None]] = field(default_factory=set)
    """Events of which something could not be loaded, and the viewer concerned; None is all."""
    load_seconds: float = 0.0
    """What finding and writing expanded records took, without the wait for a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _EventBatch:
    events: Sequence[ChangedRecord]
    requests: Sequence[ExpandRequest]
    junction_indexes: Sequence[int] = ()
    partial_row_indexes: Sequence[int] = ()
    load_live_rows: LoadLiveRows | None = None
    check_viewers: CheckViewers | None = None
    max_seconds: float | None = None

    @property
    def records(self) -> dict[int, ChangedRecord]:
        """The records to load related data for, by event index."""
        expanded = (index for index, _ in self.requests)
        indexes = [*self.junction_indexes, *expanded, *self.partial_row_indexes]
        return {index: self.events[index] for index in indexes}

    def all_failed(self) -> set[tuple[int, ExpandViewer | None]]:
        """Return what counts as failed if nothing can be loaded."""
        indexes = (*self.junction_indexes, *self.partial_row_indexes)
        return {*self.requests, *((index, None) for index in indexes)}


_Roots: TypeAlias = list[tuple[RecordNode, ExpandViewer]]
"""The node that each request starts from, and its viewer."""


class RelatedRecordLoader:
    """Loads related records and ids in junction tables.

    Without ``row_history`` links are shown as they are now.
    """

    def __init__(
        self,
        sessions: ReadSessionFactory,
        collections: Collections,
        render_record: RenderRecord,
        row_history: RowHistory | None = None,
    ) -> None:
        self._sessions = sessions
        self._tables = reachable_tables(collections)
        hops: JunctionHops = {c.name: junction_hops(collections, c) for c in collections.values()}
        self._junction_hops = hops
        self._link_history = None if row_history is None else LinkHistory(row_history, hops)
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
        """Return the related data of a slice's events, as far as it can be loaded in time.

        ``event_indexes`` have recipients: ids in junction tables are loaded for them. The rows of
        ``partial_row_indexes`` lack columns.
        """
        linked = [index for index in event_indexes if self._has_junctions(events[index])]
        batch = _EventBatch(
            events=events,
            requests=list(dict.fromkeys(requests)),
            junction_indexes=linked,
            partial_row_indexes=list(partial_row_indexes),
            load_live_rows=load_live_rows,
            check_viewers=check_viewers,
        )
        if not batch.records:
            return RelatedRecords()
        for retry_delay in CONNECTION_RETRY_DELAYS:
            try:
                return await self._load(batch)
            except (psycopg.Error, PoolTimeout, TimeoutError) as error:
                log.warning("expand.failed", error=type(error).__name__)
                # Only a broken connection is worth a retry: the next one may be sound.
                if retry_delay is None or isinstance(error, PoolTimeout | TimeoutError):
                    break
                await asyncio.sleep(retry_delay)
        return RelatedRecords(failed=batch.all_failed())

    async def load_expands_within(
        self,
        max_seconds: float,
        events: Sequence[ChangedRecord],
        requests: Iterable[ExpandRequest],
        partial_row_indexes: Sequence[int],
        *,
        check_viewers: CheckViewers | None = None,
    ) -> RelatedRecords | None:
        """Return what is expanded for some viewers, or None if that takes too long or fails.

        The connections of those viewers then catch up by themselves, and no other waits for them.
        """
        batch = _EventBatch(
            events=events,
            requests=list(dict.fromkeys(requests)),
            partial_row_indexes=partial_row_indexes,
            check_viewers=check_viewers,
            max_seconds=max_seconds,
        )
        try:
            return await self._load(batch)
        except (psycopg.Error, PoolTimeout, TimeoutError):
            return None

    async def load_for_row(
        self, collection: Collection, row: Row, viewer: ExpandViewer | None
    ) -> tuple[JunctionIds, bytes | None]:
        """Return ids in junction tables and the JSON of ``expand``, for a row as the table has it.

        The row is whole. Without a viewer nothing is expanded.
        """
        root = RecordNode(collection, unpadded_id(collection, row[collection.key.name] or ""), row)
        if viewer is None and not self._junction_hops[collection.name]:
            return root.junction_ids, None
        try:
            async with (
                asyncio.timeout(_MAX_BATCH_SECONDS),
                self._sessions.read_session(frozenset()) as session,
            ):
                loading = LoadBatch(session, self._junction_hops)
                await loading.load_junction_ids([root])
                await loading.load_expands([] if viewer is None else [(root, viewer)])
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            log.warning("expand.failed", error=type(error).__name__)
        if viewer is None:
            return root.junction_ids, None
        expand, _ = self._try_render_expand(root, viewer, _MAX_RECORD_BYTES)
        return root.junction_ids, expand

    def _has_junctions(self, record: ChangedRecord) -> bool:
        return bool(self._junction_hops[record.collection.name])

    async def _load(self, batch: _EventBatch) -> RelatedRecords:
        related = RelatedRecords()
        records = batch.records
        xids: frozenset[Xid] = frozenset(record.xid for record in records.values())
        began = time.perf_counter()
        async with asyncio.timeout(_MAX_BATCH_SECONDS):
            async with self._sessions.read_session(xids, batch.max_seconds) as session:
                roots = await self._load_in(session, batch, records, related)
                began_check = time.perf_counter()
                if batch.check_viewers is not None:
                    await batch.check_viewers(session, {viewer for _, viewer in batch.requests})
                # Not what the viewers asked for, so it doesn't count as theirs.
                began += time.perf_counter() - began_check
            partial_rows = frozenset(batch.partial_row_indexes)
            related.failed.update(
                (index, viewer)
                for index, viewer in batch.requests
                if index in partial_rows and _lacks_relation_column(viewer, batch.events[index].row)
            )
            deadline = None if batch.max_seconds is None else began + batch.max_seconds
            await self._render_all(batch.requests, roots, related, deadline)
        return related

    async def _load_in(
        self,
        session: ReadSession,
        batch: _EventBatch,
        records: Mapping[int, ChangedRecord],
        related: RelatedRecords,
    ) -> _Roots:
        """Load everything requested in one snapshot; return the nodes that are expanded."""
        loading = LoadBatch(session, self._junction_hops)
        states = {index: self._before_state(record) for index, record in records.items()}
        later: dict[int, LaterLinkChanges] = {}
        if self._link_history is not None:
            linked = {n: changed for n, changed in records.items() if self._has_junctions(changed)}
            later = await self._link_history.later_changes(session, linked)

        def make_node(index: int) -> RecordNode:
            record = records[index]
            record_id = unpadded_id(record.collection, record.record_id)
            changes = later.get(index, {})
            return RecordNode(record.collection, record_id, record.row, states[index], changes)

        nodes = {index: make_node(index) for index in batch.junction_indexes}
        await loading.load_junction_ids(nodes.values())
        for index, node in nodes.items():
            related.junction_ids[index] = node.junction_ids
            if live_ids := loading.live_junction_ids(node):
                related.live_junction_ids[index] = live_ids
        unknown = {*related.live_junction_ids, *batch.partial_row_indexes}
        if batch.load_live_rows is not None and unknown:
            await batch.load_live_rows(session, unknown)
        if session.has_failed:
            related.failed |= batch.all_failed().difference(batch.requests)
        roots = [(make_node(index), viewer) for index, viewer in batch.requests]
        began = time.perf_counter()
        await loading.load_expands(roots)
        related.load_seconds = time.perf_counter() - began
        if session.has_failed:
            related.failed.update(batch.requests)
        related.failed.update(
            request
            for request, (root, viewer) in zip(batch.requests, roots, strict=True)
            if (root.state_key, viewer) in loading.unknown_states
        )
        return roots

    async def _render_all(
        self,
        requests: Sequence[ExpandRequest],
        roots: _Roots,
        related: RelatedRecords,
        deadline: float | None,
    ) -> None:
        """Write the JSON of ``expand`` for each request, or raise ``TimeoutError``."""
        bytes_left, yield_timer = _MAX_BATCH_BYTES, YieldTimer()
        for request, (root, viewer) in zip(requests, roots, strict=True):
            began = time.perf_counter()
            if deadline is not None and began > deadline:
                raise TimeoutError
            max_bytes = min(_MAX_RECORD_BYTES, max(bytes_left, _GUARANTEED_RECORD_BYTES))
            expand, size = self._try_render_expand(root, viewer, max_bytes)
            related.expand_json[request] = expand
            if size > _GUARANTEED_RECORD_BYTES:
                bytes_left -= size
            related.load_seconds += time.perf_counter() - began
            if yield_timer.is_due():
                await yield_timer.pause()

    def _before_state(self, record: ChangedRecord) -> BeforeState | None:
        """Return the state that a deleted record is shown in: that in which it was deleted."""
        # Its transaction's changes before the delete are kept, those from it on are undone: a
        # record that is deleted with its parent doesn't show the parent any more, while the parent
        # still shows it.
        if record.action != "delete":
            return None
        first = record.cursor.ordinal - 1
        undone = record.transaction_changes[first : first + _MAX_CHANGES_UNDONE]
        return BeforeState(undone, self._tables)

    def _try_render_expand(
        self, root: RecordNode, viewer: ExpandViewer, max_bytes: int
    ) -> tuple[bytes | None, int]:
        """Return the JSON of ``expand``, if it can be shown, and the bytes that count for it."""
        try:
            expand = render_expand(root, viewer, self._render_record, max_bytes=max_bytes)
        except ExpandTooLargeError:
            log.debug("expand.too_large", collection=root.collection.name, limit=max_bytes)
            return None, max_bytes
        except (ValueError, LookupError) as error:
            # A value that isn't of the type that the catalogue gave its column.
            kind = type(error).__name__
            log.error("expand.failed", collection=root.collection.name, error=kind)  # noqa: TRY400 (the message may not show the row)
            return None, 0
        return expand, len(expand or b"")


def _lacks_relation_column(viewer: ExpandViewer, row: Row) -> bool:
    hops = (branch.hop for branch in viewer.plan.branches.values())
    columns = (hop.field.column for hop in hops if hop.is_in_row)
    return any(column is not None and column.name not in row for column in columns)

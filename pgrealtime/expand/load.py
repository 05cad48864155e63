"""Fetches related records: those that subscriptions expand, and the ids in junction tables.

Level by level for a whole batch: whatever viewers and records want of one relation is one query, of
one collection's rows another, and rules are asked once for all who ask the same. Nothing here keeps
an event back: what can't be fetched is left out, and said to be.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, TypeAlias

import psycopg
import structlog
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.auth.record import unpadded_id
from pgrealtime.catalog.keys import canonical_id
from pgrealtime.changes import Change, Row, Truncate
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.expand.plan import (
    ExpandBranch,
    ExpandTooLargeError,
    ExpandViewer,
    LaterLinkChanges,
    RecordNode,
    RelationHop,
    RelationKey,
    RenderRecord,
    ids_in_row,
    junction_hops,
    render_expand,
)
from pgrealtime.expand.relation_sql import (
    creation_sort_key,
    id_sort_key,
    ids_before_changes,
    ids_before_overlay,
    is_whole_row,
    relation_query,
    rows_before_overlay,
    rows_by_id_statement,
)
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.live_reads.row_history import RowHistory, TableHistory, TransactionLinkChanges
from pgrealtime.lsn import LSN, Xid
from pgrealtime.protocol.expand_option import MAX_EXPAND_DEPTH
from pgrealtime.rule_queries.executor import PendingEvaluation
from pgrealtime.rule_queries.outage import CONNECTION_RETRY_DELAYS
from pgrealtime.rules.engine.before_state import BeforeState, reachable_tables
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate, macro_values_at
from pgrealtime.snapshot import Snapshot

log = structlog.get_logger(__name__)

_MAX_ROWS = 20_000
"""Related rows of one batch: what goes beyond is left out."""
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

Ids: TypeAlias = list[str]

RecordVersion: TypeAlias = tuple[str, str, int]
"""Collection and id of a related record, and in which state."""


class ReadSession(Protocol):
    """One snapshot to read in."""

    @property
    def snapshot(self) -> Snapshot:
        """Which transactions are seen."""
        ...

    @property
    def insert_lsn(self) -> LSN:
        """Where the WAL ended when the snapshot was there."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether a query had no answer, or not in time, though it should have had one."""
        ...

    async def fetch_texts(
        self, statement: sql.Composed, params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]] | None:
        """Return the rows in the stream's text forms; None if the query fails."""
        ...

    async def answer_questions(self, evaluation: PendingEvaluation) -> None:
        """Put what is to be known, until nothing is left."""
        ...


class ReadSessionFactory(Protocol):
    """What this needs of ``hub.probe``."""

    def read_session(
        self, xids: frozenset[Xid], max_seconds: float | None = None
    ) -> AbstractAsyncContextManager[ReadSession]:
        """Open a snapshot that sees the transactions.

        Args:
            xids: The transactions.
            max_seconds: That all questions may take together; None is no bound.

        Raises:
            psycopg.Error: There is none to be had.
            PoolTimeout: Likewise.
            TimeoutError: Likewise.
        """
        ...


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
        events: Sequence[Event],
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
        events: Sequence[Event],
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
        events: Sequence[Event],
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
                if (_state_key(root), viewer) in fetching.unknown_states
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
        self, session: ReadSession, events: Sequence[Event], junction_indexes: Sequence[int]
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

    def _before_state(self, event: Event) -> BeforeState | None:
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
    event: Event, before_state: BeforeState | None, later_link_changes: LaterLinkChanges
) -> RecordNode:
    record_id = unpadded_id(event.collection, event.record_id)
    return RecordNode(
        event.collection,
        record_id,
        event.row,
        before_state=before_state,
        later_link_changes=later_link_changes,
    )


def _state_key(node: RecordNode) -> int:
    """Return what tells apart for which event a record is read; 0 if that doesn't matter."""
    if node.before_state is not None:
        return id(node.before_state)
    return id(node.later_link_changes) if node.later_link_changes else 0


def _lacks_relation_column(viewer: ExpandViewer, row: Row) -> bool:
    """Whether the viewer expands a relation whose column isn't known."""
    steps = (branch.hop for branch in viewer.plan.branches.values())
    columns = (step.field.column for step in steps if step.is_in_row)
    return any(column is not None and column.name not in row for column in columns)


def _visible_link_changes(
    table_history: TableHistory, event: Event, session: ReadSession
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


@dataclass(slots=True, eq=False)
class _Traversal:
    """From a record to those that one branch leads one viewer to."""

    node: RecordNode
    viewer: ExpandViewer
    branch: ExpandBranch
    ids: Ids | None = None
    """Where it leads; None if that can't be said."""
    children: list[RecordNode] | None = None

    @property
    def target(self) -> Collection:
        return self.branch.hop.target

    @property
    def may_query_target(self) -> bool:
        """Whether the viewer may look there at all."""
        return self.target.name in self.viewer.view_predicates

    @property
    def may_see_target(self) -> bool:
        """Whether the viewer may see anything there."""
        return self.viewer.view_predicates.get(self.target.name) is not None

    @property
    def predicates(self) -> list[BoundPredicate]:
        """What is asked of the records there."""
        name = self.target.name
        bounds = [self.viewer.view_predicates.get(name), self.viewer.manage_predicates.get(name)]
        return [bound for bound in bounds if bound is not None]


_Level: TypeAlias = list[tuple[RecordNode, ExpandViewer, Mapping[str, ExpandBranch]]]

_NodesByTraversal: TypeAlias = dict[tuple[ExpandViewer, ExpandBranch, RecordVersion], RecordNode]
"""Records on the same way are the same, however many others lead to them."""


class _LoadBatch:
    """What was fetched for one batch.

    Args:
        session: Where to ask.
        junction_hops: By collection, its relations through junction tables.
    """

    def __init__(
        self, session: ReadSession, junction_hops: Mapping[str, Sequence[RelationHop]]
    ) -> None:
        self._session = session
        self._junction_hops = junction_hops
        self._macro_values = macro_values_at(datetime.now(UTC))
        self._ids_by_relation: dict[RelationKey, dict[str, Ids | None]] = defaultdict(dict)
        """By relation and record: ids; None if they couldn't be found."""
        self._rows: dict[str, dict[str, Row]] = defaultdict(dict)
        self._rows_before: dict[tuple[int, str], dict[str, Row | None]] = {}
        """By state of the past and collection: rows that were touched since."""
        self.unknown_states: set[tuple[int, ExpandViewer]] = set()
        """By ``_state_key``: who was to be shown records of which that state isn't known."""
        self._row_count = 0

    async def load_junction_ids(self, nodes: Iterable[RecordNode]) -> None:
        """Find the ids of relations through junction tables."""
        nodes = [node for node in nodes if self._junction_hops[node.collection.name]]
        await self._load_relation_ids(
            (step, node) for node in nodes for step in self._junction_hops[node.collection.name]
        )
        turn = YieldTimer()
        for node in nodes:
            steps = self._junction_hops[node.collection.name]
            ids = {step.name: self._target_ids(step, node) for step in steps}
            node.junction_ids = {name: found for name, found in ids.items() if found is not None}
            if turn.is_due():
                await turn.pause()

    async def load_expands(self, roots: Iterable[tuple[RecordNode, ExpandViewer]]) -> None:
        """Find the records that the viewers' plans lead to."""
        made: _NodesByTraversal = {}
        level = [(node, viewer, viewer.plan.branches) for node, viewer in roots]
        for _ in range(MAX_EXPAND_DEPTH):
            if level:
                level = await self._load_level(level, made)

    async def _load_level(self, level: _Level, visible_nodes: _NodesByTraversal) -> _Level:
        """Give the records of a level their related ones; return those that lead further."""
        ways = [
            _Traversal(node, viewer, branch)
            for node, viewer, branches in level
            for branch in branches.values()
        ]
        await self._load_targets([way for way in ways if way.may_query_target])
        looking: Evaluation[RecordVersion, BoundPredicate] = Evaluation(self._macro_values)
        turn = YieldTimer()
        for way in ways:
            bounds = way.predicates
            for child in way.children or ():
                looking.add(child.version, child.collection, child.row, bounds, child.before_state)
                if turn.is_due():
                    await turn.pause()
        await self._session.answer_questions(looking)
        fresh: _Level = []
        for way in ways:
            fresh += _attach_visible_children(way, looking, visible_nodes)
            if turn.is_due():
                await turn.pause()
        await self.load_junction_ids(node for node, _, _ in fresh)
        return [one for one in fresh if one[2]]

    async def _load_targets(self, traversals: Sequence[_Traversal]) -> None:
        """Find the records that the ways lead to, seen or not."""
        sighted = [way for way in traversals if way.may_see_target]
        await self._load_relation_ids((way.branch.hop, way.node) for way in sighted)
        turn = YieldTimer()
        for way in traversals:
            way.ids = self._target_ids(way.branch.hop, way.node) if way.may_see_target else []
            if way.ids is None and self._live_target_ids(way.branch.hop, way.node) is not None:
                self._record_unknown_state(way)
            if turn.is_due():
                await turn.pause()
        await self._load_rows(sighted)
        for way in traversals:
            if way.ids is not None:
                way.children = self._child_nodes(way, way.ids)
                if way.branch.hop.is_back:
                    way.children.sort(
                        key=lambda child: creation_sort_key(child.collection, child.row)
                    )

    def _child_nodes(self, traversal: _Traversal, ids: Ids) -> list[RecordNode]:
        """Return the records of these ids, without those of which only the key is known."""
        target, past = traversal.target, traversal.node.before_state
        children: list[RecordNode] = []
        for one in (unpadded_id(target, given) for given in ids):
            row, is_sure = self._row_in_state(target, one, past)
            if not is_sure:
                self._record_unknown_state(traversal)
            elif row is not None:
                children.append(RecordNode(target, one, row, before_state=past))
        return children

    def _record_unknown_state(self, traversal: _Traversal) -> None:
        self.unknown_states.add((_state_key(traversal.node), traversal.viewer))

    def live_junction_ids(self, node: RecordNode) -> Mapping[str, Ids]:
        """Return, by field, where a record leads now, if some of where it led isn't known."""
        steps = self._junction_hops[node.collection.name]
        if all(step.name in node.junction_ids for step in steps):
            return {}
        ids = {step.name: self._live_target_ids(step, node) for step in steps}
        return {name: found for name, found in ids.items() if found is not None}

    def _live_target_ids(self, hop: RelationHop, node: RecordNode) -> Ids | None:
        return self._ids_by_relation[hop.relation_key].get(node.record_id)

    def _target_ids(self, hop: RelationHop, node: RecordNode) -> Ids | None:
        if hop.is_in_row:
            return ids_in_row(hop, node.row)
        ids = self._live_target_ids(hop, node)
        linking = relation_query(hop)
        if ids is not None and hop.relation_key in node.later_link_changes:
            undone = node.later_link_changes[hop.relation_key]
            before = None
            if undone is not None:
                before = ids_before_changes(linking, undone, node.record_id, ids)
            ids = None if before is None else sorted(before, key=id_sort_key)
        if ids is None or node.before_state is None:
            return ids
        found = set(ids)
        for overlay in node.before_state.overlays([linking.table.name]):
            then = ids_before_overlay(linking, overlay, node.record_id, found)
            if then is None:
                return None
            found = then
        return sorted(found, key=id_sort_key)

    def _row_in_state(
        self, collection: Collection, record_id: str, before_state: BeforeState | None
    ) -> tuple[Row | None, bool]:
        """Return a record's row, None if there is none, and whether that is sure."""
        live = self._rows[collection.name].get(record_id)
        if before_state is None:
            return live, True
        overlays = before_state.overlays([collection.table.name])
        place = id(before_state), collection.name
        if place not in self._rows_before:
            rows: dict[str, Row | None] = {}
            for overlay in overlays:
                rows |= rows_before_overlay(collection, overlay)
            self._rows_before[place] = rows
        row = self._rows_before[place].get(record_id, live)
        if row is None or row is live:
            return row, not any(overlay.was_truncated for overlay in overlays)
        return row, is_whole_row(collection.table, row)

    # --- asking

    async def _load_relation_ids(self, hops: Iterable[tuple[RelationHop, RecordNode]]) -> None:
        asked: dict[RelationKey, tuple[RelationHop, dict[str, None]]] = {}
        for step, node in hops:
            if (
                not step.is_in_row
                and node.record_id not in self._ids_by_relation[step.relation_key]
            ):
                asked.setdefault(step.relation_key, (step, {}))[1][node.record_id] = None
        for link, (step, ids) in asked.items():
            self._ids_by_relation[link] |= await self._query_relation_ids(step, list(ids))

    async def _query_relation_ids(
        self, hop: RelationHop, source_ids: Ids
    ) -> Mapping[str, Ids | None]:
        linking = relation_query(hop)
        pairs = await self._session.fetch_texts(
            linking.statement, {"ids": linking.valid_ids(source_ids)}
        )
        if pairs is None:
            return dict.fromkeys(source_ids)
        found: dict[str, set[str]] = {one: set() for one in source_ids}
        for source, target in pairs:
            if source and target:
                found[source].add(target)
        return {one: sorted(targets, key=id_sort_key) for one, targets in found.items()}

    async def _load_rows(self, traversals: Iterable[_Traversal]) -> None:
        wanted: dict[str, tuple[Collection, dict[str, None]]] = {}
        for way in traversals:
            known = self._rows[way.target.name]
            _, ids = wanted.setdefault(way.target.name, (way.target, {}))
            ids.update((one, None) for one in way.ids or () if one not in known)
        for collection, ids in wanted.values():
            asked = [*ids][: max(0, _MAX_ROWS - self._row_count)]
            self._row_count += len(asked)
            if asked:
                await self._fetch_rows(collection, asked)

    async def _fetch_rows(self, collection: Collection, ids: Ids) -> None:
        self._rows[collection.name] |= await fetch_rows_by_id(self._session, collection, ids) or {}


async def fetch_rows_by_id(
    session: ReadSession, collection: Collection, ids: Iterable[str]
) -> dict[str, Row] | None:
    """Return a collection's rows by id, in the stream's text forms; None if the query fails.

    Args:
        session: The snapshot to read in.
        collection: Whose rows.
        ids: Of them; what no key can be is left out, as are ids of which there is no row.
    """
    names = [column.name for column in collection.table.columns]
    key = collection.key
    usable = [one for one in (canonical_id(one, key.type) for one in ids) if one is not None]
    found = await session.fetch_texts(rows_by_id_statement(collection), {"ids": usable})
    if found is None:
        return None
    rows: dict[str, Row] = {}
    turn = YieldTimer()
    for values in found:
        row: Row = dict(zip(names, values, strict=True))
        rows[unpadded_id(collection, row[key.name] or "")] = row
        if turn.is_due():
            await turn.pause()
    return rows


def _attach_visible_children(
    traversal: _Traversal,
    evaluation: Evaluation[RecordVersion, BoundPredicate],
    visible_nodes: _NodesByTraversal,
) -> _Level:
    """Let a record have those of its related records that the viewer sees; return new ones."""
    name, viewer, branch = traversal.target.name, traversal.viewer, traversal.branch
    if traversal.children is None:
        traversal.node.children[branch.hop.name] = None
        return []
    seen, managed = viewer.view_predicates[name], viewer.manage_predicates.get(name)
    shown: list[RecordNode] = []
    fresh: _Level = []
    for child in traversal.children:
        admitted = evaluation.hits(child.version)
        if seen not in admitted:
            continue
        place = viewer, branch, child.version
        if place not in visible_nodes:
            visible_nodes[place] = child
            child.sees_email = (
                viewer.sees_hidden
                or viewer.own_record == (name, child.record_id)
                or managed in admitted
            )
            fresh.append((child, viewer, branch.branches))
        shown.append(visible_nodes[place])
    traversal.node.children[branch.hop.name] = shown
    return fresh

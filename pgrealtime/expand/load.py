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

from pgrealtime.auth.record import plain_id
from pgrealtime.catalog.keys import canonical_id
from pgrealtime.changes import Change, Row, Truncate
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.expand.plan import (
    Branch,
    Link,
    Node,
    Show,
    Step,
    TooLargeError,
    Undone,
    Viewer,
    expanded,
    ids_in_row,
    junction_steps,
)
from pgrealtime.expand.relation_sql import (
    in_order,
    is_known,
    linking_of,
    links_before,
    links_undone,
    rows_before,
    rows_statement,
    when_created,
)
from pgrealtime.hub.evaluation.point_evaluation import Looking
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.live_reads.row_history import RowHistory, Sequels, TableHistory
from pgrealtime.lsn import LSN, Xid
from pgrealtime.protocol.expand_option import DEPTH
from pgrealtime.rule_queries.executor import Asked
from pgrealtime.rule_queries.outage import PATIENCE_WITH_CONNECTIONS
from pgrealtime.rules.engine.before_state import Past, tables_of
from pgrealtime.rules.engine.plan import Bound, moment
from pgrealtime.snapshot import Snapshot
from pgrealtime.turns import Turn

log = structlog.get_logger(__name__)

_ROWS = 20_000
"""Related rows of one batch: what goes beyond is left out."""
_UNDONE = 1000
"""Changes of a transaction that are taken back for each record that it deleted."""
_BYTES = 64 * 2**20
"""Of what a batch shows in all; beyond, only what is small is shown."""
_LARGE = 4 * 2**20
"""Bytes of what one record shows at most."""
_SMALL = 64 * 2**10
"""Bytes that are always shown: whoever asks for more than there is to give mustn't take it from
those who ask for little."""
_SECONDS = 5.0
"""For one batch in all. Events wait meanwhile, those of other clients too."""

Ids: TypeAlias = list[str]

Place: TypeAlias = tuple[str, str, int]
"""Collection and id of a related record, and in which state."""


class Reading(Protocol):
    """One snapshot to read in."""

    @property
    def snapshot(self) -> Snapshot:
        """Which transactions are seen."""
        ...

    @property
    def reach(self) -> LSN:
        """Where the WAL ended when the snapshot was there."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether a query had no answer, or not in time, though it should have had one."""
        ...

    async def texts(
        self, statement: sql.Composed, params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]] | None:
        """Return the rows in the stream's text forms; None if the query fails."""
        ...

    async def judge(self, asked: Asked) -> None:
        """Put what is to be known, until nothing is left."""
        ...


class Readings(Protocol):
    """What this needs of ``hub.probe``."""

    def reading(
        self, xids: frozenset[Xid], seconds: float | None = None
    ) -> AbstractAsyncContextManager[Reading]:
        """Open a snapshot that sees the transactions.

        Args:
            xids: The transactions.
            seconds: That all questions may take together; None is no bound.

        Raises:
            psycopg.Error: There is none to be had.
            PoolTimeout: Likewise.
            TimeoutError: Likewise.
        """
        ...


Wanted: TypeAlias = tuple[int, Viewer]
"""An event's place, and for whom."""

Enter: TypeAlias = Callable[[Reading, Sized[int]], Awaitable[None]]
"""Takes places of events whose live rows are of interest."""

Check: TypeAlias = Callable[[Reading, Sized[Viewer]], Awaitable[None]]
"""Takes the viewers that related records were read for, at the end of a reading."""


@dataclass(slots=True)
class Related:
    """What is shown of events beside their rows.

    Attributes:
        ids: By place: ids by field name, of relations through junction tables.
        expands: The JSON of the member ``expand``; None for a record without one.
    """

    ids: dict[int, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    expands: dict[Wanted, bytes | None] = field(default_factory=dict)
    live_ids: dict[int, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """As ``ids``, by places of which it isn't known what they were at the event."""
    failed: set[tuple[int, Viewer | None]] = field(default_factory=set)
    """Of which events something couldn't be had, be it for one viewer alone."""
    seconds: float = 0.0
    """What finding and writing the expanded records took, without the wait for a connection."""


class Expander:
    """Fetches what is wanted of batches.

    Args:
        readings: Where to ask.
        collections: All there are.
        show: Makes records.
        history: Knows what was done to junction tables later; without it they are as they are.
    """

    def __init__(
        self,
        readings: Readings,
        collections: Collections,
        show: Show,
        history: RowHistory | None = None,
    ) -> None:
        self._readings = readings
        self._history = history
        self._sequels = Sequels()
        self._tables = tables_of(collections)
        self._junctions = {
            one.name: junction_steps(collections, one) for one in collections.values()
        }
        self._show = show

    async def related(
        self,
        events: Sequence[Event],
        places: Iterable[int],
        wanted: Iterable[Wanted],
        partial: Iterable[int] = (),
        *,
        enter: Enter | None = None,
        check: Check | None = None,
    ) -> Related:
        """Return what is wanted, as far as it can be had in time.

        Args:
            events: The batch.
            places: Of those that anybody hears of; ids in junction tables are found for them.
            wanted: What is expanded, and for whom.
            partial: Places of those whose rows lack columns.
            enter: Told, in the same snapshot, of which events it isn't known what they held.
            check: Told, in the same snapshot, for whom something was read.
        """
        lacking = [p for p in places if self._junctions[events[p].collection.name]]
        asked, partial = list(dict.fromkeys(wanted)), list(partial)
        if not (lacking or asked or partial):
            return Related()
        for patience in PATIENCE_WITH_CONNECTIONS:
            found = Related()
            try:
                async with asyncio.timeout(_SECONDS):
                    await self._read(
                        events, lacking, asked, found, partial=partial, enter=enter, check=check
                    )
            except (psycopg.Error, PoolTimeout, TimeoutError) as error:
                log.warning("expand.failed", error=type(error).__name__)
                # A connection that broke says nothing of the next one.
                if patience is None or isinstance(error, PoolTimeout | TimeoutError):
                    break
                await asyncio.sleep(patience)
            else:
                return found
        return Related(failed={*asked, *((place, None) for place in (*lacking, *partial))})

    async def expands_within(
        self,
        seconds: float,
        events: Sequence[Event],
        wanted: Iterable[Wanted],
        partial: Sequence[int],
        *,
        check: Check | None = None,
    ) -> Related | None:
        """Return what is expanded for some viewers if that takes no longer than so many seconds.

        None is that it does, or that it failed: those viewers are served apart, where nobody waits
        for them.

        Args:
            seconds: For all of it.
            events: The batch.
            wanted: What is expanded, and for whom.
            partial: Places of events whose rows lack columns.
            check: As for ``related``.
        """
        asked, found = list(dict.fromkeys(wanted)), Related()
        try:
            async with asyncio.timeout(_SECONDS):
                await self._read(
                    events, [], asked, found, partial=partial, check=check, within=seconds
                )
        except (psycopg.Error, PoolTimeout, TimeoutError):
            return None
        return found

    async def beside(
        self, collection: Collection, row: Row, viewer: Viewer | None
    ) -> tuple[Mapping[str, Sequence[str]], bytes | None]:
        """As ``related``, of a row as the table has it, for one viewer or none.

        Returns:
            Ids by field name, and the JSON of the member ``expand``.
        """
        root = Node(collection, plain_id(collection, row[collection.key.name] or ""), row)
        if viewer is None and not self._junctions[collection.name]:
            return root.related, None
        try:
            async with (
                asyncio.timeout(_SECONDS),
                self._readings.reading(frozenset()) as reading,
            ):
                fetching = _Fetching(reading, self._junctions)
                await fetching.relate([root])
                await fetching.expand([] if viewer is None else [(root, viewer)])
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            log.warning("expand.failed", error=type(error).__name__)
        try:
            return root.related, None if viewer is None else self._expanded(root, viewer, _LARGE)
        except TooLargeError:
            log.debug("expand.too_large", collection=collection.name, limit=_LARGE)
            return root.related, None

    async def _read(
        self,
        events: Sequence[Event],
        lacking: Sequence[int],
        wanted: Sequence[Wanted],
        found: Related,
        *,
        partial: Sequence[int] = (),
        enter: Enter | None = None,
        check: Check | None = None,
        within: float | None = None,
    ) -> None:
        concerned = dict.fromkeys([*lacking, *(place for place, _ in wanted), *partial])
        pasts = {place: self._past(events[place]) for place in concerned}
        xids = frozenset(events[place].xid for place in concerned)
        began_all = time.perf_counter()
        async with self._readings.reading(xids, within) as reading:
            fetching = _Fetching(reading, self._junctions)
            linked = [p for p in concerned if self._junctions[events[p].collection.name]]
            undone = await self._undone(reading, events, linked)
            nodes = {
                place: _node_of(events[place], pasts[place], undone.get(place, {}))
                for place in concerned
            }
            own = {place: nodes[place] for place in lacking}
            await fetching.relate(own.values())
            found.ids.update((place, node.related) for place, node in own.items())
            unknown = {place: fetching.live_ids(node) for place, node in own.items()}
            found.live_ids.update((place, ids) for place, ids in unknown.items() if ids)
            if enter is not None and (found.live_ids or partial):
                await enter(reading, {*found.live_ids, *partial})
            if reading.has_failed:
                found.failed.update((place, None) for place in (*lacking, *partial))
            roots = [
                (_node_of(events[place], pasts[place], undone.get(place, {})), viewer)
                for place, viewer in wanted
            ]
            began = time.perf_counter()
            await fetching.expand(roots)
            found.seconds = time.perf_counter() - began
            if reading.has_failed:
                found.failed.update(wanted)
            found.failed.update(
                (place, viewer)
                for (place, viewer), (root, _) in zip(wanted, roots, strict=True)
                if (_state_of(root), viewer) in fetching.unknown
            )
            began_check = time.perf_counter()
            if check is not None:
                await check(reading, {viewer for _, viewer in wanted})
            began_all += time.perf_counter() - began_check
        lacking_columns = frozenset(partial)
        found.failed.update(
            (place, viewer)
            for place, viewer in wanted
            if place in lacking_columns and _leads_nowhere(viewer, events[place].row)
        )
        left, turn = _BYTES, Turn()
        for one, (root, viewer) in zip(wanted, roots, strict=True):
            began = time.perf_counter()
            if within is not None and began - began_all > within:
                raise TimeoutError
            most = min(_LARGE, max(left, _SMALL))
            try:
                shown = found.expands[one] = self._expanded(root, viewer, most)
                size = len(shown or b"")
            except TooLargeError:
                log.debug("expand.too_large", collection=root.collection.name, limit=most)
                size = most
            if size > _SMALL:
                left -= size
            found.seconds += time.perf_counter() - began
            if turn.is_over():
                await turn.pause()

    async def _undone(
        self, reading: Reading, events: Sequence[Event], linked: Sequence[int]
    ) -> dict[int, Undone]:
        """Return what was done to the links of records later, as far as the reading sees it.

        A record leads where it led when its transaction was over or, if that changed the record
        once more, right before. What follows is another version's, that others may see.
        """
        if self._history is None or not linked:
            return {}
        is_complete = await self._history.reaches(reading.reach)
        first = LSN(min(events[place].cursor.lsn for place in linked))
        undone: dict[int, Undone] = {}
        turn = Turn()
        for place in linked:
            if turn.is_over():
                await turn.pause()
            event = events[place]
            by_link: dict[Link, Sequence[Change] | None] = {}
            for step in self._junctions[event.collection.name]:
                linking = linking_of(step)
                table, column = linking.table.name, linking.match.name
                own: Sequence[Change] | None = ()
                if event.action != "delete":  # the past of which goes back behind it
                    own = self._sequels.after_version(event, table, column)
                history = await self._history.of(table, column, first) if is_complete else None
                later = None if history is None else _seen(history, event, reading)
                if later is None or own is None:
                    by_link[step.link] = None
                elif own or later:
                    by_link[step.link] = [*own, *later]
            if by_link:
                undone[place] = by_link
        return undone

    def _past(self, event: Event) -> Past | None:
        """Return the state that a deleted record is shown in: that in which it was deleted.

        What its transaction did before has been done, what followed has not: records that go with
        their parent don't find it any more, while the parent still had them.
        """
        if event.action != "delete":
            return None
        first = event.cursor.ordinal - 1
        return Past(event.changes[first : first + _UNDONE], self._tables)

    def _expanded(self, root: Node, viewer: Viewer, most: int) -> bytes | None:
        try:
            return expanded(root, viewer, self._show, most=most)
        except (ValueError, LookupError) as error:
            # A value that isn't of the type that the catalogue gave its column.
            log.error(  # noqa: TRY400 (the message may not show the row)
                "expand.failed", collection=root.collection.name, error=type(error).__name__
            )
            return None


def _node_of(event: Event, past: Past | None, undone: Undone) -> Node:
    record_id = plain_id(event.collection, event.record_id)
    return Node(event.collection, record_id, event.row, past=past, undone=undone)


def _state_of(node: Node) -> int:
    """Return what tells apart for which event a record is read; 0 if that doesn't matter."""
    if node.past is not None:
        return id(node.past)
    return id(node.undone) if node.undone else 0


def _leads_nowhere(viewer: Viewer, row: Row) -> bool:
    """Whether the viewer expands a relation whose column isn't known."""
    steps = (branch.step for branch in viewer.plan.branches.values())
    columns = (step.field.column for step in steps if step.is_in_row)
    return any(column is not None and column.name not in row for column in columns)


def _seen(history: TableHistory, event: Event, reading: Reading) -> list[Change] | None:
    """Return later transactions' changes of the links; None if some aren't known."""
    found: list[Change] = []
    ids = {event.record_id, plain_id(event.collection, event.record_id)}
    writes = [write for one in ids for write in history.writes(one, event.cursor.lsn)]
    for write in writes:
        if write.xid is not None and not reading.snapshot.sees(write.xid):
            continue
        if write.change is None or isinstance(write.change, Truncate):
            return None
        found.append(write.change)
    return found


@dataclass(slots=True, eq=False)
class _Way:
    """From a record to those that one branch leads one viewer to."""

    node: Node
    viewer: Viewer
    branch: Branch
    ids: Ids | None = None
    """Where it leads; None if that can't be said."""
    children: list[Node] | None = None

    @property
    def target(self) -> Collection:
        return self.branch.step.target

    @property
    def is_open(self) -> bool:
        """Whether the viewer may look there at all."""
        return self.target.name in self.viewer.seen

    @property
    def is_sighted(self) -> bool:
        """Whether the viewer may see anything there."""
        return self.viewer.seen.get(self.target.name) is not None

    @property
    def bounds(self) -> list[Bound]:
        """What is asked of the records there."""
        name = self.target.name
        bounds = [self.viewer.seen.get(name), self.viewer.managed.get(name)]
        return [bound for bound in bounds if bound is not None]


_Level: TypeAlias = list[tuple[Node, Viewer, Mapping[str, Branch]]]

_Made: TypeAlias = dict[tuple[Viewer, Branch, Place], Node]
"""Records on the same way are the same, however many others lead to them."""


class _Fetching:
    """What was fetched for one batch.

    Args:
        reading: Where to ask.
        junctions: By collection, its relations through junction tables.
    """

    def __init__(self, reading: Reading, junctions: Mapping[str, Sequence[Step]]) -> None:
        self._reading = reading
        self._junctions = junctions
        self._at = moment(datetime.now(UTC))
        self._links: dict[Link, dict[str, Ids | None]] = defaultdict(dict)
        """By relation and record: ids; None if they couldn't be found."""
        self._rows: dict[str, dict[str, Row]] = defaultdict(dict)
        self._before: dict[tuple[int, str], dict[str, Row | None]] = {}
        """By state of the past and collection: rows that were touched since."""
        self.unknown: set[tuple[int, Viewer]] = set()
        """By ``_state_of``: who was to be shown records of which that state isn't known."""
        self._count = 0

    async def relate(self, nodes: Iterable[Node]) -> None:
        """Find the ids of relations through junction tables."""
        nodes = [node for node in nodes if self._junctions[node.collection.name]]
        await self._find_links(
            (step, node) for node in nodes for step in self._junctions[node.collection.name]
        )
        turn = Turn()
        for node in nodes:
            steps = self._junctions[node.collection.name]
            ids = {step.name: self._ids(step, node) for step in steps}
            node.related = {name: found for name, found in ids.items() if found is not None}
            if turn.is_over():
                await turn.pause()

    async def expand(self, roots: Iterable[tuple[Node, Viewer]]) -> None:
        """Find the records that the viewers' plans lead to."""
        made: _Made = {}
        level = [(node, viewer, viewer.plan.branches) for node, viewer in roots]
        for _ in range(DEPTH):
            if level:
                level = await self._descend(level, made)

    async def _descend(self, level: _Level, made: _Made) -> _Level:
        """Give the records of a level their related ones; return those that lead further."""
        ways = [
            _Way(node, viewer, branch)
            for node, viewer, branches in level
            for branch in branches.values()
        ]
        await self._find([way for way in ways if way.is_open])
        looking: Looking[Place] = Looking(self._at)
        turn = Turn()
        for way in ways:
            bounds = way.bounds
            for child in way.children or ():
                looking.consider(child.place, child.collection, child.row, bounds, child.past)
                if turn.is_over():
                    await turn.pause()
        await self._reading.judge(looking)
        fresh: _Level = []
        for way in ways:
            fresh += _grown(way, looking, made)
            if turn.is_over():
                await turn.pause()
        await self.relate(node for node, _, _ in fresh)
        return [one for one in fresh if one[2]]

    async def _find(self, ways: Sequence[_Way]) -> None:
        """Find the records that the ways lead to, seen or not."""
        sighted = [way for way in ways if way.is_sighted]
        await self._find_links((way.branch.step, way.node) for way in sighted)
        turn = Turn()
        for way in ways:
            way.ids = self._ids(way.branch.step, way.node) if way.is_sighted else []
            if way.ids is None and self._live_ids(way.branch.step, way.node) is not None:
                self._note_unknown(way)
            if turn.is_over():
                await turn.pause()
        await self._find_rows(sighted)
        for way in ways:
            if way.ids is not None:
                way.children = self._children(way, way.ids)
                if way.branch.step.is_back:
                    way.children.sort(key=lambda child: when_created(child.collection, child.row))

    def _children(self, way: _Way, ids: Ids) -> list[Node]:
        """Return the records of these ids, without those of which only the key is known."""
        target, past = way.target, way.node.past
        children: list[Node] = []
        for one in (plain_id(target, given) for given in ids):
            row, is_sure = self._row(target, one, past)
            if not is_sure:
                self._note_unknown(way)
            elif row is not None:
                children.append(Node(target, one, row, past=past))
        return children

    def _note_unknown(self, way: _Way) -> None:
        self.unknown.add((_state_of(way.node), way.viewer))

    def live_ids(self, node: Node) -> Mapping[str, Ids]:
        """Return, by field, where a record leads now, if some of where it led isn't known."""
        steps = self._junctions[node.collection.name]
        if all(step.name in node.related for step in steps):
            return {}
        ids = {step.name: self._live_ids(step, node) for step in steps}
        return {name: found for name, found in ids.items() if found is not None}

    def _live_ids(self, step: Step, node: Node) -> Ids | None:
        return self._links[step.link].get(node.record_id)

    def _ids(self, step: Step, node: Node) -> Ids | None:
        if step.is_in_row:
            return ids_in_row(step, node.row)
        ids = self._live_ids(step, node)
        linking = linking_of(step)
        if ids is not None and step.link in node.undone:
            undone = node.undone[step.link]
            before = None
            if undone is not None:
                before = links_undone(linking, undone, node.record_id, ids)
            ids = None if before is None else sorted(before, key=in_order)
        if ids is None or node.past is None:
            return ids
        found = set(ids)
        for overlay in node.past.overlays([linking.table.name]):
            then = links_before(linking, overlay, node.record_id, found)
            if then is None:
                return None
            found = then
        return sorted(found, key=in_order)

    def _row(
        self, collection: Collection, record_id: str, past: Past | None
    ) -> tuple[Row | None, bool]:
        """Return a record's row, None if there is none, and whether that is sure."""
        live = self._rows[collection.name].get(record_id)
        if past is None:
            return live, True
        overlays = past.overlays([collection.table.name])
        place = id(past), collection.name
        if place not in self._before:
            rows: dict[str, Row | None] = {}
            for overlay in overlays:
                rows |= rows_before(collection, overlay)
            self._before[place] = rows
        row = self._before[place].get(record_id, live)
        if row is None or row is live:
            return row, not any(overlay.is_emptied for overlay in overlays)
        return row, is_known(collection.table, row)

    # --- asking

    async def _find_links(self, wanted: Iterable[tuple[Step, Node]]) -> None:
        asked: dict[Link, tuple[Step, dict[str, None]]] = {}
        for step, node in wanted:
            if not step.is_in_row and node.record_id not in self._links[step.link]:
                asked.setdefault(step.link, (step, {}))[1][node.record_id] = None
        for link, (step, ids) in asked.items():
            self._links[link] |= await self._links_from(step, list(ids))

    async def _links_from(self, step: Step, asked: Ids) -> Mapping[str, Ids | None]:
        linking = linking_of(step)
        pairs = await self._reading.texts(linking.statement, {"ids": linking.usable(asked)})
        if pairs is None:
            return dict.fromkeys(asked)
        found: dict[str, set[str]] = {one: set() for one in asked}
        for source, target in pairs:
            if source and target:
                found[source].add(target)
        return {one: sorted(targets, key=in_order) for one, targets in found.items()}

    async def _find_rows(self, ways: Iterable[_Way]) -> None:
        wanted: dict[str, tuple[Collection, dict[str, None]]] = {}
        for way in ways:
            known = self._rows[way.target.name]
            _, ids = wanted.setdefault(way.target.name, (way.target, {}))
            ids.update((one, None) for one in way.ids or () if one not in known)
        for collection, ids in wanted.values():
            asked = [*ids][: max(0, _ROWS - self._count)]
            self._count += len(asked)
            if asked:
                await self._fetch_rows(collection, asked)

    async def _fetch_rows(self, collection: Collection, ids: Ids) -> None:
        self._rows[collection.name] |= await rows_by_id(self._reading, collection, ids) or {}


async def rows_by_id(
    reading: Reading, collection: Collection, ids: Iterable[str]
) -> dict[str, Row] | None:
    """Return a collection's rows by id, in the stream's text forms; None if the query fails.

    Args:
        reading: The snapshot to read in.
        collection: Whose rows.
        ids: Of them; what no key can be is left out, as are ids of which there is no row.
    """
    names = [column.name for column in collection.table.columns]
    key = collection.key
    usable = [one for one in (canonical_id(one, key.type) for one in ids) if one is not None]
    found = await reading.texts(rows_statement(collection), {"ids": usable})
    if found is None:
        return None
    rows: dict[str, Row] = {}
    turn = Turn()
    for values in found:
        row: Row = dict(zip(names, values, strict=True))
        rows[plain_id(collection, row[key.name] or "")] = row
        if turn.is_over():
            await turn.pause()
    return rows


def _grown(way: _Way, looking: Looking[Place], made: _Made) -> _Level:
    """Let a record have those of its related records that the viewer sees; return new ones."""
    name, viewer, branch = way.target.name, way.viewer, way.branch
    if way.children is None:
        way.node.children[branch.step.name] = None
        return []
    seen, managed = viewer.seen[name], viewer.managed.get(name)
    shown: list[Node] = []
    fresh: _Level = []
    for child in way.children:
        admitted = looking.admitted(child.place)
        if seen not in admitted:
            continue
        place = viewer, branch, child.place
        if place not in made:
            made[place] = child
            child.sees_email = (
                viewer.sees_hidden or viewer.own == (name, child.record_id) or managed in admitted
            )
            fresh.append((child, viewer, branch.branches))
        shown.append(made[place])
    way.node.children[branch.step.name] = shown
    return fresh

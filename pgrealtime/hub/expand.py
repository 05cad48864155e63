"""Fetches related records: those that subscriptions expand, and the ids in junction tables.

Level by level for a whole batch: whatever viewers and records want of one relation is one query, of
one collection's rows another, and rules are asked once for all who ask the same. Nothing here keeps
an event back: what can't be fetched is left out.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, TypeAlias

import psycopg
import structlog
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.auth.record import plain_id
from pgrealtime.catalog.keys import canonical_id, native_name
from pgrealtime.catalog.model import Column, Table
from pgrealtime.changes import Row
from pgrealtime.collections import Collection, Collections
from pgrealtime.hub.event import Event
from pgrealtime.hub.expansion import (
    Branch,
    Link,
    Node,
    Show,
    Step,
    Viewer,
    expanded,
    ids_in_array,
    ids_in_row,
    junction_steps,
)
from pgrealtime.hub.looking import Looking
from pgrealtime.lsn import Xid
from pgrealtime.records.expand import DEPTH
from pgrealtime.rules.images import Overlay
from pgrealtime.rules.past import Past, tables_of
from pgrealtime.rules.plan import moment

log = structlog.get_logger(__name__)

_BACK_LIMIT = 1000
"""Records that point to one record (protocol, 5.6)."""
_FORWARD_LIMIT = 10_000
"""Ids in a junction table for one record; a junction without bound must not fill the memory."""
_ROWS = 20_000
"""Related rows of one batch: what goes beyond is left out."""
_SECONDS = 5.0
"""For one batch in all. Events wait meanwhile, those of other clients too."""

Ids: TypeAlias = list[str]

Place: TypeAlias = tuple[str, str]
"""Collection and id of a related record."""


class Reading(Protocol):
    """One snapshot to read in."""

    async def texts(
        self, statement: sql.Composed, params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]] | None:
        """Return the rows in the stream's text forms; None if the query fails."""
        ...

    async def judge(self, looking: Looking[Place]) -> None:
        """Put what is to be known, until nothing is left."""
        ...


class Readings(Protocol):
    """What this needs of ``hub.probe``."""

    def reading(self, xids: frozenset[Xid]) -> AbstractAsyncContextManager[Reading]:
        """Open a snapshot that sees the transactions.

        Raises:
            psycopg.Error: There is none to be had.
            PoolTimeout: Likewise.
            TimeoutError: Likewise.
        """
        ...


Wanted: TypeAlias = tuple[int, Viewer]
"""An event's place, and for whom."""


@dataclass(slots=True)
class Related:
    """What is shown of events beside their rows.

    Attributes:
        ids: By place: ids by field name, of relations through junction tables.
        expands: The JSON of the member ``expand``; None for a record without one.
    """

    ids: dict[int, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    expands: dict[Wanted, bytes | None] = field(default_factory=dict)


class Expander:
    """Fetches what is wanted of batches.

    Args:
        readings: Where to ask.
        collections: All there are.
        show: Makes records.
    """

    def __init__(self, readings: Readings, collections: Collections, show: Show) -> None:
        self._readings = readings
        self._tables = tables_of(collections)
        self._junctions = {
            one.name: junction_steps(collections, one) for one in collections.values()
        }
        self._show = show

    async def related(
        self, events: Sequence[Event], places: Iterable[int], wanted: Iterable[Wanted]
    ) -> Related:
        """Return what is wanted, as far as it can be had in time.

        Args:
            events: The batch.
            places: Of those that anybody hears of; ids in junction tables are found for them.
            wanted: What is expanded, and for whom.
        """
        found = Related()
        by_past: defaultdict[int | None, _Work] = defaultdict(_Work)
        for place in places:
            if self._junctions[events[place].collection.name]:
                by_past[_past_of(events[place])].places.append(place)
        for one in dict.fromkeys(wanted):
            by_past[_past_of(events[one[0]])].wanted.append(one)
        if not by_past:
            return found
        try:
            async with asyncio.timeout(_SECONDS):
                await self._read(events, by_past.values(), found)
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            log.warning("expand.failed", error=type(error).__name__)
        return found

    async def _read(self, events: Sequence[Event], works: Iterable[_Work], found: Related) -> None:
        xids = frozenset(events[place].xid for work in works for place in work.all_places())
        async with self._readings.reading(xids) as reading:
            for work in works:
                await self._work(events, work, reading, found)

    async def _work(
        self, events: Sequence[Event], work: _Work, reading: Reading, found: Related
    ) -> None:
        first = events[work.all_places()[0]]
        past = Past(first.changes, self._tables) if first.action == "delete" else None
        fetching = _Fetching(reading, past, self._junctions)
        own = {place: _node_of(events[place]) for place in work.places}
        await fetching.relate(own.values())
        found.ids.update((place, node.related) for place, node in own.items())
        roots = [(_node_of(events[place]), viewer) for place, viewer in work.wanted]
        await fetching.expand(roots)
        for one, (root, viewer) in zip(work.wanted, roots, strict=True):
            try:
                found.expands[one] = expanded(root, viewer, self._show)
            except (ValueError, LookupError) as error:
                # A value that isn't of the type that the catalogue gave its column.
                log.error(  # noqa: TRY400 (the message may not show the row)
                    "expand.failed", collection=root.collection.name, error=type(error).__name__
                )


@dataclass(slots=True)
class _Work:
    """What is wanted of records as of one state of the related tables."""

    places: list[int] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)

    def all_places(self) -> list[int]:
        return [*self.places, *(place for place, _ in self.wanted)]


def _past_of(event: Event) -> int | None:
    """Tell apart the states that records are shown in: a deleted one as before its transaction."""
    return id(event.changes) if event.action == "delete" else None


def _node_of(event: Event) -> Node:
    return Node(event.collection, plain_id(event.collection, event.record_id), event.row)


class _Fetching:
    """What was fetched for one batch in one state.

    Args:
        reading: Where to ask.
        past: What the related tables were like, for deleted records.
        junctions: By collection, its relations through junction tables.
    """

    def __init__(
        self, reading: Reading, past: Past | None, junctions: Mapping[str, Sequence[Step]]
    ) -> None:
        self._reading = reading
        self._past = past
        self._junctions = junctions
        self._at = moment(datetime.now(UTC))
        self._links: dict[Link, dict[str, Ids | None]] = defaultdict(dict)
        """By relation and record: ids; None if they couldn't be found."""
        self._rows: dict[str, dict[str, Row]] = defaultdict(dict)
        self._count = 0

    async def relate(self, nodes: Iterable[Node]) -> None:
        """Find the ids of relations through junction tables."""
        nodes = [node for node in nodes if self._junctions[node.collection.name]]
        wanted: dict[Link, tuple[Step, set[str]]] = {}
        for node in nodes:
            for step in self._junctions[node.collection.name]:
                wanted.setdefault(step.link, (step, set()))[1].add(node.record_id)
        await self._find_links(wanted)
        for node in nodes:
            steps = self._junctions[node.collection.name]
            ids = {step.name: self._ids(step, node) for step in steps}
            node.related = {name: found for name, found in ids.items() if found is not None}

    async def expand(self, roots: Iterable[tuple[Node, Viewer]]) -> None:
        """Find the records that the viewers' plans lead to."""
        made: dict[tuple[Viewer, Branch, str], Node] = {}
        level = [(node, viewer, viewer.plan.branches) for node, viewer in roots]
        for _ in range(DEPTH):
            if level:
                level = await self._descend(level, made)

    async def _descend(self, level: _Level, made: dict[tuple[Viewer, Branch, str], Node]) -> _Level:
        """Give the records of a level their related ones; return those that lead further."""
        ways = [
            (node, viewer, branch)
            for node, viewer, branches in level
            for branch in branches.values()
        ]
        open_ways = []
        for node, viewer, branch in ways:
            if branch.step.target.name in viewer.seen:
                open_ways.append((node, viewer, branch))
            else:
                node.children[branch.step.name] = None
        await self._find_links(_links_of(open_ways))
        await self._find_rows(open_ways)
        children = {way: self._children(*way) for way in open_ways}
        looking: Looking[Place] = Looking(self._at)
        for (_, viewer, branch), found in children.items():
            name = branch.step.target.name
            bounds = [viewer.seen.get(name), viewer.managed.get(name)]
            for child in found or ():
                asked = [bound for bound in bounds if bound is not None]
                looking.consider(child.place, child.collection, child.row, asked, self._past)
        await self._reading.judge(looking)
        following: _Level = []
        for way, found in children.items():
            following += _grown(way, found, looking, made)
        await self.relate(dict.fromkeys(node for node, _, _ in following))
        return [one for one in following if one[2]]

    def _ids(self, step: Step, node: Node) -> Ids | None:
        if step.is_in_row:
            return ids_in_row(step, node.row)
        return self._links[step.link].get(node.record_id)

    def _children(self, node: Node, viewer: Viewer, branch: Branch) -> list[Node] | None:
        step = branch.step
        ids = self._ids(step, node)
        if ids is None:
            return None
        if viewer.seen[step.target.name] is None:
            return []
        rows = self._rows[step.target.name]
        plain = (plain_id(step.target, one) for one in ids)
        return [Node(step.target, one, rows[one]) for one in plain if one in rows]

    # --- asking

    async def _find_links(self, wanted: Mapping[Link, tuple[Step, set[str]]]) -> None:
        for link, (step, ids) in wanted.items():
            known = self._links[link]
            asked = [one for one in ids if one not in known]
            if asked:
                found = await self._links_from(step, asked)
                known.update((one, None if found is None else found[one]) for one in asked)

    async def _links_from(self, step: Step, asked: Ids) -> dict[str, Ids] | None:
        linking = _linking(step)
        pairs = await self._reading.texts(linking.statement, {"ids": linking.usable(asked)})
        if pairs is None:
            return None
        found: dict[str, set[str]] = {one: set() for one in asked}
        for source, target in pairs:
            if source and target:
                found[source].add(target)
        if self._past is not None:
            for overlay in self._past.overlays([linking.table.name]):
                _restore_links(linking, overlay, found)
        return {one: sorted(targets, key=_in_order) for one, targets in found.items()}

    async def _find_rows(self, ways: Iterable[_Way]) -> None:
        wanted: dict[str, tuple[Collection, set[str]]] = {}
        for node, viewer, branch in ways:
            target = branch.step.target
            if viewer.seen[target.name] is not None:
                ids = self._ids(branch.step, node) or ()
                wanted.setdefault(target.name, (target, set()))[1].update(ids)
        for name, (collection, all_ids) in wanted.items():
            known = self._rows[name]
            asked = [one for one in all_ids if plain_id(collection, one) not in known]
            asked = asked[: max(0, _ROWS - self._count)]
            self._count += len(asked)
            if asked:
                await self._fetch_rows(collection, asked)

    async def _fetch_rows(self, collection: Collection, ids: Ids) -> None:
        names = [column.name for column in collection.table.columns]
        key = collection.key
        usable = [one for one in (canonical_id(one, key.type) for one in ids) if one is not None]
        found = await self._reading.texts(_rows_statement(collection), {"ids": usable})
        known = self._rows[collection.name]
        for values in found or ():
            row: Row = dict(zip(names, values, strict=True))
            known[plain_id(collection, row[key.name] or "")] = row
        if self._past is not None:
            for overlay in self._past.overlays([collection.table.name]):
                _restore_rows(collection, overlay, known, ids)


_Way: TypeAlias = tuple[Node, Viewer, Branch]
_Level: TypeAlias = list[tuple[Node, Viewer, Mapping[str, Branch]]]


def _links_of(ways: Iterable[_Way]) -> dict[Link, tuple[Step, set[str]]]:
    wanted: dict[Link, tuple[Step, set[str]]] = {}
    for node, viewer, branch in ways:
        step = branch.step
        if not step.is_in_row and viewer.seen[step.target.name] is not None:
            wanted.setdefault(step.link, (step, set()))[1].add(node.record_id)
    return wanted


def _grown(
    way: _Way,
    found: list[Node] | None,
    looking: Looking[Place],
    made: dict[tuple[Viewer, Branch, str], Node],
) -> _Level:
    """Let a record have those of its related records that the viewer sees."""
    node, viewer, branch = way
    name = branch.step.target.name
    if found is None:
        node.children[branch.step.name] = None
        return []
    seen, managed = viewer.seen[name], viewer.managed.get(name)
    children: list[Node] = []
    fresh: _Level = []
    for child in found:
        admitted = looking.admitted(child.place)
        if seen not in admitted:
            continue
        place = viewer, branch, child.record_id
        if place not in made:
            made[place] = child
            child.sees_email = (
                viewer.sees_hidden or viewer.own == (name, child.record_id) or managed in admitted
            )
            fresh.append((child, viewer, branch.branches))
        children.append(made[place])
    node.children[branch.step.name] = children
    return fresh


def _restore_links(linking: _Linking, overlay: Overlay, found: dict[str, set[str]]) -> None:
    """Let links that the transaction touched be as they were before it."""
    for row in overlay.touched:
        target = row.get(linking.result.name) or ""
        # A record has one row, wherever it points now; a junction table has one per pair.
        sources = found.keys() if linking.is_of_record else linking.sources(row)
        for source in sources:
            found.get(source, set()).discard(target)
    for row in overlay.before:
        target = row.get(linking.result.name) or ""
        for source in linking.sources(row):
            if source in found and target:
                found[source].add(target)


def _restore_rows(
    collection: Collection, overlay: Overlay, known: dict[str, Row], ids: Iterable[str]
) -> None:
    """Let rows that the transaction touched be as they were before it."""
    key = collection.key.name
    wanted = {plain_id(collection, one) for one in ids}
    for row in overlay.touched:
        known.pop(plain_id(collection, row.get(key) or ""), None)
    for row in overlay.before:
        record_id = plain_id(collection, row.get(key) or "")
        if record_id in wanted:
            known[record_id] = row


def _in_order(text: str) -> tuple[bool, int, str]:
    """Sort numbers as such, before texts: no order is kept where ids come from a table."""
    is_number = text.isascii() and text.isdigit()
    return not is_number, int(text) if is_number else 0, text


# --- statements


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linking:
    """How the ids are found that a relation leads to, where the row doesn't hold them."""

    table: Table
    match: Column
    """Holds the id of the record that is asked about, perhaps in an array."""
    result: Column
    source: Collection
    """Whose ids are asked about."""
    is_of_record: bool
    """The table is a collection's, and ``result`` its key."""
    limit: int

    def sources(self, row: Row) -> Ids:
        """Return the ids that a row of the table matches."""
        text = row.get(self.match.name)
        if not text:
            return []
        if self.match.type.base.element is None:
            return [plain_id(self.source, text)]
        return ids_in_array(text)

    def usable(self, ids: Iterable[str]) -> Ids:
        """Return the ids that can be asked for without an error."""
        type_ = self.match.type.base.element or self.match.type
        return [one for one in ids if canonical_id(one, type_) is not None]

    @property
    def statement(self) -> sql.Composed:
        """Return the query; its rows are ids that are asked about and ids they lead to."""
        element = self.match.type.base.element
        type_ = element or self.match.type
        native = native_name(type_)
        match: sql.Composable = sql.Identifier("t", self.match.name)
        asked = sql.SQL("k.id::pg_catalog.{}").format(sql.Identifier(native or "text"))
        if element is None:
            shape = "{match} OPERATOR(pg_catalog.=) {asked}"
        elif native:
            shape = "{match} OPERATOR(pg_catalog.@>) ARRAY[{asked}]"
        else:
            shape = "{asked} OPERATOR(pg_catalog.=) ANY ({match})"
        if native is None:
            match = sql.SQL("{}::pg_catalog.text{}").format(match, sql.SQL("[]" if element else ""))
        return sql.SQL(
            "SELECT k.id, l.id FROM pg_catalog.unnest(%(ids)s::pg_catalog.text[]) k(id)"
            " CROSS JOIN LATERAL"
            " (SELECT {result} AS id FROM {table} t WHERE {condition} LIMIT {limit}) l"
        ).format(
            result=sql.Identifier("t", self.result.name),
            table=sql.Identifier(*self.table.name),
            condition=sql.SQL(shape).format(match=match, asked=asked),
            limit=sql.Literal(self.limit),
        )


def _linking(step: Step) -> _Linking:
    owner, relation = step.owner, step.field.relation
    assert relation is not None
    limit = _BACK_LIMIT if step.is_back else _FORWARD_LIMIT
    junction = relation.junction
    if junction is None:
        assert step.field.column is not None
        return _Linking(
            table=owner.table,
            match=step.field.column,
            result=owner.key,
            source=step.source,
            is_of_record=True,
            limit=limit,
        )
    here, there = junction.source, junction.target
    return _Linking(
        table=junction.table,
        match=_column(junction.table, there if step.is_back else here),
        result=_column(junction.table, here if step.is_back else there),
        source=step.source,
        is_of_record=False,
        limit=limit,
    )


def _column(table: Table, name: str) -> Column:
    column = table.column(name)
    assert column is not None
    return column


def _rows_statement(collection: Collection) -> sql.Composed:
    """Return the query for rows by id, in the table's column order."""
    native = native_name(collection.key.type)
    key = sql.Identifier(collection.key.name)
    return sql.SQL(
        "SELECT {columns} FROM {table} WHERE {key} OPERATOR(pg_catalog.=) ANY (%(ids)s::{type}[])"
    ).format(
        columns=sql.SQL(", ").join(sql.Identifier(one.name) for one in collection.table.columns),
        table=sql.Identifier(*collection.table.name),
        key=key if native else sql.SQL("{}::pg_catalog.text").format(key),
        type=sql.Identifier("pg_catalog", native or "text"),
    )

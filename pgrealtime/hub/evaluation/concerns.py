"""Finds the mirrors whom changes of related rows concern: verdicts may move on rows not written.

They are told to load anew. Whether a changed row leads to any row of theirs now isn't asked: a row
that a later commit took away would hide its reader. The matcher adds the groups of mirrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from pgrealtime.changes import Change, TableName, Transaction, Truncate
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.links import LinkUpdates, row_images_of
from pgrealtime.lsn import Cursor
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.engine.ways import Way, ways_to
from pgrealtime.rules.memory.compare import SqliteValue


@dataclass(slots=True)
class _WayGroups:
    """The groups of one specialization, by what a way compares."""

    all: dict[Group, None] = field(default_factory=dict)
    by_key: dict[SqliteValue, dict[Group, None]] = field(default_factory=dict)
    """Empty if the way has no key."""


class Concerns:
    """The ways to the mirrors of one generation.

    A row of a junction table among ``links`` concerns nobody by that: it is an event.
    """

    def __init__(self, collections: Collections, links: LinkUpdates | None = None) -> None:
        self._collections = collections
        self._links = links
        self._ways: WeakKeyDictionary[Specialization, tuple[Way, ...]] = WeakKeyDictionary()
        self._groups: dict[TableName, dict[tuple[Specialization, Way], _WayGroups]] = {}
        self._written_twice: tuple[tuple[Change, ...], dict[TableName, bool]] = ((), {})
        """Of the transaction that was looked at last: it may have many slices."""

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, group: Group) -> None:
        """Add a new group of mirrors."""
        for way in self._ways_to(group.specialization):
            of_table = self._groups.setdefault(way.table, {})
            groups = of_table.setdefault((group.specialization, way), _WayGroups())
            groups.all[group] = None
            if way.key is not None:
                key = way.key.read_caller_key(group.values)
                groups.by_key.setdefault(key, {})[group] = None

    def remove(self, group: Group) -> None:
        """Remove a group that ``add`` added."""
        for way in self._ways_to(group.specialization):
            of_table = self._groups[way.table]
            groups = of_table[group.specialization, way]
            del groups.all[group]
            if way.key is not None:
                key = way.key.read_caller_key(group.values)
                del groups.by_key[key][group]
                if not groups.by_key[key]:
                    del groups.by_key[key]
            if not groups.all:
                del of_table[group.specialization, way]
            if not of_table:
                del self._groups[way.table]

    def _ways_to(self, specialization: Specialization) -> tuple[Way, ...]:
        ways = self._ways.get(specialization)
        if ways is None:
            ways = self._ways[specialization] = ways_to(specialization, self._collections)
        return ways

    def reads(self, group: Group, tables: AbstractSet[TableName]) -> bool:
        """Whether the verdicts of a group depend on rows of any of the tables besides its own."""
        return any(way.table in tables for way in self._ways_to(group.specialization))

    def find(
        self, transactions: Sequence[Transaction], after: Cursor, upto: Cursor
    ) -> dict[Group, None]:
        """Return the groups whom the transactions' changes between two cursors concern."""
        found: dict[Group, None] = {}
        if not self._groups:
            return found
        for transaction in transactions:
            written: dict[TableName, frozenset[str | None]] = {}
            for ordinal, change in enumerate(transaction.changes, start=1):
                of_table = self._groups.get(change.table)
                if of_table and after < Cursor(transaction.end_lsn, ordinal) <= upto:
                    for (specialization, way), groups in of_table.items():
                        if not (
                            self._is_link_update(way, change, specialization)
                            or _is_of_event(way, change, specialization, transaction, written)
                        ):
                            is_event = way.is_referenced and not self._is_written_twice(
                                specialization.collection, transaction
                            )
                            found.update(_concerned(way, change, groups, is_event=is_event))
        return found

    def _is_written_twice(self, collection: Collection, transaction: Transaction) -> bool:
        """Whether a transaction wrote any row of a collection more than once.

        The first of its events may show it to somebody by related rows as they are after the
        transaction, and the next, which hides it, be evaluated by those before: nothing is told.
        """
        changes, known = self._written_twice
        if changes is not transaction.changes:
            known = {}
            self._written_twice = transaction.changes, known
        table = collection.table.name
        if table not in known:
            name = collection.key.name
            ids = [
                {row.get(name) for row in row_images_of(change)}
                for change in transaction.changes
                if change.table == table
            ]
            known[table] = len(set().union(*ids)) < sum(map(len, ids))
        return known[table]

    def _is_link_update(self, way: Way, change: Change, specialization: Specialization) -> bool:
        """Whether a junction's change makes updates of the rows that it links: these are events."""
        return (
            bool(way.source_column)
            and self._links is not None
            and not isinstance(change, Truncate)
            and self._links.names_pairs_of(specialization.collection, change)
        )

    def find_relinked(self, event: Event) -> dict[Group, None]:
        """Return the groups whom an update by links concerns that can't be evaluated."""
        found: dict[Group, None] = {}
        change = event.transaction_changes[event.cursor.ordinal - 1]
        for (specialization, way), groups in self._groups.get(change.table, {}).items():
            if way.source_column and specialization.collection.name == event.collection.name:
                found.update(_concerned(way, change, groups))
        return found


def _concerned(
    way: Way, change: Change, groups: _WayGroups, *, is_event: bool = False
) -> dict[Group, None]:
    try:
        keys = way.keys_concerned(change, is_event=is_event)
    except Exception:  # noqa: BLE001 (a value that makes no key may concern everybody)
        keys = None
    if keys is None:
        return groups.all
    return {group: None for key in keys for group in groups.by_key.get(key, ())}


def _is_of_event(
    way: Way,
    change: Change,
    specialization: Specialization,
    transaction: Transaction,
    written: dict[TableName, frozenset[str | None]],
) -> bool:
    """Whether a junction's pair is of rows that the transaction wrote: these are events."""
    if not way.source_column or isinstance(change, Truncate):
        return False
    collection = specialization.collection
    table = collection.table.name
    if table not in written:
        written[table] = frozenset(
            row.get(collection.key.name)
            for one in transaction.changes
            if one.table == table
            for row in row_images_of(one)
        )
    return written[table].issuperset(row.get(way.source_column) for row in row_images_of(change))

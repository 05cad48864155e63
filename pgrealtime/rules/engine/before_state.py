"""Related tables before a transaction: PostgreSQL evaluates the rows that it deleted against them.

After it the rows that a deleted row pointed to may be gone or changed as well. The matcher and the
enricher keep ``BeforeStates``; ``Evaluation`` puts the overlays into its questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pgrealtime.catalog.model import Table
from pgrealtime.changes import Change, Delete, Insert, Row, TableName, Truncate, Update
from pgrealtime.rules.sql.row_images import Overlay

_BATCHES_BEFORE_EVICTION = 8
"""Batches that a state outlives its last use by: some readers of the changelog may take turns at
different transactions."""


class BeforeState:
    """The state before one transaction, computed table by table when it is first needed.

    ``tables`` are those that rules can read.
    """

    def __init__(self, changes: Iterable[Change], tables: Mapping[TableName, Table]) -> None:
        self._changes = tuple(changes)
        self._tables = tables
        self._changed_tables: frozenset[TableName] | None = None
        """Computed when needed: most deletes are decided by their row alone, and a transaction may
        have very many changes."""
        self._overlays: dict[TableName, Overlay | None] = {}

    def overlays(self, tables: Iterable[TableName]) -> tuple[Overlay, ...]:
        """Return the former state of those of the tables that the transaction changed."""
        wanted = frozenset(tables)
        if not wanted:
            return ()
        if self._changed_tables is None:
            self._changed_tables = frozenset(change.table for change in self._changes)
        overlays = (self._overlay_of(name) for name in sorted(self._changed_tables & wanted))
        return tuple(overlay for overlay in overlays if overlay is not None)

    def _overlay_of(self, name: TableName) -> Overlay | None:
        if name not in self._overlays:
            table = self._tables.get(name)
            self._overlays[name] = None if table is None else _make_overlay(table, self._changes)
        return self._overlays[name]


class BeforeStates:
    """The states before transactions, one for each, shared by its events and batches.

    A large transaction is evaluated in many batches. Computing its state for each of them would
    take time by the square of its changes.
    """

    def __init__(self, tables: Mapping[TableName, Table]) -> None:
        self._tables = tables
        self._batch_number = 0
        self._states: dict[int, tuple[BeforeState, int]] = {}
        """By the identity of the changes, which the state holds; with the last batch to use it."""

    def begin_batch(self) -> None:
        """Drop states that were not used for a while; each holds its transaction in memory."""
        self._batch_number += 1
        if self._states:
            oldest = self._batch_number - _BATCHES_BEFORE_EVICTION
            self._states = {key: known for key, known in self._states.items() if known[1] >= oldest}

    def state_before(self, changes: tuple[Change, ...]) -> BeforeState:
        """Return the state before the transaction of these changes."""
        known = self._states.get(id(changes))
        state = BeforeState(changes, self._tables) if known is None else known[0]
        self._states[id(changes)] = state, self._batch_number
        return state


def _make_overlay(table: Table, changes: Iterable[Change]) -> Overlay:
    """Return the first old image of each row of the table that was there before."""
    old_images: list[Row] = []
    changed: dict[tuple[str | None, ...], Row] = {}

    def add_old(row: Row) -> None:
        key = _primary_key(table, row)
        if key not in changed:
            changed[key] = row
            old_images.append(row)

    for change in changes:
        if change.table != table.name:
            continue
        match change:
            case Insert(new=new):
                changed.setdefault(_primary_key(table, new), new)
            case Update(new=new, old=old):
                add_old(old.row)
                changed.setdefault(_primary_key(table, new), new)
            case Delete(old=old):
                add_old(old.row)
            case Truncate():
                old_images.append({})  # any rows: has no column, so that no reader is answered
    return Overlay(table=table, old_images=old_images, changed_rows=list(changed.values()))


def _primary_key(table: Table, row: Row) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in table.primary_key)

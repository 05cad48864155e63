"""Related tables as they were before a transaction: what its deletes are judged against.

Of each row that the transaction touched stands the first old image, of those that it inserted none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pgrealtime.catalog.model import Table
from pgrealtime.changes import Change, Delete, Insert, Row, TableName, Truncate, Update
from pgrealtime.rules.sql.row_images import Overlay


class BeforeState:
    """The state before one transaction, table by table; made when it is asked for."""

    __slots__ = ("_changed_tables", "_changes", "_overlays", "_tables")

    def __init__(self, changes: Iterable[Change], tables: Mapping[TableName, Table]) -> None:
        self._changes = tuple(changes)
        self._tables = tables
        self._changed_tables: frozenset[TableName] | None = None
        """Made when it is asked for: of the changes there may be many more than are judged."""
        self._overlays: dict[TableName, Overlay | None] = {}

    def overlays(self, tables: Iterable[TableName]) -> tuple[Overlay, ...]:
        """Return those of the tables that the transaction touched, as they were."""
        wanted = frozenset(tables)
        if not wanted:
            return ()
        if self._changed_tables is None:
            self._changed_tables = frozenset(change.table for change in self._changes)
        touched = sorted(self._changed_tables & wanted)
        found = (self._overlay_of(name) for name in touched)
        return tuple(overlay for overlay in found if overlay is not None)

    def _overlay_of(self, name: TableName) -> Overlay | None:
        if name not in self._overlays:
            table = self._tables.get(name)
            self._overlays[name] = None if table is None else _make_overlay(table, self._changes)
        return self._overlays[name]


_BATCHES_BEFORE_EVICTION = 8
"""Batches that a state is kept for although none of them needs it: some readers of the changelog
may be at different transactions, and take turns."""


class BeforeStates:
    """The states before transactions: one each, however many events and batches it has.

    A large transaction is judged in many batches. Were its state found out for each of them, that
    would take time by the square of its changes.
    """

    __slots__ = ("_batch_number", "_states", "_tables")

    def __init__(self, tables: Mapping[TableName, Table]) -> None:
        self._tables = tables
        self._batch_number = 0
        self._states: dict[int, tuple[BeforeState, int]] = {}
        """By the identity of the changes, which each holds; and the batch that needed it last."""

    def begin_batch(self) -> None:
        """Let go of what wasn't needed for a while: it holds its transaction."""
        self._batch_number += 1
        if self._states:
            oldest = self._batch_number - _BATCHES_BEFORE_EVICTION
            self._states = {at: kept for at, kept in self._states.items() if kept[1] >= oldest}

    def state_before(self, changes: tuple[Change, ...]) -> BeforeState:
        """Return the state before the transaction of those changes."""
        kept = self._states.get(id(changes))
        past = BeforeState(changes, self._tables) if kept is None else kept[0]
        self._states[id(changes)] = past, self._batch_number
        return past


def _make_overlay(table: Table, changes: Iterable[Change]) -> Overlay:
    before: list[Row] = []
    touched: dict[tuple[str | None, ...], Row] = {}
    for change in changes:
        if change.table != table.name:
            continue
        match change:
            case Insert(new=new):
                touched.setdefault(_primary_key_texts(table, new), new)
            case Update(new=new, old=old):
                _add_old_row(table, old.row, before, touched)
                touched.setdefault(_primary_key_texts(table, new), new)
            case Delete(old=old):
                _add_old_row(table, old.row, before, touched)
            case Truncate():
                before.append({})  # any row may have been there: covers nothing that is read
    return Overlay(table=table, old_images=before, changed_rows=list(touched.values()))


def _add_old_row(
    table: Table, row: Row, before: list[Row], touched_rows: dict[tuple[str | None, ...], Row]
) -> None:
    key = _primary_key_texts(table, row)
    if key not in touched_rows:
        touched_rows[key] = row
        before.append(row)


def _primary_key_texts(table: Table, row: Row) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in table.primary_key)

"""The ways from other rows to a rule: which of their changes may move verdicts on unwritten rows.

A rule on related rows changes its verdict on a row when one of those is written, and the row itself
has no event then. ``hub.evaluation.concerns`` asks here what a specialization reads, and where, and
finds the callers concerned in the changed row alone: nothing is asked of PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pgrealtime.catalog.model import Table, Type, TypeKind
from pgrealtime.changes import Change, Delete, Insert, TableName, Update
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.rules.engine.formula import TestCall, each_test_call
from pgrealtime.rules.engine.index_keys import KeyRegistry
from pgrealtime.rules.engine.index_paths import CallerKeyReader, remote_key_path
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.predicate import (
    BackRelation,
    Comparison,
    Condition,
    Conjunction,
    EachValue,
    RowPath,
    ScopeRow,
    ToEach,
    ToOne,
)
from pgrealtime.rules.memory.compare import SqliteValue

_KEY_TYPES = frozenset({"text", "varchar", "uuid", "int2", "int4", "int8"})
"""Types whose text form in the stream is the one that PostgreSQL names keys by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayKey:
    """The column of a related row that is compared with a caller's value.

    A change of the row concerns the callers who have its old or its new value, and nobody else.
    """

    column_name: str
    parse_key: Callable[[str], SqliteValue]
    read_caller_key: CallerKeyReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One place at which a test reads rows of a table."""

    table: TableName
    column_names: frozenset[str]
    """Those that are read there, the ones that join it included."""
    generated_names: frozenset[str] = frozenset()
    """Those of them that are generated: a decoder may leave them out although they changed."""
    is_referenced: bool = False
    """Whether it is reached by a foreign key alone: whoever points to a row that is inserted or
    deleted is written by the same transaction, and so an event itself. If that is written twice,
    the events don't tell of the moment in between, and the change may concern its callers."""
    source_column: str = ""
    """Of a junction table's row, the column that names the row whose verdict or content it is
    part of: of one that the transaction wrote, that is an event itself. Else empty."""
    key: WayKey | None = None
    """None if a change may concern every caller."""

    def keys_concerned(
        self, change: Change, *, is_event: bool = False
    ) -> frozenset[SqliteValue] | None:
        """Return the keys of callers whom a change of the table may concern; None is everybody.

        ``is_event``: whoever points to a row that is inserted or deleted is one event.
        """
        match change:
            case Insert(new=new):
                return _NOBODY if is_event else self._keys_of(new)
            case Delete(old=old):
                return _NOBODY if is_event else self._keys_of(old.row)
            case Update(new=new, old=old):
                if all(self._is_unchanged(name, change) for name in self.column_names):
                    return _NOBODY
                return self._keys_of(old.row, new)
            case _:
                return None

    def _is_unchanged(self, name: str, update: Update) -> bool:
        """Whether a column certainly has its old value, as TOASTed ones that are left out do."""
        if name not in update.new:
            return name not in self.generated_names
        return name in update.old.row and update.old.row[name] == update.new[name]

    def _keys_of(self, *rows: dict[str, str | None]) -> frozenset[SqliteValue] | None:
        key = self.key
        if key is None or not all(key.column_name in row for row in rows):
            return None
        texts = {row[key.column_name] for row in rows} - {None}
        return frozenset(key.parse_key(text) for text in texts if text is not None)


_NOBODY: frozenset[SqliteValue] = frozenset()


def ways_to(specialization: Specialization, collections: Collections) -> tuple[Way, ...]:
    """Return the ways to a specialization's verdicts, and to the ids that its records show."""
    ways = dict.fromkeys(
        way
        for call in each_test_call(specialization.formula)
        for way in _Places(call, collections).ways()
    )
    for shown in specialization.collection.fields:
        if (junction := _junction_way(shown)) is not None:
            ways[junction] = None
    return tuple(ways)


def _junction_way(field: Field) -> Way | None:
    junction = None if field.relation is None else field.relation.junction
    if junction is None:
        return None
    columns = frozenset({junction.source_column, junction.target_column})
    return Way(
        table=junction.table.name, column_names=columns, source_column=junction.source_column
    )


class _Places:
    """The places at which one test reads rows of other tables."""

    def __init__(self, call: TestCall, collections: Collections) -> None:
        self._call = call
        self._test = call.test
        self._collections = collections
        self._columns: dict[RowPath, set[str]] = {}
        """By place, the columns read there; only of places that are rows of other tables."""
        self._referenced: dict[RowPath, bool] = {}
        self._junctions: dict[Way, None] = {}
        self._nested: set[RowPath] = set()
        """Places that nested rules read: by joins of their own, so that the row which another
        condition reads there may be another one."""
        self._walk(self._test.condition, RowPath(ScopeRow(self._test.collection.name)))

    def ways(self) -> Iterator[Way]:
        yield from self._junctions
        keys = dict(self._keys())
        for place, names in self._columns.items():
            collection = self._collection_at(place)
            yield Way(
                table=collection.table.name,
                column_names=frozenset(names),
                generated_names=collection.generated_columns & names,
                is_referenced=self._referenced[place],
                key=None if place in self._nested else keys.get(place),
            )

    def _collection_at(self, place: RowPath) -> Collection:
        return self._collections[place.collection_name]

    # --- what is read where

    def _walk(self, condition: Condition, scope: RowPath) -> None:
        match condition:
            case Comparison(listed=listed):
                for term in predicate.own_terms(condition):
                    self._read_term(term, scope)
                for rule in listed:
                    self._walk(rule, scope)
            case Conjunction(parts) | predicate.Disjunction(parts):
                for part in parts:
                    self._walk(part, scope)
            case predicate.NestedRule(path, where):
                self._walk(where, self._follow(path, scope))

    def _read_term(self, term: predicate.Term, scope: RowPath) -> None:
        path = predicate.row_path_of(term)
        if path is None:
            return
        place = self._follow(path, scope)
        match term:
            case predicate.FieldValue(field=field, shown_by=shown_by):
                self._read_field(place, field)
                if shown_by is not None:
                    self._read_field(place, shown_by)
            case predicate.JsonValue(field=field):
                self._read_field(place, field)
            case _:
                pass  # the path says it all

    def _follow(self, path: RowPath, scope: RowPath) -> RowPath:
        """Read what leads along a path; return its end, which begins with the scope's path."""
        is_of_scope = isinstance(path.root, ScopeRow)
        place = scope if is_of_scope else RowPath(path.root)
        if not is_of_scope:
            self._reach(place, is_referenced=False)
        for step in path.steps:
            place = self._follow_step(place, step)
        if not scope.is_scope_row:
            self._nested.update(place.joined_rows())
        return place

    def _follow_step(self, place: RowPath, step: predicate.PathStep) -> RowPath:
        end = place.extended_by(step)
        match step:
            case ToOne(field):
                self._read_field(place, field)
                column = field.column
                self._reach(
                    end,
                    is_referenced=column is not None
                    and self._has_foreign_key(
                        self._collection_at(place).table, column.name, self._collection_at(end)
                    ),
                )
            case EachValue(field):
                self._read_field(place, field)
            case ToEach():
                each = place.steps[-1]
                assert isinstance(each, EachValue)
                junction = None if each.field.relation is None else each.field.relation.junction
                self._reach(
                    end,
                    is_referenced=junction is not None
                    and self._has_foreign_key(
                        junction.table, junction.target_column, self._collection_at(end)
                    ),
                )
            case BackRelation(field=field):
                self._reach(end, is_referenced=False)
                self._read_field(end, field)
        return end

    def _reach(self, place: RowPath, *, is_referenced: bool) -> None:
        """Read a row at a place: which there is, its key says."""
        if place.is_caller_row and self._test.is_caller_row_bound:
            return
        self._referenced[place] = self._referenced.get(place, True) and is_referenced
        self._read(place, self._collection_at(place).key.name)

    def _read_field(self, place: RowPath, field: Field) -> None:
        if field.column is not None:
            self._read(place, field.column.name)
        elif (junction := _junction_way(field)) is not None:
            is_own = place.is_scope_row
            self._junctions[
                junction
                if is_own
                else Way(table=junction.table, column_names=junction.column_names)
            ] = None

    def _read(self, place: RowPath, column_name: str) -> None:
        # The row itself is an event, and columns of the caller's own are values.
        if place.is_scope_row or (place.is_caller_row and self._test.is_caller_row_bound):
            return
        self._columns.setdefault(place, set()).add(column_name)

    @staticmethod
    def _has_foreign_key(table: Table, column_name: str, target: Collection) -> bool:
        return any(
            key.is_validated
            and key.column_names == (column_name,)
            and key.target == target.table.name
            and key.target_column_names == (target.key.name,)
            for key in table.foreign_keys
        )

    # --- whom a row concerns

    def _keys(self) -> Iterator[tuple[RowPath, WayKey]]:
        """Yield the places whose rows hold a caller's value that must be equal for the test.

        Any one of the rows at the place must have it, and all else that reads the place stands in
        conjunction with that: so other callers' verdicts don't depend on the row.
        """
        condition = self._test.condition
        conjuncts = condition.conditions if isinstance(condition, Conjunction) else (condition,)
        for index, conjunct in enumerate(conjuncts):
            others = [*conjuncts[:index], *conjuncts[index + 1 :]]
            if isinstance(conjunct, Comparison) and (key := self._key_of(conjunct, others)):
                yield key

    def _key_of(
        self, comparison: Comparison, others: Sequence[Condition]
    ) -> tuple[RowPath, WayKey] | None:
        path = remote_key_path(comparison, others, self._call, KeyRegistry())
        if path is None or path.remote_key is None:
            return None
        match path.remote_key.term:
            case predicate.FieldValue(place, field, predicate.Modifier.WHOLE, None) if (
                field.column is not None and _is_key_type(field.column.type)
            ):
                column_name = field.column.name
            case _:
                return None
        if not _is_any_match(comparison) or not all(_is_bound_to(place, one) for one in others):
            return None
        (read_caller_key,) = path.caller_key_readers
        return place, WayKey(
            column_name=column_name,
            parse_key=path.remote_key.parse_key,
            read_caller_key=read_caller_key,
        )


def _is_any_match(comparison: Comparison) -> bool:
    terms = (comparison.left, comparison.right)
    return comparison.is_any or not any(map(predicate.is_multiple, terms))


def _is_bound_to(place: RowPath, condition: Condition) -> bool:
    """Whether a condition that reads a place reads the one row of it that others read, too."""
    match condition:
        case Comparison():
            paths = predicate.paths_read(condition, is_nested_included=False)
            reads = any(place in path.joined_rows() for path in paths)
            return not reads or _is_any_match(condition)
        case Conjunction(parts) | predicate.Disjunction(parts):
            return all(_is_bound_to(place, part) for part in parts)
        case predicate.NestedRule():
            return True  # what it reads has no key


def _is_key_type(type_: Type) -> bool:
    return type_.base.name in _KEY_TYPES or type_.base.kind is TypeKind.ENUM

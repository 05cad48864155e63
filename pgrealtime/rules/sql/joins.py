"""Builds a FROM clause: one LEFT JOIN per row path of a scope, made when the path is first read.

All comparisons of a scope share the joins of equal paths: two ``?`` comparisons over one path are
about one and the same row, as in PocketBase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from sqlglot import exp

from pgrealtime.catalog.model import Column, Table, Type
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.parameters import (
    CALLER_ID_PARAMETER,
    Binding,
    CallerColumn,
    Parameter,
    ParameterClass,
    SqlForm,
)
from pgrealtime.rules.language.predicate import RowPath
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.nodes import Sql, TypedSql, typed_column

_JoinCondition: TypeAlias = Callable[[str], Sql]
"""Makes the condition of a join, given the alias of the joined row."""

MAX_JOINS = 300
"""Joins of one rule or filter, those of the search for counter-examples included.

PocketBase has no limit; planning a filter of many long paths would take PostgreSQL seconds.
"""


@dataclass(slots=True, kw_only=True)
class Translation:
    """What the scopes of one translated predicate share."""

    collections: Collections
    parameter_classes: Mapping[Parameter, ParameterClass]
    placeholder_prefix: str = "p"
    is_caller_row_bound: bool = False
    """Columns of the caller's own row are bound as parameters, and not read from its table."""
    bindings: dict[str, Binding] = field(default_factory=dict)
    """Placeholder to its content."""
    column_names: dict[str, None] = field(default_factory=dict)
    """Columns read of the row image, in order of first use."""
    tables: dict[TableName, None] = field(default_factory=dict)
    """Other tables that are read."""
    alias_count: int = 0
    join_count: int = 0

    def bind(self, parameter: Parameter | CallerColumn, form: SqlForm) -> Sql:
        """Return the placeholder of a parameter in a form, cast to the form's type."""
        binding = Binding(parameter, form)
        key = next((key for key, known in self.bindings.items() if known == binding), None)
        if key is None:
            key = f"{self.placeholder_prefix}{len(self.bindings)}"
            self.bindings[key] = binding
        return nodes.cast(nodes.placeholder(key), FORM_TYPES[form])

    def let(self, expression: Sql, body: Callable[[Sql], Sql]) -> Sql:
        """Return ``body`` of an expression that is computed once, however often it is used."""
        alias = self.new_alias()
        row = nodes.one_row(alias, {"v": expression})
        computed = nodes.copy_if_attached(body(nodes.column(alias, "v")))
        return exp.Subquery(this=nodes.select([computed], row))

    def new_alias(self) -> str:
        """Return an alias that no other row of the statement has."""
        self.alias_count += 1
        return f"j{self.alias_count}"


FORM_TYPES = {
    SqlForm.TEXT: "text",
    SqlForm.NUMBER: "text",
    SqlForm.PATTERN: "text",
    SqlForm.UUID: "uuid",
    SqlForm.INTEGER: "bigint",
    SqlForm.WHOLE: "bigint",
    SqlForm.FLOOR: "bigint",
    SqlForm.CEILING: "bigint",
    SqlForm.JSON: "text",
}
"""The PostgreSQL type of a placeholder; pairs of rows and values have arrays of it."""


class Scope:
    """The joined rows that the comparisons of one SELECT read.

    The rule is about the row with ``scope_row_alias`` in the outer query. If that ``is_row_image``
    of the stream, its columns are recorded as read.

    With ``numbers_rows``, ``row_order`` sorts the combinations of joined rows: by each join that
    can have several, in the order in which the joins were made.
    """

    def __init__(
        self,
        translation: Translation,
        scope_row_alias: str,
        *,
        is_row_image: bool,
        numbers_rows: bool = False,
    ) -> None:
        self.translation = translation
        self.scope_row_alias = scope_row_alias
        self.is_row_image = is_row_image
        self._numbers_rows = numbers_rows
        self.row_order: list[exp.Ordered] = []
        self._row_aliases: dict[RowPath, str] = {}
        self._each_values: dict[RowPath, TypedSql] = {}
        self._joins: list[exp.Join] = []
        self._computed_aliases: dict[object, str] = {}

    @property
    def has_joins(self) -> bool:
        """Whether any other row than the scope's is read."""
        return bool(self._joins)

    @property
    def joins(self) -> list[exp.Join]:
        """The joins made so far, as nodes that belong to no tree."""
        return [join if join.parent is None else join.copy() for join in self._joins]

    def without_joins(self) -> Scope:
        """Return a scope about the same row with no joins yet."""
        return Scope(self.translation, self.scope_row_alias, is_row_image=self.is_row_image)

    def collection_at(self, path: RowPath) -> Collection:
        """Return the collection of the rows at the path."""
        return self.translation.collections[path.collection_name]

    def column_at(self, path: RowPath, column_name: str) -> Sql:
        """Return a column of the row at the path."""
        if path.is_scope_row and self.is_row_image:
            self.translation.column_names.setdefault(column_name)
        if self.translation.is_caller_row_bound and path.is_caller_row:
            return self._caller_column(self.collection_at(path), column_name)
        return nodes.column(self.join_row(path), column_name)

    def _caller_column(self, collection: Collection, column_name: str) -> Sql:
        column = collection.table.find_column(column_name)
        assert column is not None
        parameter = CALLER_ID_PARAMETER if column == collection.key else CallerColumn(column_name)
        return nodes.cast_to_type(self.translation.bind(parameter, SqlForm.TEXT), column.type)

    def caller_row_exists(self, collection: Collection) -> Sql:
        """Return EXISTS of the caller's own row in its table.

        The id was read from that table, so it can be cast to the key's type, and an index is used.
        """
        alias, key = self.translation.new_alias(), collection.key
        row = self._table(collection.table, alias)
        own, caller_id = typed_column(alias, key), CALLER_ID_PARAMETER
        known = nodes.cast_to_type(self.translation.bind(caller_id, SqlForm.TEXT), key.type)
        return nodes.exists(row, nodes.equal_keys(own, replace(own, node=known, id_parts=())))

    def row_id_at(self, path: RowPath) -> TypedSql:
        """Return the id of the row at the path, NULL where there is no row."""
        return self._typed_column(path, self.collection_at(path).key)

    def _typed_column(self, path: RowPath, column: Column) -> TypedSql:
        return TypedSql(self.column_at(path, column.name), column.type, column.is_deterministic)

    def each_value(self, path: RowPath) -> TypedSql:
        """Return one of the values of a multiple field; the path ends with ``EachValue``."""
        self.join_row(path)
        return self._each_values[path]

    def join_row(self, path: RowPath) -> str:
        """Return the alias of the row at the path, whose joins are made if there are none yet."""
        if path.is_scope_row:
            return self.scope_row_alias
        if path not in self._row_aliases:
            self._row_aliases[path] = self._join_path(path)
        return self._row_aliases[path]

    def compute_once(
        self, cache_key: object, columns: Callable[[], Mapping[str, Sql]]
    ) -> Callable[[str], Sql]:
        """Return a function that gives expressions by name, computed once per row of the scope.

        Equal ``cache_key`` means equal expressions, which share one LATERAL join; ``columns`` makes
        them if there are none yet.
        """
        if cache_key not in self._computed_aliases:
            made = columns()
            alias = self._computed_aliases[cache_key] = self.translation.new_alias()
            row = nodes.one_row(None, made)
            self._add_join(exp.Lateral(this=row, alias=nodes.row_alias(alias)), nodes.boolean(True))
        alias = self._computed_aliases[cache_key]
        return lambda column_name: nodes.column(alias, column_name)

    def exists(self, where: Sql) -> Sql:
        """Return EXISTS over the joins made so far."""
        return exp.Exists(this=self.build_select(nodes.number(1), where))

    def build_select(self, expression: Sql, where: Sql) -> exp.Select:
        """Return a SELECT over the joins made so far: LEFT JOINs of a relation of one row."""
        one = exp.Select(expressions=[nodes.number(1)])
        return nodes.select(
            [nodes.copy_if_attached(expression)],
            exp.Subquery(this=one, alias=nodes.row_alias("one")),
            joins=self.joins,
            where=where,
        )

    # --- joins

    def _join_path(self, path: RowPath) -> str:
        if path.steps:
            return self._join_step(path, RowPath(path.root, path.steps[:-1]), path.steps[-1])
        collection = self.collection_at(path)
        match path.root:
            case predicate.CallerRow():
                return self._left_join(collection, lambda alias: self._is_caller(alias, collection))
            case predicate.CollectionRows():
                return self._number_rows(
                    collection, self._left_join(collection, lambda _: nodes.boolean(True))
                )
            case predicate.ScopeRow():
                raise AssertionError("the scope's row is not joined")

    def _is_caller(self, alias: str, collection: Collection) -> Sql:
        key = typed_column(alias, collection.key)
        form = native_id_form(key.type)
        own = nodes.bytewise_text(key) if form is None else key.node
        caller_id = self.translation.bind(CALLER_ID_PARAMETER, form or SqlForm.TEXT)
        if key.id_parts:
            return nodes.equal_keys(key, replace(key, node=caller_id, id_parts=()))
        return nodes.binary(exp.EQ, own, caller_id)

    def _join_step(self, path: RowPath, parent: RowPath, step: predicate.PathStep) -> str:
        collections = self.translation.collections
        match step:
            case predicate.ToOne(field, name):
                assert field.column is not None
                link = self._typed_column(parent, field.column)
                return self._join_by_key(collections[name], link)
            case predicate.EachValue(field):
                return self._join_each_value(path, parent, field)
            case predicate.ToEach(name):
                return self._join_by_key(collections[name], self.each_value(parent))
            case predicate.BackRelation(name, field):
                return self._join_back(parent, collections[name], field)

    def _join_by_key(self, target: Collection, source: TypedSql) -> str:
        return self._left_join(
            target, lambda alias: nodes.equal_keys(typed_column(alias, target.key), source)
        )

    def _join_each_value(self, path: RowPath, parent: RowPath, field: Field) -> str:
        alias = self.translation.new_alias()
        junction = junction_columns(field)
        if junction is not None:
            self._add_join(
                self._table(junction.table, alias),
                nodes.equal_keys(typed_column(alias, junction.source), self.row_id_at(parent)),
            )
            target = self._each_values[path] = typed_column(alias, junction.target)
            self._number_by(nodes.sortable_text(target))
            return alias
        assert field.column is not None
        element = field.type.base.element
        assert element is not None
        unnest = exp.Unnest(expressions=[self.column_at(parent, field.column.name)])
        names = ["value", "ordinal"] if self._numbers_rows else ["value"]
        values = exp.Lateral(
            this=unnest, alias=nodes.row_alias(alias, *names), ordinality=self._numbers_rows
        )
        self._add_join(values, nodes.boolean(True))
        self._number_by(nodes.column(alias, "ordinal"))
        item = nodes.column(alias, "value")
        self._each_values[path] = TypedSql(item, element, field.column.is_deterministic)
        return alias

    def _join_back(self, parent: RowPath, source: Collection, field: Field) -> str:
        key = self.row_id_at(parent)
        junction = junction_columns(field)
        if junction is not None:
            pairs = self.translation.new_alias()
            pointed_to = typed_column(pairs, junction.target)
            self._add_join(self._table(junction.table, pairs), nodes.equal_keys(pointed_to, key))
            joined = self._join_by_key(source, typed_column(pairs, junction.source))
            return self._number_rows(source, joined)
        assert field.column is not None
        column = field.column
        matches = _array_contains if field.is_multiple else nodes.equal_keys
        joined = self._left_join(source, lambda alias: matches(typed_column(alias, column), key))
        return self._number_rows(source, joined)

    def _number_rows(self, collection: Collection, alias: str) -> str:
        """Sort the rows of a join by the collection's default order; return their alias."""
        for one in collection.order:
            column = nodes.column(alias, one.column.name)
            self._number_by(column, is_descending=one.is_descending)
        return alias

    def _number_by(self, expression: Sql, *, is_descending: bool = False) -> None:
        if self._numbers_rows:
            self.row_order.append(nodes.ordered(expression, is_descending=is_descending))

    def _left_join(self, collection: Collection, on: _JoinCondition) -> str:
        alias = self.translation.new_alias()
        condition = on(alias)
        self._add_join(self._table(collection.table, alias), condition)
        return alias

    def _table(self, table: Table, alias: str) -> exp.Table:
        self.translation.tables.setdefault(table.name)
        return nodes.table(table, alias)

    def _add_join(self, row: Sql, on: Sql) -> None:
        self.translation.join_count += 1
        if self.translation.join_count > MAX_JOINS:
            raise RuleUnsupportedError(
                f"more than {MAX_JOINS} joins in one expression", start=0, end=0
            )
        self._joins.append(exp.Join(this=row, side="LEFT", on=nodes.copy_if_attached(on)))


class JunctionColumns(NamedTuple):
    """A junction table with the columns of its pairs."""

    table: Table
    source: Column
    """Names the row of the field's collection."""
    target: Column
    """Names the related row."""


def junction_columns(field: Field) -> JunctionColumns | None:
    """Return the junction table of a relation field, if it has one."""
    junction = None if field.relation is None else field.relation.junction
    if junction is None:
        return None
    source = junction.table.find_column(junction.source_column)
    target = junction.table.find_column(junction.target_column)
    assert source is not None
    assert target is not None
    return JunctionColumns(junction.table, source, target)


def native_id_form(type_: Type) -> SqlForm | None:
    """Return the form in which a text is bound to compare with an id by its type's operator."""
    base = type_.base
    return _NATIVE_ID_FORMS.get(base.name) if base.schema == "pg_catalog" else None


_NATIVE_ID_FORMS = {
    "uuid": SqlForm.UUID,
    **dict.fromkeys(("int2", "int4", "int8"), SqlForm.INTEGER),
}


def _array_contains(array: TypedSql, key: TypedSql) -> Sql:
    """Return whether the array contains the id: by ``@>``, which a GIN index supports, if exact."""
    element = array.type.base.element
    assert element is not None
    is_deterministic = array.is_deterministic and key.is_deterministic
    is_native = element.oid == key.type.base.oid and element.schema == "pg_catalog"
    if is_native and is_deterministic:
        wanted = exp.Array(expressions=[nodes.copy_if_attached(nodes.cast_to_base_type(key))])
        return exp.ArrayContainsAll(this=nodes.copy_if_attached(array.node), expression=wanted)
    values = exp.Any(this=exp.Paren(this=nodes.cast(array.node, "text[]")))
    return exp.EQ(this=nodes.collate_c(nodes.cast(key.node, nodes.TEXT)), expression=values)

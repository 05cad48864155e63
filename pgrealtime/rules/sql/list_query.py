"""The statements of a list request: a page of rows, their count, and one row by its id.

Rule, filter and sort share joins, as in PocketBase, which makes every record appear once for all
rows joined to it. Conditions whose joins can give several rows stand in an EXISTS, and the order
outside of it, so that an index can serve order and limit. Only a sort key that can have several
values needs all combinations: then a record's key is that of its first combination.

Values are bound; ``bindings`` says to what. ``reads`` runs the statements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlglot import exp

from pgrealtime.catalog.model import Column, native_key_type
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, FieldKind
from pgrealtime.rules.language.list_query import ListQuery, SortKey, SortOrder
from pgrealtime.rules.language.parameters import Binding, Parameter, ParameterClass
from pgrealtime.rules.language.predicate import (
    Comparison,
    FieldValue,
    Modifier,
    RowPath,
    Term,
    independent_parts,
    paths_read,
    row_path_of,
)
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import condition_with_joins, translate_condition
from pgrealtime.rules.sql.joins import Scope, Translation
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql, TypedSql, all_of
from pgrealtime.rules.sql.operands import translate_operand

_FOUND_ALIAS = "x"
_PAGE_ALIAS = "p"
_JOINED_ALIAS = "w"
_MILLISECOND_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ListSql:
    """The statements of a list, with psycopg's placeholders. Run them read-only in pg_catalog."""

    page: str
    """The columns of a page's rows. ``limit`` and ``offset`` are bigints."""
    count: str
    """How many rows there are on all pages."""
    row: str
    """The columns of the row whose id is the parameter ``id``, if the list shows it."""
    joined_count: str | None
    """How many combinations of joined rows there are, up to ``max_joined_rows``; None if the page
    doesn't need them all. Of more combinations, ``page`` reads only so many."""
    bindings: Mapping[str, Binding]
    """Placeholder to its content."""
    tables: frozenset[TableName]
    """Other tables that are read."""

    @property
    def length(self) -> int:
        """Characters of the statements."""
        return len(self.page) + len(self.count) + len(self.row) + len(self.joined_count or "")


def translate_list(
    query: ListQuery,
    collections: Collections,
    parameter_classes: Mapping[Parameter, ParameterClass],
    column_names: Sequence[str],
) -> ListSql:
    """Return the statements that read columns of the rows that a list shows.

    Raises:
        RuleUnsupportedError: The query can't be evaluated exactly.
    """
    translation = Translation(collections=collections, parameter_classes=parameter_classes)
    collection = collections[query.collection_name]
    selected = _Selected(collection, query, translation, column_names)
    page, joined_count = selected.page()
    return ListSql(
        page=page,
        count=selected.count(),
        row=selected.row(),
        joined_count=joined_count,
        bindings=translation.bindings,
        tables=frozenset(translation.tables),
    )


class _OrderKey(NamedTuple):
    expression: Sql
    is_descending: bool
    not_null: bool
    """Whether the expression is never NULL, so that an index of either NULL order serves it."""


class _Selected:
    """The rows that a query shows."""

    def __init__(
        self,
        collection: Collection,
        query: ListQuery,
        translation: Translation,
        column_names: Sequence[str],
    ) -> None:
        self._collection = collection
        self._query = query
        self._translation = translation
        self._column_names = column_names

    def page(self) -> tuple[str, str | None]:
        """Return the statement for a page, and that for the combinations if they are all needed."""
        for key in self._query.sort:
            path = None if isinstance(key.by, SortOrder) else row_path_of(key.by)
            if path is not None and self._multiplies(path):
                return self._page_of_first_rows()
        scope = self._scope()
        where = self._where(scope)
        order = [
            nodes.ordered(key.expression, is_descending=key.is_descending, not_null=key.not_null)
            for key in self._order(scope, ROW_ALIAS)
        ]
        page = self._select(self._columns(ROW_ALIAS), scope, where)
        return nodes.to_text(_paged(page, order)), None

    def count(self) -> str:
        """Return the statement that counts the rows, those of the same id once."""
        scope = self._scope()
        where = self._where(scope)
        key = nodes.column(ROW_ALIAS, self._collection.key.name)
        counted: Sql = exp.Star()
        if not self._collection.has_unique_key:
            counted = exp.Distinct(expressions=[key])
        return nodes.to_text(self._select([exp.Count(this=counted)], scope, where))

    def row(self) -> str:
        """Return the statement for one row by its id."""
        scope = self._scope()
        where = self._where(scope)
        is_wanted = _has_id(nodes.typed_column(ROW_ALIAS, self._collection.key))
        return nodes.to_text(self._select(self._columns(ROW_ALIAS), scope, [is_wanted, *where]))

    def _page_of_first_rows(self) -> tuple[str, str]:
        """Return the statements where a sort key can have several values for one record.

        The key of a record is that of its first combination of joined rows that meets all
        conditions; ``o0``, ``o1`` number the combinations, ``k0``, ``k1`` are the sort keys::

            SELECT p.* FROM (
              SELECT DISTINCT ON (w.id) w.id, w.k0 FROM (
                SELECT r.id, j1.name AS k0, j0.ordinal AS o0 FROM posts r LEFT JOIN ... WHERE ...
                LIMIT max_joined_rows) w
              ORDER BY w.id, w.o0) x
            JOIN posts p ON p.id = x.id
            ORDER BY x.k0 NULLS FIRST, ... LIMIT ... OFFSET ...
        """
        scope = self._scope(numbers_rows=True)
        where = [translate_condition(part, scope) for part in self._query.where.conditions]
        keys = self._order(scope, ROW_ALIAS)
        key = nodes.column(ROW_ALIAS, self._collection.key.name)
        names = [f"k{i}" for i in range(len(keys))]
        numbers = [f"o{i}" for i in range(len(scope.row_order))]
        joined = self._select(
            [
                _named(key, "id"),
                *(
                    _named(sort_key.expression, name)
                    for name, sort_key in zip(names, keys, strict=True)
                ),
                *(
                    _named(order.this, name)
                    for name, order in zip(numbers, scope.row_order, strict=True)
                ),
            ],
            scope,
            where,
        )
        joined.set("limit", exp.Limit(expression=_bigint("max_joined_rows")))
        counted = nodes.select(
            [exp.Count(this=exp.Star())],
            exp.Subquery(this=joined.copy(), alias=nodes.row_alias(_JOINED_ALIAS)),
        )
        first = nodes.select(
            [nodes.column(_JOINED_ALIAS, name) for name in ("id", *names)],
            exp.Subquery(this=joined, alias=nodes.row_alias(_JOINED_ALIAS)),
        )
        by_id = nodes.column(_JOINED_ALIAS, "id")
        first.set("distinct", exp.Distinct(on=exp.Tuple(expressions=[by_id])))
        first.set(
            "order",
            exp.Order(
                expressions=[
                    exp.Ordered(this=by_id.copy(), nulls_first=False),
                    *(
                        exp.Ordered(
                            this=nodes.column(_JOINED_ALIAS, name),
                            desc=order.args["desc"],
                            nulls_first=order.args["nulls_first"],
                        )
                        for name, order in zip(numbers, scope.row_order, strict=True)
                    ),
                ]
            ),
        )
        is_found = nodes.binary(
            exp.EQ,
            nodes.column(_PAGE_ALIAS, self._collection.key.name),
            nodes.column(_FOUND_ALIAS, "id"),
        )
        page = nodes.select(
            self._columns(_PAGE_ALIAS),
            exp.Subquery(this=first, alias=nodes.row_alias(_FOUND_ALIAS)),
            joins=[exp.Join(this=nodes.table(self._collection.table, _PAGE_ALIAS), on=is_found)],
        )
        order = [
            nodes.ordered(nodes.column(_FOUND_ALIAS, name), is_descending=sort_key.is_descending)
            for name, sort_key in zip(names, keys, strict=True)
        ]
        return nodes.to_text(_paged(page, order)), nodes.to_text(counted)

    # --- parts of a statement

    def _scope(self, *, numbers_rows: bool = False) -> Scope:
        return Scope(self._translation, ROW_ALIAS, is_row_image=False, numbers_rows=numbers_rows)

    def _columns(self, alias: str) -> list[Sql]:
        return [nodes.column(alias, name) for name in self._column_names]

    def _select(self, expressions: Sequence[Sql], scope: Scope, where: Sequence[Sql]) -> exp.Select:
        return nodes.select(
            expressions,
            nodes.table(self._collection.table, ROW_ALIAS),
            joins=scope.joins,
            where=all_of(*where) if where else None,
        )

    def _where(self, scope: Scope) -> list[Sql]:
        """Return the conditions; those that join single rows only join them in the scope."""
        return [
            condition_with_joins(part, self._scope())
            if any(self._multiplies(path) for path in paths_read(part, is_nested_included=False))
            else translate_condition(part, scope)
            for part in independent_parts(self._query.where)
        ]

    def _multiplies(self, path: RowPath) -> bool:
        """Return whether the joins of the path can give several rows for one."""
        return path.is_multiple or not all(
            self._translation.collections[joined.collection_name].has_unique_key
            for joined in path.joined_rows()
        )

    # --- order

    def _order(self, scope: Scope, alias: str) -> list[_OrderKey]:
        order: list[_OrderKey] = []
        sort = self._query.sort
        for key in sort:
            match key.by:
                case SortOrder.RANDOM:
                    order.append(
                        _OrderKey(nodes.call("random"), is_descending=False, not_null=True)
                    )
                case SortOrder.DEFAULT:
                    order += self._default_order(alias, is_reversed=key.is_descending)
                case term:
                    order += _order_by_term(key, term, scope, is_alone=len(sort) == 1)
                    if self._is_unique(term):
                        return order  # no index would serve what follows
        # Always total: pages of an order with ties would repeat and lose rows.
        return order + self._default_order(alias)

    def _is_unique(self, term: Term) -> bool:
        """Return whether no two rows of the collection have the same value, or none."""
        collection = self._collection
        match term:
            case FieldValue(path, field, Modifier.WHOLE):
                is_key = path.is_scope_row and field.column == collection.key
                return is_key and collection.has_unique_key
            case _:
                return False

    def _default_order(self, alias: str, *, is_reversed: bool = False) -> list[_OrderKey]:
        return [
            _OrderKey(
                nodes.column(alias, ordered.column.name),
                ordered.is_descending != is_reversed,
                ordered.column.not_null,
            )
            for ordered in self._collection.order
        ]


def _order_by_term(key: SortKey, term: Term, scope: Scope, *, is_alone: bool) -> list[_OrderKey]:
    expressions, not_null = _sort_expressions(term, scope, is_alone=is_alone)
    if key.is_shown is not None:
        shown = _shown_or_empty(key.is_shown, expressions, scope)
        expressions, not_null = [shown], False
    return [_OrderKey(expression, key.is_descending, not_null) for expression in expressions]


def _shown_or_empty(is_shown: Comparison, expressions: Sequence[Sql], scope: Scope) -> Sql:
    (email,) = expressions
    return nodes.in_byte_order(
        nodes.case(
            (translate_condition(is_shown, scope), email),
            (nodes.is_not_null(email), nodes.string("")),
        )
    )


def _sort_expressions(term: Term, scope: Scope, *, is_alone: bool) -> tuple[list[Sql], bool]:
    """Return the expressions that sort by a term, and whether they are never NULL.

    NULL comes before numbers, numbers before texts, texts in the order of their bytes.
    """
    match term:
        case FieldValue(path, field, Modifier.WHOLE | Modifier.EACH) if (
            field.column is not None and not field.is_multiple
        ):
            column = field.column
            value = TypedSql(
                scope.column_at(path, column.name), column.type, column.is_deterministic
            )
            not_null = column.not_null and path.is_scope_row
            match field.kind:
                case FieldKind.NUMBER | FieldKind.BOOL:
                    return [value.node], not_null
                case FieldKind.DATE:
                    date = value.node if is_alone else _in_milliseconds(value, column)
                    return [*_missing_row_first(path, scope), date], not_null
                case FieldKind.RELATION:
                    text = nodes.sortable_text(value)
                    return [*_missing_row_first(path, scope), text], not_null
                case FieldKind.TEXT | FieldKind.FILE:
                    return [nodes.sortable_text(value)], not_null
                case _:
                    pass
        case _:
            pass
    operand = translate_operand(term, scope)
    if operand.text is None:
        assert operand.number is not None
        return [operand.number], False
    text = nodes.in_byte_order(operand.text)
    if operand.number is None:
        return [text], False
    rank = nodes.case(
        (nodes.is_not_null(operand.number), nodes.number(1)),
        (nodes.is_not_null(operand.text), nodes.number(2)),
    )
    return [rank, operand.number, text], False


def _missing_row_first(path: RowPath, scope: Scope) -> list[Sql]:
    """Return what sorts a missing row before an empty value, which is NULL as well."""
    if path.is_scope_row:
        return []
    return [nodes.is_not_null(scope.row_id_at(path).node)]


def _in_milliseconds(date: TypedSql, column: Column) -> Sql:
    """Return the date as PocketBase stores it: rows of one millisecond are a tie."""
    # The modifier of a time is its number of decimals; that of a domain is the type's below it.
    is_rounded = column.type.domain_of is None and 0 <= column.type_modifier <= _MILLISECOND_DIGITS
    if is_rounded or date.type.base.name == "date":
        return date.node
    return nodes.call("date_trunc", nodes.string("milliseconds"), date.node)


def _has_id(key: TypedSql) -> Sql:
    """Return whether a row's key is the parameter ``id``, which its type accepts."""
    if key.id_parts:
        wanted = nodes.cast(nodes.placeholder("id"), nodes.TEXT)
        return nodes.equal_keys(key, TypedSql(wanted, key.type))
    native = native_key_type(key.type)
    if native is None or not key.is_deterministic:
        wanted = nodes.cast(nodes.placeholder("id"), nodes.TEXT)
        return nodes.binary(exp.EQ, nodes.bytewise_text(key), wanted)
    wanted = nodes.cast_to_type(nodes.placeholder("id"), key.type.base)
    return nodes.binary(exp.EQ, key.node, wanted)


def _named(expression: Sql, name: str) -> Sql:
    return exp.Alias(this=nodes.copy_if_attached(expression), alias=nodes.quoted_name(name))


def _bigint(name: str) -> Sql:
    return nodes.cast(nodes.placeholder(name), nodes.BIGINT)


def _paged(select: exp.Select, order: Sequence[exp.Ordered]) -> exp.Select:
    if order:
        select.set("order", exp.Order(expressions=list(order)))
    select.set("limit", exp.Limit(expression=_bigint("limit")))
    select.set("offset", exp.Offset(expression=_bigint("offset")))
    return select

"""The plain query per subscriber: what every faster way to decide is measured against.

One statement, parameters for everything that isn't the program's own, the row images as arrays of
texts. It knows no driver: whoever has one runs the ``Question`` and reads row numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlglot import exp

from pgrealtime.auth.principal import AuthRecord, Superuser
from pgrealtime.catalog.model import Column, Table
from pgrealtime.changes import Row, TableName
from pgrealtime.collections import Collection, Collections
from pgrealtime.errors import RuleError, RuleUnsupportedError
from pgrealtime.rules import sql
from pgrealtime.rules.ir import Predicate, parameters
from pgrealtime.rules.lower import ROW, Lowered, all_of, lower, negation
from pgrealtime.rules.parameters import Binding, render, shape, value
from pgrealtime.rules.request import Request
from pgrealtime.rules.resolve import resolve_filter, resolve_rule
from pgrealtime.rules.sql import Sql

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""Any moment: the class of a macro is the same at all of them."""


@dataclass(frozen=True, slots=True)
class Everyone:
    """No row needs to be asked about: all are admitted."""


@dataclass(frozen=True, slots=True)
class Nobody:
    """No row is admitted."""

    reason: str
    """For the log; says nothing about any row."""


@dataclass(frozen=True, slots=True)
class Question:
    """A statement to run read-only, with ``search_path`` at pg_catalog."""

    sql: str
    """In psycopg's format style, ``%(name)s``."""
    params: dict[str, object]
    """One result row per admitted row image, of one column: its 0-based index, in no order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A related table as it was before a transaction: what a delete is judged against."""

    table: Table
    before: Sequence[Row]
    """The first old image of each row that the transaction updated or deleted, whole."""
    touched: Sequence[Row]
    """Those rows and the inserted ones, the primary key's columns at least: not to be read live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What one subscriber may see of one collection."""

    collection: Collection
    request: Request
    lowered: tuple[Lowered, ...]
    """The rule and the filter, each a scope of its own; at least one of the two."""
    statement: str
    """What ``question`` asks, printed once."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row image that are read."""
        return _columns_of(self.lowered)

    @property
    def tables(self) -> frozenset[TableName]:
        """The tables that are read beside the row image."""
        return frozenset().union(*(part.tables for part in self.lowered))

    def question(self, rows: Sequence[Row], now: datetime) -> Question:
        """Return the query for the admitted ones of some row images.

        A row that lacks a column which is read is not asked about, and so not admitted.

        Args:
            rows: Images of rows of the collection's table, in text form.
            now: What macros mean; with its zone.
        """
        return Question(self.statement, self._params(rows, now))

    def question_before(
        self, rows: Sequence[Row], now: datetime, overlays: Sequence[Overlay]
    ) -> Question | None:
        """Return the same query with related tables as they were before a transaction.

        Returns:
            None if an old image lacks a column that is read: then nothing can be admitted.
        """
        conditions = [part.condition for part in self.lowered]
        if not all(_covers(overlay, conditions) for overlay in overlays):
            return None
        params = self._params(rows, now)
        names: dict[TableName, str] = {}
        views: list[exp.CTE] = []
        for index, overlay in enumerate(overlays):
            if read := _columns_read(conditions, overlay.table):
                names[overlay.table.name] = f"before{index}"
                views.append(_view(f"before{index}", overlay, read, params))
        redirected = [_redirected(condition, names) for condition in conditions]
        return Question(_statement(self.collection, self.columns, redirected, views), params)

    def _params(self, rows: Sequence[Row], now: datetime) -> dict[str, object]:
        columns = self.columns
        known = [
            (index, row)
            for index, row in enumerate(rows)
            if all(column in row for column in columns)
        ]
        params: dict[str, object] = {"i": [index for index, _ in known]}
        for at, column in enumerate(columns):
            params[f"c{at}"] = [row[column] for _, row in known]
        for part in self.lowered:
            params |= _rendered(part.bindings, self.request, now)
        return params


def reference(
    collections: Collections, collection: Collection, rule: str | None, request: Request
) -> Everyone | Nobody | Reference:
    """Return what decides which rows of the collection the subscriber may see.

    Args:
        collections: All there are.
        collection: The one whose rows are judged.
        rule: The collection's rule for the topic; None is for superusers only.
        request: The subscriber; a filter is ``request.query["filter"]``.

    Raises:
        RuleError: The rule is bad for everybody. One that is bad only for subscribers of this
            kind, and a bad filter, admit nobody.
    """
    predicates: list[Predicate] = []
    auth = auth_collection(collections, request)
    is_superuser = isinstance(request.principal, Superuser)
    if not is_superuser:
        if rule is None:
            return Nobody("the rule is for superusers only")
        if rule:
            try:
                predicates.append(resolve_rule(rule, collections, collection, auth))
            except RuleError as error:
                validate(collections, collection, rule)
                return Nobody(f"the rule doesn't hold for this subscriber: {error}")
    text = request.query.get("filter", "")
    try:
        if text:
            predicates.append(
                resolve_filter(text, collections, collection, auth, is_superuser=is_superuser)
            )
        return _translated(collections, collection, predicates, request)
    except RuleError as error:
        return Nobody(f"the filter is refused: {error}" if text else str(error))


def validate(collections: Collections, collection: Collection, rule: str) -> None:
    """Check a rule as it is when it is set, for a subscriber of any kind.

    Raises:
        RuleError: It can't be used; with its place.
    """
    if not rule:
        return
    guest = Request()
    checked = resolve_rule(rule, collections, collection, None)
    _translated(collections, collection, [checked], guest)
    for auth in collections.values():
        if auth.type == "auth" and "@request.auth." in rule:
            _check_support(collections, collection, rule, auth)


def _check_support(
    collections: Collections, collection: Collection, rule: str, auth: Collection
) -> None:
    """Refuse what can't be decided for this kind; what PocketBase too finds wrong only denies."""
    guest = Request()
    try:
        checked = resolve_rule(rule, collections, collection, auth)
        _translated(collections, collection, [checked], guest)
    except RuleUnsupportedError:
        raise
    except RuleError:
        return


def _translated(
    collections: Collections,
    collection: Collection,
    predicates: Sequence[Predicate],
    request: Request,
) -> Everyone | Reference:
    if not predicates:
        return Everyone()
    lowered = []
    for prefix, predicate in zip("pf", predicates, strict=False):
        shapes = {
            parameter: shape(value(parameter, request, _EPOCH))
            for parameter in parameters(predicate.where)
        }
        lowered.append(lower(predicate, collections, shapes, prefix=prefix))
    conditions = [part.condition for part in lowered]
    return Reference(
        collection=collection,
        request=request,
        lowered=tuple(lowered),
        statement=_statement(collection, _columns_of(lowered), conditions, []),
    )


def auth_collection(collections: Collections, request: Request) -> Collection | None:
    """Return the collection of the subscriber's record; None for others, or if there is none."""
    match request.principal:
        case AuthRecord() as record:
            found = collections.find(record.collection_name)
            return collections.find(record.collection_id) if found is None else found
        case _:
            return None


def _rendered(
    bindings: Mapping[str, Binding], request: Request, now: datetime
) -> dict[str, object]:
    return {
        key: render(value(binding.parameter, request, now), binding.form)
        for key, binding in bindings.items()
    }


# --- rows as SQL


def _columns_of(lowered: Sequence[Lowered]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in lowered for name in part.columns))


def _statement(
    collection: Collection,
    names: Sequence[str],
    conditions: Sequence[Sql],
    views: Sequence[exp.CTE],
) -> str:
    """Print the query for the rows that meet all conditions."""
    columns = [_column(collection.table, name) for name in names]
    ordinal = _free_name(columns)
    select = exp.Select(
        expressions=[sql.column(ROW, ordinal)],
        from_=exp.From(this=_images(columns, ordinal)),
        where=exp.Where(this=all_of(*conditions)),
    )
    if views:
        select.set("with_", exp.With(expressions=list(views)))
    return select.sql(dialect="postgres", copy=False)


def _column(table: Table, name: str) -> Column:
    column = table.column(name)
    assert column is not None
    return column


def _free_name(taken: Sequence[Column]) -> str:
    """Return a name for the ordinal that no column has."""
    name = "ordinal"
    while any(column.name == name for column in taken):
        name += "_"
    return name


def _images(columns: Sequence[Column], ordinal: str) -> Sql:
    """Return the row images as a derived table with the names and types of the table's columns."""
    raw = "k"
    names = [f"c{at}" for at in range(len(columns))]
    arrays = [sql.cast(sql.placeholder("i"), "int[]")]
    arrays += [sql.cast(sql.placeholder(name), "text[]") for name in names]
    select = exp.Select(
        expressions=[sql.column(raw, ordinal), *_typed(raw, names, columns)],
        from_=exp.From(this=_unnested(raw, [ordinal, *names], arrays)),
    )
    return exp.Subquery(this=select, alias=exp.TableAlias(this=sql.name(ROW)))


def _unnested(alias: str, names: Sequence[str], arrays: Sequence[Sql]) -> Sql:
    columns = [sql.name(name) for name in names]
    return exp.Unnest(
        expressions=list(arrays), alias=exp.TableAlias(this=sql.name(alias), columns=columns)
    )


def _typed(raw: str, names: Sequence[str], columns: Sequence[Column]) -> list[Sql]:
    return [
        exp.Alias(this=sql.typed(sql.column(raw, name), column.type), alias=sql.name(column.name))
        for name, column in zip(names, columns, strict=True)
    ]


# --- related tables as they were


def _rows_of(conditions: Sequence[Sql], table: TableName) -> set[str]:
    """Return the aliases under which the conditions read the table."""
    name, schema = sql.name(table.name).name, sql.name(table.schema).name
    return {
        node.alias
        for condition in conditions
        for node in condition.find_all(exp.Table)
        if (node.name, node.db) == (name, schema)
    }


def _columns_read(conditions: Sequence[Sql], table: Table) -> list[Column]:
    """Return the columns of the table that the conditions read."""
    aliases = _rows_of(conditions, table.name)
    read = {
        node.name
        for condition in conditions
        for node in condition.find_all(exp.Column)
        if node.table in aliases
    }
    return [column for column in table.columns if sql.name(column.name).name in read]


def _covers(overlay: Overlay, conditions: Sequence[Sql]) -> bool:
    """Whether the old images hold all that is read, and the keys are known."""
    read = _columns_read(conditions, overlay.table)
    return (bool(overlay.table.primary_key) or not _rows_of(conditions, overlay.table.name)) and (
        all(column.name in row for row in overlay.before for column in read)
        and all(key in row for row in overlay.touched for key in overlay.table.primary_key)
    )


def _redirected(condition: Sql, names: Mapping[TableName, str]) -> Sql:
    """Return the condition reading other relations in place of some tables."""
    copied = condition.copy()
    wanted = {
        (sql.name(table.name).name, sql.name(table.schema).name): name
        for table, name in names.items()
    }
    for node in list(copied.find_all(exp.Table)):
        name = wanted.get((node.name, node.db))
        if name is not None:
            alias = exp.TableAlias(this=sql.name(node.alias))
            node.replace(exp.Table(this=sql.name(name), alias=alias))
    return copied


def _view(
    name: str, overlay: Overlay, columns: Sequence[Column], params: dict[str, object]
) -> exp.CTE:
    """Return the table as it was, and put the old images into the statement's parameters."""
    keys = [_column(overlay.table, key) for key in overlay.table.primary_key]
    old_names = [f"{name}_c{at}" for at in range(len(columns))]
    key_names = [f"{name}_k{at}" for at in range(len(keys))]
    for key, column in zip(old_names, columns, strict=True):
        params[key] = [row[column.name] for row in overlay.before]
    for key, column in zip(key_names, keys, strict=True):
        params[key] = [row[column.name] for row in overlay.touched]
    old = exp.Select(
        expressions=_typed("k", old_names, columns),
        from_=exp.From(this=_unnested("k", old_names, _arrays(old_names))),
    )
    is_touched = exp.Select(
        expressions=[sql.number(1)],
        from_=exp.From(this=_unnested("g", key_names, _arrays(key_names))),
        where=exp.Where(
            this=all_of(
                *(
                    sql.equal_keys(
                        sql.column("t", column.name),
                        column.type,
                        sql.typed(sql.column("g", key), column.type),
                        column.type,
                    )
                    for key, column in zip(key_names, keys, strict=True)
                )
            )
        ),
    )
    live = exp.Select(
        expressions=[sql.column("t", column.name) for column in columns],
        from_=exp.From(this=sql.table(overlay.table.name, "t")),
        where=exp.Where(this=negation(exp.Exists(this=is_touched))),
    )
    union = exp.Union(this=old, expression=live, distinct=False)
    return exp.CTE(this=union, alias=exp.TableAlias(this=sql.name(name)))


def _arrays(names: Sequence[str]) -> list[Sql]:
    return [sql.cast(sql.placeholder(name), "text[]") for name in names]

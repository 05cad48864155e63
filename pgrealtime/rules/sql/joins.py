"""One FROM clause in the making: which row stands for which place, joined on demand.

All leaves of a scope share the joins of equal places: that is what makes two ``?`` comparisons
over one path speak of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from sqlglot import exp

from pgrealtime.catalog.model import Column, Type
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.rules.language.parameters import (
    AuthColumn,
    Binding,
    Form,
    Parameter,
    RequestValue,
    Shape,
)
from pgrealtime.rules.language.predicate import (
    AllRows,
    AuthRow,
    Back,
    Here,
    Items,
    Place,
    Step,
    ToItem,
    ToOne,
)
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.nodes import Sql, Typed, typed_column

_On: TypeAlias = Callable[[str], Sql]
"""Makes the condition of a join, given the alias of the joined row."""

MAX_JOINS = 300
"""Of one rule or filter, those that look for counter-examples included.

PocketBase has no limit; a filter of many long paths would cost whoever plans it seconds.
"""

AUTH_ID = RequestValue(("auth", "id"))
"""What finds the subscriber's own row."""


@dataclass(slots=True, kw_only=True)
class Statement:
    """What all scopes of one statement share."""

    collections: Collections
    shapes: Mapping[Parameter, Shape]
    prefix: str = "p"
    """Of the placeholders' names."""
    is_own_bound: bool = False
    """Columns of the subscriber's own row are parameters, and not read."""
    bindings: dict[str, Binding] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)
    """Columns read of the judged row, in order of first use."""
    tables: dict[TableName, None] = field(default_factory=dict)
    """Tables read beside it."""
    aliases: int = 0
    joins: int = 0

    def bind(self, parameter: Parameter | AuthColumn, form: Form) -> Sql:
        """Return the placeholder of a parameter in a form, cast to the form's type."""
        binding = Binding(parameter, form)
        key = next((key for key, known in self.bindings.items() if known == binding), None)
        if key is None:
            key = f"{self.prefix}{len(self.bindings)}"
            self.bindings[key] = binding
        return nodes.cast(nodes.placeholder(key), _TYPES[form])

    def given(self, node: Sql, body: Callable[[Sql], Sql]) -> Sql:
        """Return an expression that uses another one many times and holds it once."""
        alias = self.alias()
        row = exp.Subquery(
            this=nodes.one_row({"v": node}), alias=exp.TableAlias(this=nodes.name(alias))
        )
        select = exp.Select(
            expressions=[nodes.own(body(nodes.column(alias, "v")))], from_=exp.From(this=row)
        )
        return exp.Subquery(this=select)

    def alias(self) -> str:
        """Return a name that no other row of the statement has."""
        self.aliases += 1
        return f"j{self.aliases}"


_TYPES = {
    Form.TEXT: "text",
    Form.NUMBER: "text",
    Form.PATTERN: "text",
    Form.UUID: "uuid",
    Form.INTEGER: "bigint",
    Form.JSON: "text",
}


class Scope:
    """The rows that the conditions of one SELECT speak of.

    Args:
        statement: What it is part of.
        here: Alias of the row that the rule is about; it belongs to an outer query.
        is_judged: That row is the changed one, whose columns come from the stream.
    """

    def __init__(self, statement: Statement, here: str, *, is_judged: bool) -> None:
        self.statement = statement
        self.here = here
        self.is_judged = is_judged
        self._rows: dict[Place, str] = {}
        self._values: dict[Place, Typed] = {}
        self._joins: list[exp.Join] = []
        self._named: dict[object, str] = {}

    @property
    def has_joins(self) -> bool:
        """Whether anything but the row itself is read."""
        return bool(self._joins)

    def fresh(self) -> Scope:
        """Return a scope about the same row with no joins yet."""
        return Scope(self.statement, self.here, is_judged=self.is_judged)

    def collection(self, place: Place) -> Collection:
        """The collection whose rows are found at the place."""
        return self.statement.collections[place.collection]

    def column(self, place: Place, column_name: str) -> Sql:
        """Return a column of the row at the place."""
        if place.is_here and self.is_judged:
            self.statement.columns.setdefault(column_name)
        if self.statement.is_own_bound and isinstance(place.origin, AuthRow) and not place.steps:
            return self._own_column(self.collection(place), column_name)
        return nodes.column(self.row(place), column_name)

    def _own_column(self, collection: Collection, column_name: str) -> Sql:
        """Return a column of the subscriber's own row as it is known."""
        found = collection.table.column(column_name)
        assert found is not None
        parameter = AUTH_ID if found == collection.key else AuthColumn(column_name)
        return nodes.typed(self.statement.bind(parameter, Form.TEXT), found.type)

    def is_there(self, collection: Collection) -> Sql:
        """Return whether the subscriber's own row can be read.

        The id is one of that very table's, so it is of the key's type and its index serves.
        """
        alias, key = self.statement.alias(), collection.key
        row = self._table(collection.table.name, alias)
        own = typed_column(alias, key)
        known = nodes.typed(self.statement.bind(AUTH_ID, Form.TEXT), key.type)
        is_own = nodes.equal_keys(own, replace(own, node=known))
        select = exp.Select(
            expressions=[nodes.number(1)], from_=exp.From(this=row), where=exp.Where(this=is_own)
        )
        return exp.Exists(this=select)

    def key(self, place: Place) -> Typed:
        """Return the id of the row at the place, NULL where there is none."""
        return self._typed(place, self.collection(place).key)

    def _typed(self, place: Place, column: Column) -> Typed:
        return Typed(self.column(place, column.name), column.type, column.is_deterministic)

    def item(self, place: Place) -> Typed:
        """Return one of the values of a multiple field; the place ends with Items."""
        self.row(place)
        return self._values[place]

    def row(self, place: Place) -> str:
        """Return the alias of the row at the place, joining what leads there."""
        if place.is_here:
            return self.here
        if place not in self._rows:
            self._rows[place] = self._join(place)
        return self._rows[place]

    def named(self, what: object, columns: Callable[[], Mapping[str, Sql]]) -> Callable[[str], Sql]:
        """Compute expressions once per row of the scope, however often they are used.

        Args:
            what: What they are; the same thing is not computed twice.
            columns: Makes the expressions; called only if there are none yet.

        Returns:
            What gives each by its name.
        """
        if what not in self._named:
            made = columns()
            alias = self._named[what] = self.statement.alias()
            row = exp.Subquery(this=nodes.one_row(made))
            named = exp.TableAlias(this=nodes.name(alias))
            self._add(exp.Lateral(this=row, alias=named), nodes.truth(True))
        alias = self._named[what]
        return lambda column_name: nodes.column(alias, column_name)

    def exists(self, where: Sql) -> Sql:
        """Return EXISTS over the joins made so far; they all are LEFT JOINs of one row."""
        return exp.Exists(this=self.select(nodes.number(1), where))

    def select(self, what: Sql, where: Sql) -> exp.Select:
        """Return a SELECT over the joins made so far."""
        one = exp.Subquery(
            this=exp.Select(expressions=[nodes.number(1)]),
            alias=exp.TableAlias(this=nodes.name("one")),
        )
        return exp.Select(
            expressions=[nodes.own(what)],
            from_=exp.From(this=one),
            joins=[nodes.own(join) for join in self._joins],
            where=exp.Where(this=nodes.own(where)),
        )

    # --- joins

    def _join(self, place: Place) -> str:
        if not place.steps:
            return self._join_origin(place)
        before = Place(place.origin, place.steps[:-1])
        return self._join_step(place, before, place.steps[-1])

    def _join_origin(self, place: Place) -> str:
        collection = self.collection(place)
        match place.origin:
            case AuthRow():
                return self._left_join(collection, self._is_auth_id(collection))
            case AllRows():
                return self._left_join(collection, lambda _: nodes.truth(True))
            case Here():
                raise AssertionError("the row itself is no join")

    def _is_auth_id(self, collection: Collection) -> _On:
        bind, key = self.statement.bind, collection.key

        def on(alias: str) -> Sql:
            own = typed_column(alias, key)
            native = native_form(key.type)
            if native is None:
                return nodes.binary(exp.EQ, nodes.plain_text(own), bind(AUTH_ID, Form.TEXT))
            return nodes.binary(exp.EQ, own.node, bind(AUTH_ID, native))

        return on

    def _join_step(self, place: Place, before: Place, step: Step) -> str:
        match step:
            case ToOne(field, name):
                assert field.column is not None
                return self._join_by_key(name, self._typed(before, field.column))
            case Items(field):
                return self._join_items(place, before, field)
            case ToItem(name):
                return self._join_by_key(name, self.item(before))
            case Back(name, field):
                return self._join_back(before, self.statement.collections[name], field)

    def _join_by_key(self, name: str, source: Typed) -> str:
        target = self.statement.collections[name]
        return self._left_join(
            target, lambda alias: nodes.equal_keys(typed_column(alias, target.key), source)
        )

    def _join_items(self, place: Place, before: Place, field: Field) -> str:
        junction = None if field.relation is None else field.relation.junction
        alias = self.statement.alias()
        if junction is not None:
            source = junction.table.column(junction.source)
            target = junction.table.column(junction.target)
            assert source is not None
            assert target is not None
            self._add(
                self._table(junction.table.name, alias),
                nodes.equal_keys(typed_column(alias, source), self.key(before)),
            )
            self._values[place] = typed_column(alias, target)
            return alias
        assert field.column is not None
        element = field.type.base.element
        assert element is not None
        unnest = exp.Unnest(expressions=[self.column(before, field.column.name)])
        columns = exp.TableAlias(this=nodes.name(alias), columns=[nodes.name("value")])
        self._add(exp.Lateral(this=unnest, alias=columns), nodes.truth(True))
        item = nodes.column(alias, "value")
        self._values[place] = Typed(item, element, field.column.is_deterministic)
        return alias

    def _join_back(self, before: Place, source: Collection, field: Field) -> str:
        key = self.key(before)
        junction = None if field.relation is None else field.relation.junction
        if junction is not None:
            return self._join_back_through(key, source, field)
        assert field.column is not None
        column = field.column
        if not field.is_multiple:
            return self._left_join(
                source, lambda alias: nodes.equal_keys(typed_column(alias, column), key)
            )
        return self._left_join(source, lambda alias: _contains(typed_column(alias, column), key))

    def _join_back_through(self, key: Typed, source: Collection, field: Field) -> str:
        assert field.relation is not None
        junction = field.relation.junction
        assert junction is not None
        near = junction.table.column(junction.target)
        far = junction.table.column(junction.source)
        assert near is not None
        assert far is not None
        pairs = self.statement.alias()
        self._add(
            self._table(junction.table.name, pairs),
            nodes.equal_keys(typed_column(pairs, near), key),
        )
        return self._left_join(
            source,
            lambda alias: nodes.equal_keys(
                typed_column(alias, source.key), typed_column(pairs, far)
            ),
        )

    def _left_join(self, collection: Collection, on: _On) -> str:
        alias = self.statement.alias()
        condition = on(alias)
        self._add(self._table(collection.table.name, alias), condition)
        return alias

    def _table(self, table_name: TableName, alias: str) -> exp.Table:
        self.statement.tables.setdefault(table_name)
        return nodes.table(table_name, alias)

    def _add(self, row: Sql, on: Sql) -> None:
        self.statement.joins += 1
        if self.statement.joins > MAX_JOINS:
            raise RuleUnsupportedError(
                f"more than {MAX_JOINS} joins in one expression", start=0, end=0
            )
        self._joins.append(exp.Join(this=row, side="LEFT", on=nodes.own(on)))


def native_form(type_: Type) -> Form | None:
    """Return the form in which a text compares with an id by the id's own operator, if any."""
    base = type_.base
    if base.schema != "pg_catalog":
        return None
    return {
        "uuid": Form.UUID,
        "int2": Form.INTEGER,
        "int4": Form.INTEGER,
        "int8": Form.INTEGER,
    }.get(base.name)


def _contains(array: Typed, key: Typed) -> Sql:
    """Return whether the array holds the id; by ``@>``, which a GIN index serves, if it can."""
    element = array.type.base.element
    assert element is not None
    is_deterministic = array.is_deterministic and key.is_deterministic
    is_native = element.oid == key.type.base.oid and element.schema == "pg_catalog"
    if is_native and is_deterministic:
        wanted = exp.Array(expressions=[nodes.own(nodes.of_base(key))])
        return exp.ArrayContainsAll(this=nodes.own(array.node), expression=wanted)
    values = exp.Any(this=exp.Paren(this=nodes.cast(array.node, "text[]")))
    return exp.EQ(this=nodes.collated(nodes.cast(key.node, nodes.TEXT)), expression=values)

"""Builds sqlglot nodes: quoted, typed, copied. Used by all modules of ``rules.sql``.

A sqlglot node belongs to one tree. Each function here therefore copies an argument that is part of
a tree already, so that callers can use an expression as often as they like. ``%`` is doubled
wherever it isn't a placeholder's, because the driver reads the printed text as a format. Texts are
compared by bytes: a nondeterministic collation alone never decides.

``exp.And``, ``exp.Or`` and ``exp.Not`` are made here only, since bare ones print no brackets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from sqlglot import exp

from pgrealtime.catalog.model import Column, Table, Type, TypeKind
from pgrealtime.catalog.record_ids import table_with_id
from pgrealtime.changes import ID_ESCAPES, TableName

Sql: TypeAlias = exp.Expr
Operand: TypeAlias = Sql | str | float
"""A node, or a text, number or boolean of the program; texts of rules are bound by placeholders."""

ROW_ALIAS = "r"
"""Alias of the row image that a condition is about, in every statement."""

TEXT = "text"
DOUBLE = "double precision"
BIGINT = "bigint"
NUMERIC = "numeric"
"""The type of numbers with all their digits; an integer type is as exact."""
TIMESTAMP = "timestamp"

_CAST_TYPES = {
    TEXT: exp.DataType.Type.TEXT,
    DOUBLE: exp.DataType.Type.DOUBLE,
    BIGINT: exp.DataType.Type.BIGINT,
    TIMESTAMP: exp.DataType.Type.TIMESTAMP,
    "int": exp.DataType.Type.INT,
    "boolean": exp.DataType.Type.BOOLEAN,
    "uuid": exp.DataType.Type.UUID,
    "jsonb": exp.DataType.Type.JSONB,
    "interval": exp.DataType.Type.INTERVAL,
    NUMERIC: exp.DataType.Type.DECIMAL,
    "jsonpath": exp.DataType.Type.USERDEFINED,
}


@dataclass(frozen=True, slots=True)
class TypedSql:
    """An expression with its PostgreSQL type."""

    node: Sql
    type: Type
    is_deterministic: bool = True
    """Whether its collation is, as ``catalog.model.Column`` has it."""
    id_parts: tuple[TypedSql, ...] = ()
    """Of the computed id of a table's row: the columns of which it is made."""


def typed_column(alias: str, table_column: Column) -> TypedSql:
    """Return ``"alias"."column"`` with its type; the column is one of a table, or of a view."""
    typed = TypedSql(
        column(alias, table_column.name), table_column.type, table_column.is_deterministic
    )
    if not table_column.type.id_parts:
        return typed
    pairs = zip(table_column.id_sources, table_column.type.id_parts, strict=True)
    return replace(typed, id_parts=tuple(TypedSql(column(alias, n), type_) for n, type_ in pairs))


def copy_if_attached(node: Sql) -> Sql:
    """Return the node if it is part of no tree, else a copy."""
    return node if node.parent is None else node.copy()


def _node(operand: Operand) -> Sql:
    match operand:
        case bool():
            return boolean(operand)
        case str():
            return string(operand)
        case int() | float():
            return number(operand)
        case _:
            return copy_if_attached(operand)


def quoted_name(text: str) -> exp.Identifier:
    """Return a quoted identifier."""
    return exp.to_identifier(_escape_percent(text), quoted=True)


def column(alias: str, column_name: str) -> Sql:
    """Return ``"alias"."column"``."""
    return exp.Column(this=quoted_name(column_name), table=quoted_name(alias))


def table(read: Table, alias: str) -> exp.Table:
    """Return ``"schema"."table" AS "alias"``; in place of a table with a computed id a SELECT."""
    schema, name = map(quoted_name, read.name)
    if read.id_column is None:
        return exp.Table(this=name, db=schema, alias=row_alias(alias))
    computed = exp.Table(this=exp.Var(this=table_with_id(read)), alias=row_alias(alias))
    computed.meta[_TABLE_NAME] = schema.name, name.name
    return computed


_TABLE_NAME = "pgrealtime_table"


def names_table(node: exp.Table, table_name: TableName) -> bool:
    """Return whether a node made by ``table`` reads the table."""
    schema, name = map(quoted_name, table_name)
    named: object = node.meta.get(_TABLE_NAME, (node.db, node.name))
    return named == (schema.name, name.name)


def row_alias(name: str, *column_names: str) -> exp.TableAlias:
    """Return ``"name"("column", ...)``, the alias of a relation and of its columns."""
    return exp.TableAlias(this=quoted_name(name), columns=[quoted_name(c) for c in column_names])


def select(
    expressions: Sequence[Sql],
    row: Sql,
    *,
    joins: Sequence[exp.Join] = (),
    where: Sql | None = None,
) -> exp.Select:
    """Return a SELECT from a relation."""
    return exp.Select(
        expressions=list(expressions),
        from_=exp.From(this=row),
        joins=list(joins),
        where=None if where is None else exp.Where(this=copy_if_attached(where)),
    )


def exists(row: Sql, where: Sql) -> Sql:
    """Return EXISTS of a row that meets the condition."""
    return exp.Exists(this=select([number(1)], row, where=where))


def to_text(select: exp.Select, ctes: Sequence[exp.CTE] = ()) -> str:
    """Return the text of a statement, with psycopg's placeholders; the nodes are used up."""
    if ctes:
        select.set("with_", exp.With(expressions=list(ctes)))
    return select.sql(dialect="postgres", copy=False)


def placeholder(key: str) -> Sql:
    """Return ``%(key)s``."""
    return exp.Placeholder(this=key)


def string(text: str) -> Sql:
    """Return a text literal of the program."""
    return exp.Literal.string(_escape_percent(text))


def number(value: float) -> Sql:
    """Return a number literal of the program."""
    return exp.Literal.number(value) if value >= 0 else exp.Neg(this=exp.Literal.number(-value))


def null(type_: str = TEXT) -> Sql:
    """Return NULL of a type."""
    return cast(exp.Null(), type_)


def boolean(is_true: bool) -> Sql:  # noqa: FBT001 (the value itself)
    """Return TRUE or FALSE."""
    return exp.Boolean(this=is_true)


def cast(node: Operand, type_: str) -> Sql:
    """Return the node cast to one of ``_CAST_TYPES``, or to an array of one, as ``text[]``."""
    element = type_.removesuffix("[]")
    target = exp.DataType(this=_CAST_TYPES[element], kind=element)
    if element != type_:
        target = exp.DataType(this=exp.DataType.Type.ARRAY, expressions=[target], nested=True)
    return exp.Cast(this=_node(node), to=target)


def cast_to_type(node: Sql, type_: Type) -> Sql:
    """Return the node cast to any type of the database, named with its schema."""
    names = (quoted_name(name).sql("postgres") for name in (type_.schema, type_.name))
    target = exp.DataType(this=exp.DataType.Type.USERDEFINED, kind=".".join(names))
    return exp.Cast(this=copy_if_attached(node), to=target)


def call(function: str, *args: Operand) -> Sql:
    """Return a call of a function of pg_catalog."""
    return exp.Anonymous(this=function, expressions=[_node(arg) for arg in args])


def call_in_schema(schema: str, function: str, *args: Operand) -> Sql:
    """Return a call of a function of another schema."""
    return exp.Dot(this=quoted_name(schema), expression=call(function, *args))


def case(*whens: tuple[Sql, Operand], default: Operand | None = None) -> Sql:
    """Return CASE. Without a default it is NULL where no condition is true."""
    ifs = [exp.If(this=copy_if_attached(when), true=_node(then)) for when, then in whens]
    return exp.Case(ifs=ifs, default=None if default is None else _node(default))


def one_row(alias: str | None, columns: Mapping[str, Sql]) -> Sql:
    """Return a derived table of one row.

    OFFSET 0 keeps the planner from computing a column's expression anew wherever it is used.
    """
    projections = [
        exp.Alias(this=copy_if_attached(node), alias=quoted_name(key))
        for key, node in columns.items()
    ]
    row = exp.Select(expressions=projections, offset=exp.Offset(expression=number(0)))
    return exp.Subquery(this=row, alias=None if alias is None else row_alias(alias))


def is_null(node: Sql) -> Sql:
    """Return ``node IS NULL``."""
    return exp.Is(this=copy_if_attached(node), expression=exp.Null())


def binary(kind: type[exp.Binary], left: Operand, right: Operand) -> Sql:
    """Return an operator between two operands, each in brackets if it is an operator itself."""
    return kind(this=_parenthesized(left), expression=_parenthesized(right))


def collate_c(node: Sql) -> Sql:
    """Return the text compared byte by byte."""
    return exp.Collate(this=_parenthesized(node), expression=quoted_name("C"))


def matches_regex(node: Sql, regex: str) -> Sql:
    """Return ``node ~ 'regex'``."""
    return exp.RegexpLike(this=_parenthesized(node), expression=string(regex))


def concatenate(*texts: Operand) -> Sql:
    """Return ``text || text ...``; NULL if one is."""
    first, *rest = map(_node, texts)
    for part in rest:
        first = exp.DPipe(this=first, expression=part)
    return exp.Paren(this=first)


def coalesce(node: Sql, default: Operand) -> Sql:
    """Return ``COALESCE(node, default)``."""
    return exp.Coalesce(this=copy_if_attached(node), expressions=[_node(default)])


def in_utc(node: Sql) -> Sql:
    """Return ``node AT TIME ZONE 'UTC'``."""
    return exp.AtTimeZone(this=_parenthesized(node), zone=string("UTC"))


def equal_keys(left: TypedSql, right: TypedSql) -> Sql:
    """Return equality of two ids by the operator that their indexes support, else as texts.

    Under a nondeterministic collation the operator finds candidates and the bytes decide. Operators
    of types outside pg_catalog aren't on the search path and are named with the schema; to citext a
    row is found as its foreign keys find it. A computed id is found by the columns it is made of.
    """
    if left.id_parts or right.id_parts:
        computed, other = (left, right) if left.id_parts else (right, left)
        is_equal = binary(exp.EQ, computed.node, cast(other.node, TEXT))
        return all_of(*id_part_conditions(computed, other.node), is_equal)
    native = _native_equality(left, right)
    if native is not None and left.is_deterministic and right.is_deterministic:
        return native
    bytewise = binary(exp.EQ, collate_c(cast(left.node, TEXT)), cast(right.node, TEXT))
    return bytewise if native is None else all_of(native, bytewise)


def _native_equality(left: TypedSql, right: TypedSql) -> Sql | None:
    left_type, right_type = left.type.base, right.type.base
    is_same = left_type.oid == right_type.oid
    if is_same and left_type.schema != "pg_catalog" and left_type.kind is TypeKind.BASE:
        left_node, right_node = copy_if_attached(left.node), copy_if_attached(right.node)
        operator = f"{quoted_name(left_type.schema).sql('postgres')}.="
        return exp.Operator(this=left_node, operator=operator, expression=right_node)
    if is_same and left_type.kind is TypeKind.ENUM:
        return binary(exp.EQ, cast_to_base_type(left), cast_to_base_type(right))
    if is_same or any({left_type.name, right_type.name} <= family for family in _OPERATOR_FAMILIES):
        return binary(exp.EQ, left.node, right.node)
    return None


def id_part_conditions(computed: TypedSql, record_id: Sql) -> list[Sql]:
    """Return conditions on the columns of a computed id, which an index of these serves.

    All are true where it equals ``record_id``, any text.
    """
    conditions = []
    for number_, part in enumerate(computed.id_parts, 1):
        text = call("split_part", cast(record_id, TEXT), string("~"), number(number_))
        value = _id_part_value(text, part.type.base)
        if value is not None:
            conditions.append(binary(exp.EQ, part.node, value))
    return conditions


def _id_part_value(text: Sql, type_: Type) -> Sql | None:
    """Return a text as a value of its type, NULL if it is none; None for types without."""
    if type_.schema != "pg_catalog":
        return None
    match type_.name:
        case "int2" | "int4" | "int8":
            wide = cast(text, NUMERIC)
            bounds = (binary(exp.GTE, wide, -(1 << 63)), binary(exp.LTE, wide, (1 << 63) - 1))
            # Of nested CASEs the inner one is evaluated only where the outer one allows.
            in_range = case((all_of(*bounds), cast(text, BIGINT)))
            return case((matches_regex(text, "^(0|-?[1-9][0-9]{0,18})$"), in_range))
        case "uuid":
            is_uuid = matches_regex(text, "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
            return case((is_uuid, cast(text, "uuid")))
        case "text" | "varchar":
            for character, escape in reversed(ID_ESCAPES):
                text = call("replace", text, string(escape), string(character))
            return text
        case _:
            return None


_OPERATOR_FAMILIES = ({"int2", "int4", "int8"}, {"text", "varchar"})
"""Built-in types whose values compare with one another within one operator family."""


def cast_to_base_type(expression: TypedSql) -> Sql:
    """Return the expression cast to its domain's base type, for operators of enums and arrays."""
    type_ = expression.type
    return expression.node if type_.domain_of is None else cast_to_type(expression.node, type_.base)


def bytewise_text(expression: TypedSql) -> Sql:
    """Return a value as text that compares by bytes.

    char(n) loses its padding; citext and nondeterministic collations distinguish case again.
    """
    base = expression.type.base
    if is_inet(base):  # whose cast to text adds what its output leaves out, "/32"
        return call("textin", call("inet_out", expression.node))
    is_text = base.schema == "pg_catalog" and base.name in {"text", "varchar"}
    text = expression.node if is_text else cast(expression.node, TEXT)
    return text if expression.is_deterministic else collate_c(text)


def is_inet(base: Type) -> bool:
    """Return whether it is the built-in type ``inet``."""
    return base.schema == "pg_catalog" and base.name == "inet"


# --- order


def ordered(node: Sql, *, is_descending: bool = False, not_null: bool = False) -> exp.Ordered:
    """Return a sort expression with NULL first if it ascends, last if it descends.

    PostgreSQL's default is the opposite. With ``not_null`` the clause is left out, so that an
    ordinary index gives the order.
    """
    nulls_first = is_descending if not_null else not is_descending
    return exp.Ordered(this=copy_if_attached(node), desc=is_descending, nulls_first=nulls_first)


def sortable_text(value: TypedSql) -> Sql:
    """Return a text, or what is shown as one, for sorting: by its bytes.

    Whole numbers sort by value, since the ids of existing tables are numbered; uuids sort alike as
    what they are, and an index serves that.
    """
    base = value.type.base
    if base.schema == "pg_catalog" and base.name in {"int2", "int4", "int8", "uuid"}:
        return value.node
    return in_byte_order(bytewise_text(value))


def in_byte_order(text: Sql) -> Sql:
    """Return a text expression that sorts by its bytes, whatever its collation."""
    return text if isinstance(text, exp.Collate) else collate_c(text)


# --- connectives


def all_of(*conditions: Sql) -> Sql:
    """Return the conjunction, with brackets where they are needed."""
    return exp.and_(*map(copy_if_attached, conditions), copy=False)


def any_of(*conditions: Sql) -> Sql:
    """Return the disjunction, with brackets where they are needed."""
    return exp.or_(*map(copy_if_attached, conditions), copy=False)


def negation(condition: Sql) -> Sql:
    """Return NOT; unknown stays unknown."""
    return exp.not_(exp.Paren(this=copy_if_attached(condition)), copy=False)


def is_not_null(node: Sql) -> Sql:
    """Return ``node IS NOT NULL``."""
    return exp.not_(is_null(node), copy=False)


def _parenthesized(operand: Operand) -> Sql:
    node = _node(operand)
    needs = isinstance(node, (exp.Binary, exp.Collate, exp.Unary, exp.AtTimeZone, exp.Is))
    return exp.Paren(this=node) if needs and not isinstance(node, exp.Paren) else node


def _escape_percent(text: str) -> str:
    return text.replace("%", "%%")

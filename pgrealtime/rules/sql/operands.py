"""Translates an operand of a comparison to a number and a text expression. Called by conditions.

Paths are joined by the ``Scope`` as they are met; what an operand's text looks like follows
PocketBase's records and SQLite's printing of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from sqlglot import exp

from pgrealtime.catalog.model import Type
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.comparison import is_double
from pgrealtime.rules.language.parameters import (
    LiteralParameter,
    Parameter,
    ParameterClass,
    SqlForm,
)
from pgrealtime.rules.language.predicate import FieldValue, JsonValue, Modifier, RowPath, Term
from pgrealtime.rules.language.sqlite_values import INT64_END, PASSWORD_HASH_PREFIX
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conversions import (
    SqlOperand,
    bound_number,
    double_or_null,
    float_text_sql,
    is_magnitude_below,
    number_text_sql,
)
from pgrealtime.rules.sql.joins import JunctionColumns, Scope, Translation, junction_columns
from pgrealtime.rules.sql.nodes import Sql, TypedSql, typed_column
from pgrealtime.rules.sql.strftime import format_time, translate_time


def translate_operand(term: Term, scope: Scope, *, is_strict: bool = True) -> SqlOperand:
    """Return the operand's value, without any conversion; its paths are joined in the scope.

    If it ``is_strict``, an empty relation or date is '' and not NULL. Otherwise either may stand
    for it: shorter, for where NULL and false are alike.
    """
    match term:
        case predicate.ParameterTerm(parameter):
            return _parameter_operand(parameter, scope)
        case predicate.Keyword(flag):
            return _keyword_operand(flag)
        case predicate.AbsentEach():
            return _keyword_operand(None)
        case FieldValue():
            return _field_with_modifier(term, scope, is_strict=is_strict)
        case predicate.EachTerm(path, kind=kind):
            return _single_value(kind, scope.each_value(path), scope)
        case JsonValue():
            return _json_operand(term, scope)
        case predicate.SecretTerm(path, modifier):
            secret = _null_without_row(path, scope, nodes.string(PASSWORD_HASH_PREFIX))
            return SqlOperand.of_text(_lower(secret) if modifier is Modifier.LOWER else secret)
        case predicate.Strftime():
            made = scope.compute_once(term, lambda: {"t": _strftime(term, scope)})
            return SqlOperand.of_text(made("t"))
        case predicate.GeoDistance():
            distance = scope.compute_once(term, lambda: {"n": _geo_distance(term, scope)})("n")
            show = partial(float_text_sql, scope.translation, distance)
            return SqlOperand(number=distance, make_text=show)


# --- constants


def _parameter_operand(parameter: Parameter, scope: Scope) -> SqlOperand:
    class_ = scope.translation.parameter_classes[parameter]
    if class_ is ParameterClass.ABSENT:
        return _keyword_operand(None)
    if class_.is_number:
        return SqlOperand(
            number=bound_number(parameter, scope),
            make_text=lambda: scope.translation.bind(parameter, SqlForm.TEXT),
            parameter=parameter,
        )
    text = scope.translation.bind(parameter, SqlForm.TEXT)
    return replace(SqlOperand.of_text(text), parameter=parameter)


def _keyword_operand(flag: bool | None) -> SqlOperand:  # noqa: FBT001 (the keyword itself)
    if flag is None:
        return SqlOperand.of_text(nodes.null())
    digit = str(int(flag))
    return SqlOperand(number=nodes.number(int(flag)), make_text=lambda: nodes.string(digit))


# --- fields


def _field_with_modifier(term: FieldValue, scope: Scope, *, is_strict: bool) -> SqlOperand:
    if term.shown_by is not None:
        assert term.shown_by.column is not None
        operand = _field_with_modifier(replace(term, shown_by=None), scope, is_strict=is_strict)
        is_shown = scope.column_at(term.row_path, term.shown_by.column.name)
        return SqlOperand.of_text(nodes.case((is_shown, operand.as_text)))
    match term.modifier:
        case Modifier.WHOLE | Modifier.EACH:
            return _whole_field(term.row_path, term.field, scope, is_strict=is_strict)
        case Modifier.LOWER:
            whole = _whole_field(term.row_path, term.field, scope, is_strict=True)
            return SqlOperand.of_text(_lower(whole.as_text))
        case Modifier.LENGTH:
            return SqlOperand.of_number(_length(term.row_path, term.field, scope))


def _whole_field(path: RowPath, field: Field, scope: Scope, *, is_strict: bool) -> SqlOperand:
    if field.is_multiple:
        return SqlOperand.of_text(_list_text(path, field, scope))
    assert field.column is not None
    column = scope.column_at(path, field.column.name)
    match field.kind:
        case FieldKind.GEO_POINT:
            return SqlOperand.of_text(_geo_text(column, field))
        case FieldKind.JSON | FieldKind.BYTES | FieldKind.COMPOSITE | FieldKind.GEOMETRY:
            raise AssertionError(f"the resolver refuses {field.kind}")
        case _:
            pass
    value = TypedSql(column, field.type, field.column.is_deterministic)
    operand = _single_value(field.kind, value, scope)
    if is_strict and field.kind in {FieldKind.DATE, FieldKind.RELATION}:
        empty_for_null = nodes.coalesce(operand.as_text, "")
        return SqlOperand.of_text(_null_without_row(path, scope, empty_for_null))
    return operand


def _null_without_row(path: RowPath, scope: Scope, text: Sql) -> Sql:
    """Return the text where the path has a row, else NULL."""
    if path.is_scope_row:
        return text
    return nodes.case((nodes.is_null(scope.row_id_at(path).node), nodes.null()), default=text)


def _single_value(kind: FieldKind, value: TypedSql, scope: Scope) -> SqlOperand:
    """Return a single value, or one of many as if the field had it alone."""
    match kind:
        case FieldKind.NUMBER:
            return _number_operand(value.node, value.type, scope)
        case FieldKind.BOOL:
            return SqlOperand.of_number(nodes.cast(value.node, "int"))
        case FieldKind.DATE:
            return SqlOperand.of_text(_date_column_text(value.node, value.type))
        case _:
            return SqlOperand.of_text(nodes.bytewise_text(value))


def _number_operand(column: Sql, type_: Type, scope: Scope) -> SqlOperand:
    base, translation = type_.base.name, scope.translation
    if base in {"int2", "int4", "int8"}:
        return SqlOperand.of_number(column)
    if base == "numeric":
        trimmed = nodes.call("trim_scale", column)
        return SqlOperand(number=column, make_text=lambda: nodes.cast(trimmed, nodes.TEXT))
    # A real is printed with fewer digits than its double has, and means what is printed.
    printed = nodes.cast(column, nodes.TEXT) if base == "float4" else column
    number = nodes.cast(printed, nodes.DOUBLE)

    def show() -> Sql:
        made = scope.compute_once(
            ("shown", column), lambda: {"t": number_text_sql(translation, number)}
        )
        return made("t")

    return SqlOperand(number=number, make_text=show)


def _date_column_text(column: Sql, type_: Type) -> Sql:
    """Return a date as PocketBase writes it; infinities as PostgreSQL writes them.

    Years before 1 are counted as in records: 1 BC is 0000, 44 BC is -0043.
    """
    in_utc = utc_timestamp(column, type_)
    printed = nodes.call("to_char", in_utc, f"YYYY{_DAY_AND_TIME}")
    year = nodes.cast(nodes.call("to_char", in_utc, "YYYY"), "int")
    counted = nodes.call("to_char", nodes.binary(exp.Sub, 1, year), "FM0000")
    early = nodes.concatenate(counted, nodes.call("to_char", in_utc, _DAY_AND_TIME))
    is_early = nodes.binary(exp.LT, in_utc, nodes.cast("0001-01-01", nodes.TIMESTAMP))
    finite = nodes.case((is_early, early), default=printed)
    return nodes.case(
        (nodes.call("isfinite", column), finite), default=nodes.cast(column, nodes.TEXT)
    )


_DAY_AND_TIME = '-MM-DD HH24:MI:SS.MS"Z"'


def utc_timestamp(column: Sql, type_: Type) -> Sql:
    """Return a date column as a timestamp without zone, in UTC."""
    if type_.base.name == "timestamptz":
        return nodes.in_utc(column)
    return nodes.cast(column, nodes.TIMESTAMP)


def _list_text(path: RowPath, field: Field, scope: Scope) -> Sql:
    """Return many values as the JSON text that PocketBase stores."""
    junction = junction_columns(field)
    if junction is not None:
        ids = nodes.call("array_to_json", _junction_ids(junction, path, scope))
        return _null_without_row(path, scope, nodes.coalesce(nodes.cast(ids, nodes.TEXT), "[]"))
    assert field.column is not None
    column = scope.column_at(path, field.column.name)
    element = field.type.base.element
    assert element is not None
    is_native = field.kind in {FieldKind.NUMBER, FieldKind.BOOL, FieldKind.JSON}
    array = column if is_native or nodes.is_inet(element.base) else nodes.cast(column, "text[]")
    return nodes.cast(nodes.call("array_to_json", array), nodes.TEXT)


def _junction_ids(junction: JunctionColumns, path: RowPath, scope: Scope) -> Sql:
    """Return the related ids of a row as an array, in the order of the ids."""
    alias = scope.translation.new_alias()
    scope.translation.tables.setdefault(junction.table.name)
    ids = nodes.bytewise_text(typed_column(alias, junction.target))
    own = nodes.equal_keys(typed_column(alias, junction.source), scope.row_id_at(path))
    select = nodes.select([ids], nodes.table(junction.table, alias), where=own)
    by_id = exp.Ordered(this=nodes.copy_if_attached(ids), nulls_first=False)
    select.set("order", exp.Order(expressions=[by_id]))
    return exp.Array(expressions=[select])


def _length(path: RowPath, field: Field, scope: Scope) -> Sql:
    """Return the number of values; 0 where there is no row."""
    if not field.is_multiple:
        whole = _whole_field(path, field, scope, is_strict=False)
        is_nonempty = nodes.binary(exp.NEQ, whole.as_text, "")
        return nodes.case((is_nonempty, 1), default=0)
    junction = junction_columns(field)
    if junction is not None:
        values = _junction_ids(junction, path, scope)
    else:
        assert field.column is not None
        values = scope.column_at(path, field.column.name)
    return nodes.coalesce(nodes.call("cardinality", values), 0)


def _lower(text: Sql) -> Sql:
    return nodes.call("lower", nodes.collate_c(text))


# --- json and points


def _json_operand(term: JsonValue, scope: Scope) -> SqlOperand:
    column = term.field.column
    assert column is not None
    raw = scope.column_at(term.row_path, column.name)
    if term.field.kind is FieldKind.GEO_POINT and not term.field.is_stored_as_json:
        number = _coordinate(raw, term.keys[0], term.field.type)
        # PocketBase's points are JSON, whose whole numbers have no point.
        show_point = partial(number_text_sql, scope.translation, number)
        return SqlOperand(number=number, make_text=show_point)
    if any(key.isdigit() and len(key) > _MAX_INDEX_DIGITS for key in term.keys):
        return SqlOperand.of_text(nodes.null())
    plain = replace(term, is_lower=False)

    def columns() -> dict[str, Sql]:
        node = _json_node(plain, raw, scope)
        number = scope.translation.let(node, _json_number)
        text = scope.translation.let(node, _json_text)
        return {"v": node, "n": number, "t": text}

    of = scope.compute_once(plain, columns)

    def show() -> Sql:
        shown = scope.compute_once(
            ("shown", plain), lambda: {"t": _json_as_text(scope.translation, of)}
        )
        return shown("t")

    if term.is_lower:
        return SqlOperand.of_text(_lower(show()))
    return SqlOperand(number=of("n"), text=of("t"), make_text=show)


_MAX_INDEX_DIGITS = 9
"""Digits of an array's index: no array is that long, and int4 ends there."""


def _json_node(term: JsonValue, column: Sql, scope: Scope) -> Sql:
    """Return the JSON value under the keys; NULL where a key finds nothing of its kind.

    The path is strict, so that an index is for arrays only and a name for objects only, and silent,
    so that anything else is NULL and no error.
    """
    document = _as_jsonb(column, term.field)
    if not term.keys:
        return document
    steps = (f"[{int(key)}]" if key.isdigit() else f'."{key}"' for key in term.keys)
    path = scope.translation.bind(LiteralParameter(f"strict ${''.join(steps)}"), SqlForm.TEXT)
    return nodes.call(
        "jsonb_path_query_first",
        document,
        nodes.cast(path, "jsonpath"),
        nodes.cast("{}", "jsonb"),
        True,
    )


def _as_jsonb(column: Sql, field: Field) -> Sql:
    return column if field.type.base.name == "jsonb" else nodes.cast(column, "jsonb")


def _json_number(node: Sql) -> Sql:
    """Return the value where SQLite's json_extract gives a number: of numbers and booleans."""
    number = nodes.cast(node, nodes.NUMERIC)
    flag = nodes.cast(nodes.cast(node, "boolean"), "int")
    return _case_by_json_type(node, {"number": number, "boolean": nodes.cast(flag, nodes.NUMERIC)})


def _json_text(node: Sql) -> Sql:
    """Return the value where SQLite's json_extract gives a text: of strings and containers."""
    wrapped = nodes.call("jsonb_build_array", node)
    bare = nodes.call("jsonb_array_element_text", wrapped, 0)
    compact = _compact_json(nodes.cast(node, nodes.TEXT))
    return _case_by_json_type(node, {"string": bare, "object": compact, "array": compact})


def _json_as_text(translation: Translation, of: Callable[[str], Sql]) -> Sql:
    """Return the value as text. A number without a point is an integer to SQLite."""
    compact = nodes.cast(of("v"), nodes.TEXT)
    point = nodes.call("strpos", compact, ".")
    is_whole = nodes.binary(exp.EQ, point, 0)
    is_integer = nodes.case((is_whole, is_magnitude_below(of("n"), INT64_END)), default=False)
    double = nodes.cast(of("n"), nodes.DOUBLE)
    digits = nodes.case((is_integer, compact), default=float_text_sql(translation, double))
    flag = nodes.cast(nodes.cast(of("n"), "int"), nodes.TEXT)
    printed = _case_by_json_type(of("v"), {"number": digits, "boolean": flag})
    return nodes.coalesce(of("t"), printed)


def _case_by_json_type(node: Sql, results: Mapping[str, Sql]) -> Sql:
    """Return the result for the JSON value's kind; NULL for other kinds."""
    kind = nodes.call("jsonb_typeof", node)
    return nodes.case(
        *[(nodes.binary(exp.EQ, kind, name), result) for name, result in results.items()]
    )


def _compact_json(text: Sql) -> Sql:
    """Return jsonb's text without the blanks between its tokens."""
    tokens = nodes.string(r'("([^"\\]|\\.)*")|([,:]) ')
    return nodes.call("regexp_replace", text, tokens, r"\1\3", "g")


def _coordinate(point: Sql, key: str, type_: Type) -> Sql:
    """Return ``lon`` or ``lat`` of a point; NULL of other PostGIS geometries and other keys."""
    index = {"lon": 0, "lat": 1}.get(key)
    if index is None:
        return nodes.null(nodes.DOUBLE)
    base = type_.base
    if not base.extension:
        return exp.Bracket(
            this=nodes.copy_if_attached(point), expressions=[nodes.number(index)], offset=1
        )
    geometry = nodes.cast_to_type(point, replace(base, name="geometry"))
    shape = nodes.call_in_schema(base.schema, "st_geometrytype", geometry)
    is_point = nodes.binary(exp.EQ, shape, "ST_Point")
    return nodes.case(
        (is_point, nodes.call_in_schema(base.schema, ("st_x", "st_y")[index], geometry))
    )


def _geo_text(column: Sql, field: Field) -> Sql:
    """Return a point as the JSON text that PocketBase stores."""
    node = _as_jsonb(column, field) if field.is_stored_as_json else column

    def part(key: str) -> Sql:
        if field.is_stored_as_json:
            return nodes.cast(nodes.call("jsonb_object_field", node, key), nodes.TEXT)
        return nodes.cast(_coordinate(node, key, field.type), nodes.TEXT)

    return nodes.concatenate('{"lon":', part("lon"), ',"lat":', part("lat"), "}")


# --- distance


def _geo_distance(term: predicate.GeoDistance, scope: Scope) -> Sql:
    """Return kilometres by the arc cosine, as PocketBase computes them.

    Rounding may lead beyond 1, of which PostgreSQL's acos reports an error.
    """
    lon_a, lat_a, lon_b, lat_b = (_radians(arg, scope) for arg in term.args)

    def times(*factors: Sql) -> Sql:
        product, *rest = factors
        for factor in rest:
            product = nodes.binary(exp.Mul, product, factor)
        return product

    def body(cosine: Sql) -> Sql:
        clamped = nodes.case(
            (nodes.binary(exp.GT, cosine, 1), 1),
            (nodes.binary(exp.LT, cosine, -1), -1),
            default=cosine,
        )
        return nodes.binary(exp.Mul, 6371, nodes.call("acos", clamped))

    apart = nodes.call("cos", nodes.binary(exp.Sub, lon_b, lon_a))
    cosine = nodes.binary(
        exp.Add,
        times(nodes.call("cos", lat_a), nodes.call("cos", lat_b), apart),
        times(nodes.call("sin", lat_a), nodes.call("sin", lat_b)),
    )
    return scope.translation.let(cosine, body)


def _radians(term: Term, scope: Scope) -> Sql:
    """Return the angle; NULL if it is infinite, since PostgreSQL has no cosine of that."""

    def body(value: Sql) -> Sql:
        is_finite = is_magnitude_below(value, "Infinity")
        return nodes.case((is_finite, nodes.call("radians", value)))

    degrees = translate_operand(term, scope)
    return scope.translation.let(double_or_null(degrees, scope, is_double=is_double(term)), body)


# --- times


def _strftime(term: predicate.Strftime, scope: Scope) -> Sql:
    number, text = None, None
    if term.time is not None:
        operand = translate_operand(term.time, scope)
        number = double_or_null(operand, scope, is_double=is_double(term.time))
        text = nodes.null() if operand.text is None else operand.text
    start = translate_time(
        scope, time=term.time, number=number, text=text, modifiers=term.modifiers
    )
    return format_time(scope, start, term.format, term.modifiers)

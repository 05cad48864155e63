"""What an operand is in SQL: its number, its text, and how it is shown as text. For lower.py.

SQLite types values, PostgreSQL types columns. So a value is a pair of expressions, number and
text, of which at most one is not NULL in any row; where the type is known there is only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sqlglot import exp

from pgrealtime.catalog.model import Type
from pgrealtime.collections import Field, FieldKind
from pgrealtime.rules import sql
from pgrealtime.rules.ir import (
    Constant,
    FieldValue,
    GeoDistance,
    Hidden,
    Item,
    JsonValue,
    Keyword,
    NoItem,
    Part,
    Place,
    Rank,
    Strftime,
    Term,
    traits,
)
from pgrealtime.rules.parameters import Form, Literal, Parameter, Shape
from pgrealtime.rules.scope import Scope
from pgrealtime.rules.sql import Sql
from pgrealtime.rules.strftime import formatted, moment

NUMERIC = r"^[ \t\n\v\f\r]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?[ \t\n\v\f\r]*$"
"""What SQLite would take for a number, as long as a double can hold it."""
LONGEST_NUMBER = 200
_BIGGEST_INTEGER = 9223372036854774784
"""The largest double below 2^63: beyond it SQLite keeps whole numbers as floats too."""
HASH = "$2a$"
"""Stands for a secret that the table doesn't hold: the beginning of every password hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """An operand in SQL. At least one of number and text is there."""

    rank: Rank
    number: Sql | None = None
    """Double precision or an integer type."""
    text: Sql | None = None
    show: Callable[[], Sql]
    """Makes the value as text, whichever it is; long for numbers, and seldom wanted."""
    parameter: Parameter | None = None
    """Of a constant: what a conversion needs before anything runs."""
    native: Sql | None = None
    """The bare column, where its own equality means the same for texts of its type."""

    @property
    def shown(self) -> Sql:
        """The value as text, for LIKE and for conversions."""
        return self.show()


def value(term: Term, scope: Scope, *, is_strict: bool = True) -> Value:
    """Return the operand's value.

    Args:
        term: The operand.
        scope: Where its places are joined.
        is_strict: An empty relation or date must be '' and not NULL. Without it either may stand
            for it: shorter, for where NULL and false are alike.
    """
    rank = traits(term, scope.statement.shapes).rank
    match term:
        case Constant(parameter):
            return _constant(parameter, scope)
        case Keyword(flag):
            return _keyword(flag)
        case NoItem():
            return _keyword(None)
        case FieldValue():
            return replace(_field_part(term, scope, is_strict=is_strict), rank=rank)
        case Item(place):
            item, type_ = scope.item(place)
            return _text(sql.plain_text(item, type_), rank)
        case JsonValue():
            return _json_value(term, scope)
        case Hidden(place, part):
            there = _where_found(place, scope, sql.string(HASH))
            return _text(_lower(there) if part is Part.LOWER else there, rank)
        case Strftime(layout, time, modifiers):
            when = None if time is None else value(time, scope)
            start = moment(
                scope,
                time=time,
                number=None if when is None else _as_number(when, scope),
                text=None if when is None else _date_text(when),
                modifiers=modifiers,
            )
            return _text(formatted(scope, start, layout), rank)
        case GeoDistance(args):
            distance = _geo_distance([_as_number(value(arg, scope), scope) for arg in args])
            return Value(rank=rank, number=distance, show=lambda: float_text(distance))


def _text(text: Sql, rank: Rank) -> Value:
    return Value(rank=rank, text=text, show=lambda: text)


# --- constants


def _constant(parameter: Parameter, scope: Scope) -> Value:
    shape = scope.statement.shapes[parameter]
    if shape is Shape.ABSENT:
        return _keyword(None)
    if shape.is_number:
        number = scope.statement.bind(parameter, Form.NUMBER)
        return Value(
            rank=Rank.NONE,
            number=number,
            show=lambda: scope.statement.bind(parameter, Form.TEXT),
            parameter=parameter,
        )
    text = scope.statement.bind(parameter, Form.TEXT)
    return replace(_text(text, Rank.NONE), parameter=parameter)


def _keyword(flag: bool | None) -> Value:  # noqa: FBT001 (the keyword itself)
    if flag is None:
        return _text(sql.null(), Rank.NONE)
    digit = str(int(flag))
    return Value(rank=Rank.NONE, number=sql.number(int(flag)), show=lambda: sql.string(digit))


# --- fields


def _field_part(term: FieldValue, scope: Scope, *, is_strict: bool) -> Value:
    match term.part:
        case Part.WHOLE | Part.EACH:
            return _field(term.place, term.field, scope, is_strict=is_strict)
        case Part.LOWER:
            whole = _field(term.place, term.field, scope, is_strict=True)
            return _text(_lower(whole.shown), Rank.NONE)
        case Part.LENGTH:
            length = _length(term.place, term.field, scope)
            return Value(rank=Rank.NONE, number=length, show=lambda: sql.cast(length, sql.TEXT))


def _field(place: Place, field: Field, scope: Scope, *, is_strict: bool) -> Value:
    if field.is_multiple:
        return _text(_list_text(place, field, scope), Rank.NUMERIC)
    assert field.column is not None
    column = scope.column(place, field.column.name)
    match field.kind:
        case FieldKind.NUMBER:
            return _number(column, field.type)
        case FieldKind.BOOL:
            number = sql.cast(column, "int")
            return Value(rank=Rank.NUMERIC, number=number, show=lambda: sql.cast(number, sql.TEXT))
        case FieldKind.GEO:
            return _text(_geo_text(column, field.type), Rank.NUMERIC)
        case FieldKind.DATE:
            text = _empty_where_found(place, scope, _date(column, field.type), is_strict=is_strict)
            return _text(text, Rank.TEXT)
        case FieldKind.RELATION:
            plain = sql.plain_text(column, field.type)
            text = _empty_where_found(place, scope, plain, is_strict=is_strict)
            return replace(_text(text, Rank.TEXT), native=column)
        case FieldKind.TEXT | FieldKind.FILE:
            plain = sql.plain_text(column, field.type)
            if not field.column.is_deterministic:
                plain = sql.collated(plain)
            return replace(_text(plain, Rank.TEXT), native=column)
        case FieldKind.JSON | FieldKind.BYTES | FieldKind.COMPOSITE:
            raise AssertionError(f"the resolver lets no {field.kind} through")


def _empty_where_found(place: Place, scope: Scope, text: Sql, *, is_strict: bool) -> Sql:
    """Return the text, with '' for NULL in a row that exists."""
    if not is_strict:
        return text
    return _where_found(place, scope, sql.coalesced(text, sql.string("")))


def _where_found(place: Place, scope: Scope, text: Sql) -> Sql:
    """Return the text where the place has a row, else NULL."""
    if place.is_here:
        return text
    return sql.case((sql.is_null(scope.key(place)), sql.null()), default=text)


def _number(column: Sql, type_: Type) -> Value:
    base = type_.base.name
    if base in {"int2", "int4", "int8"}:
        return Value(rank=Rank.NUMERIC, number=column, show=lambda: sql.cast(column, sql.TEXT))
    # A real is shown with fewer digits than its double has, and means what is shown.
    exact = sql.cast(column, sql.TEXT) if base == "float4" else column
    number = sql.cast(exact, sql.DOUBLE)
    return Value(rank=Rank.NUMERIC, number=number, show=lambda: number_text(number))


def _date(column: Sql, type_: Type) -> Sql:
    """Return the moment as PocketBase writes it; infinities order last and first."""
    in_utc = moment_of(column, type_)
    shown = sql.call("to_char", in_utc, sql.string('YYYY-MM-DD HH24:MI:SS.MS"Z"'))
    return sql.case((sql.call("isfinite", column), shown), default=sql.cast(column, sql.TEXT))


def moment_of(column: Sql, type_: Type) -> Sql:
    """Return a date column as a timestamp without zone, in UTC."""
    if type_.base.name == "timestamptz":
        return sql.in_utc(column)
    return sql.cast(column, sql.TIMESTAMP)


def _list_text(place: Place, field: Field, scope: Scope) -> Sql:
    """Return many values as the JSON text that PocketBase keeps."""
    junction = None if field.relation is None else field.relation.junction
    if junction is not None:
        return sql.coalesced(
            sql.cast(sql.call("array_to_json", _junction_ids(place, field, scope)), sql.TEXT),
            sql.string("[]"),
        )
    assert field.column is not None
    column = scope.column(place, field.column.name)
    is_native = field.kind in {FieldKind.NUMBER, FieldKind.BOOL, FieldKind.JSON}
    array = column if is_native else sql.cast(column, "text[]")
    return sql.cast(sql.call("array_to_json", array), sql.TEXT)


def _junction_ids(place: Place, field: Field, scope: Scope) -> Sql:
    """Return the ids that the junction table holds, as an array in their own order."""
    assert field.relation is not None
    junction = field.relation.junction
    assert junction is not None
    source = junction.table.column(junction.source)
    target = junction.table.column(junction.target)
    assert source is not None
    assert target is not None
    alias = scope.statement.alias()
    scope.statement.tables.setdefault(junction.table.name)
    ids = sql.cast(sql.column(alias, target.name), sql.TEXT)
    own = sql.equal_keys(
        sql.column(alias, source.name),
        source.type,
        scope.key(place),
        scope.collection(place).key.type,
    )
    select = exp.Select(
        expressions=[ids],
        from_=exp.From(this=sql.table(junction.table.name, alias)),
        where=exp.Where(this=own),
        order=exp.Order(expressions=[exp.Ordered(this=sql.own(ids), nulls_first=False)]),
    )
    return exp.Array(expressions=[select])


def _length(place: Place, field: Field, scope: Scope) -> Sql:
    """Return how many values there are; 0 where there is no row."""
    if not field.is_multiple:
        whole = _field(place, field, scope, is_strict=False)
        is_something = sql.binary(exp.NEQ, whole.shown, sql.string(""))
        return sql.case((is_something, sql.number(1)), default=sql.number(0))
    if field.column is None:
        count = sql.call("cardinality", _junction_ids(place, field, scope))
    else:
        count = sql.call("cardinality", scope.column(place, field.column.name))
    return sql.coalesced(count, sql.number(0))


def _lower(text: Sql) -> Sql:
    return sql.call("lower", sql.collated(text))


# --- json and points


def _json_value(term: JsonValue, scope: Scope) -> Value:
    column = term.field.column
    assert column is not None
    raw = scope.column(term.place, column.name)
    if term.field.kind is FieldKind.GEO and term.field.type.base.name == "point":
        found = _coordinate(raw, term.keys[0])
        return Value(rank=Rank.NONE, number=found, show=lambda: float_text(found))
    node = raw if term.field.type.base.name == "jsonb" else sql.cast(raw, "jsonb")
    for key in term.keys:
        node = _json_member(node, key, scope)
    reached = _json_scalar(node)
    if term.is_lower:
        return _text(_lower(reached.shown), Rank.NONE)
    return reached


def _json_member(node: Sql, key: str, scope: Scope) -> Sql:
    """Return a member of an object, or an element of an array if the key is all digits."""
    if not key.isdigit():
        name = scope.statement.bind(Literal(key), Form.TEXT)
        return sql.call("jsonb_object_field", node, name)
    if len(key) > 9:  # noqa: PLR2004 (no array is that long, and int4 ends there)
        return sql.null("jsonb")
    is_array = sql.binary(exp.EQ, sql.call("jsonb_typeof", node), sql.string("array"))
    element = sql.call("jsonb_array_element", node, sql.number(int(key)))
    return sql.case((is_array, element))


def _json_scalar(node: Sql) -> Value:
    """Return what SQLite's json_extract makes of a JSON value."""
    text = sql.cast(node, sql.TEXT)
    double = sql.cast(text, sql.DOUBLE)
    flag = sql.cast(sql.cast(node, "boolean"), "int")
    texts = {
        "string": sql.call(
            "jsonb_array_element_text", sql.call("jsonb_build_array", node), sql.number(0)
        ),
        "object": _compact(text),
        "array": _compact(text),
    }

    def show() -> Sql:
        point = sql.call("strpos", text, sql.string("."))
        is_whole = sql.binary(exp.EQ, point, sql.number(0))
        digits = sql.case((is_whole, number_text(double)), default=float_text(double))
        return _by_kind(node, {**texts, "number": digits, "boolean": sql.cast(flag, sql.TEXT)})

    numbers = {"number": double, "boolean": sql.cast(flag, sql.DOUBLE)}
    return Value(
        rank=Rank.NONE,
        number=_by_kind(node, numbers),
        text=_by_kind(node, texts),
        show=show,
    )


def _by_kind(node: Sql, results: Mapping[str, Sql]) -> Sql:
    """Return the result for the JSON value's kind; NULL for other kinds."""
    kind = sql.call("jsonb_typeof", node)
    return sql.case(
        *((sql.binary(exp.EQ, kind, sql.string(name)), result) for name, result in results.items())
    )


def _compact(text: Sql) -> Sql:
    """Return jsonb's text without the blanks between its tokens."""
    tokens = sql.string(r'("([^"\\]|\\.)*")|([,:]) ')
    return sql.call("regexp_replace", text, tokens, sql.string(r"\1\3"), sql.string("g"))


def _coordinate(point: Sql, key: str) -> Sql:
    index = {"lon": 0, "lat": 1}.get(key)
    if index is None:
        return sql.null(sql.DOUBLE)
    return exp.Bracket(this=sql.own(point), expressions=[sql.number(index)], offset=1)


def _geo_text(column: Sql, type_: Type) -> Sql:
    """Return a point as the JSON text that PocketBase keeps."""
    if type_.base.name == "point":
        lon, lat = (sql.cast(_coordinate(column, key), sql.TEXT) for key in ("lon", "lat"))
    else:
        node = column if type_.base.name == "jsonb" else sql.cast(column, "jsonb")
        lon, lat = (
            sql.cast(sql.call("jsonb_object_field", node, sql.string(key)), sql.TEXT)
            for key in ("lon", "lat")
        )
    return sql.joined(sql.string('{"lon":'), lon, sql.string(',"lat":'), lat, sql.string("}"))


# --- conversions


def to_number(operand: Value, scope: Scope) -> Value:
    """Return the operand with texts that look like numbers turned into numbers."""
    if operand.text is None:
        return operand
    if operand.parameter is not None:
        if scope.statement.shapes[operand.parameter] is not Shape.NUMERIC:
            return operand
        number = scope.statement.bind(operand.parameter, Form.NUMBER)
        return Value(rank=operand.rank, number=number, show=operand.show)
    number, text = _split(operand.text)
    if operand.number is not None:
        number = sql.coalesced(operand.number, number)
    return Value(rank=operand.rank, number=number, text=text, show=operand.show)


def to_text(operand: Value) -> Value:
    """Return the operand with numbers turned into texts."""
    if operand.number is None:
        return operand
    return replace(operand, number=None, text=operand.shown)


def _split(text: Sql) -> tuple[Sql, Sql]:
    """Return the number of a text that looks like one, and the text if it doesn't."""
    looks = sql.matches(text, NUMERIC)
    is_short = sql.binary(exp.LT, sql.call("length", text), sql.number(LONGEST_NUMBER))
    number = sql.case((is_short, sql.case((looks, sql.cast(text, sql.DOUBLE)))))
    rest = sql.case((is_short, sql.case((looks, sql.null()), default=text)), default=text)
    return number, rest


def leading_number(text: Sql) -> Sql:
    """Return the number that a text begins with, NULL if it begins with none."""
    digits = sql.string(r"^[ \t\n\v\f\r]*([+-]?(?:[0-9]{1,200}(?:\.[0-9]{0,99})?|\.[0-9]{1,99}))")
    return sql.cast(sql.call("substring", text, digits), sql.DOUBLE)


def _as_number(operand: Value, scope: Scope) -> Sql:
    """Return the operand's number, NULL if it is a text that doesn't look like one."""
    number = to_number(operand, scope).number
    return sql.null(sql.DOUBLE) if number is None else sql.cast(number, sql.DOUBLE)


def _date_text(operand: Value) -> Sql:
    return sql.null() if operand.text is None else operand.text


# --- numbers as SQLite shows them


def number_text(number: Sql) -> Sql:
    """Return a number column's text: a whole number has no point, as integers haven't."""
    whole = sql.cast(sql.cast(number, sql.INTEGER), sql.TEXT)
    return _by_size(
        number,
        huge=_scientific(number),
        whole=sql.case(
            (sql.binary(exp.EQ, number, sql.call("trunc", number)), whole),
            default=float_text(number),
        ),
        limit=_BIGGEST_INTEGER,
    )


def float_text(number: Sql) -> Sql:
    """Return a float's text as ``parameters.number_text`` has it."""
    decimal = sql.cast(sql.call("trim_scale", _digits(number)), sql.TEXT)
    has_no_point = sql.binary(exp.EQ, sql.call("strpos", decimal, sql.string(".")), sql.number(0))
    pointed = sql.case((has_no_point, sql.joined(decimal, sql.string(".0"))), default=decimal)
    is_tiny = sql.binary(exp.LT, sql.call("abs", number), sql.string("0.0001"))
    is_zero = sql.binary(exp.EQ, number, sql.number(0))
    sized = sql.case((is_zero, sql.string("0.0")), (is_tiny, _scientific(number)), default=pointed)
    return _by_size(number, huge=_scientific(number), whole=sized, limit=10**17)


_DIGITS_17 = "9.9999999999999999EEEE"
_DIGITS_18 = "9.99999999999999999EEEE"
_NEARLY_INFINITE = "1e308"
"""Beyond it a number rounded to 15 digits may be none any more."""


def _digits(number: Sql) -> Sql:
    """Return the number with the digits that SQLite shows, as numeric."""
    short = sql.cast(number, "numeric")
    reads_back = sql.binary(exp.EQ, sql.cast(short, sql.DOUBLE), number)
    is_safe = sql.binary(exp.LT, sql.call("abs", number), sql.string(_NEARLY_INFINITE))
    is_short = sql.case((is_safe, reads_back), default=sql.truth(False))
    spelt = sql.call("to_char", number, sql.string(_DIGITS_18))
    mantissa, exponent = (
        sql.call("split_part", spelt, sql.string("e"), sql.number(part)) for part in (1, 2)
    )
    rounded = sql.cast(sql.call("round", sql.cast(mantissa, "numeric"), sql.number(16)), sql.TEXT)
    long = sql.cast(sql.joined(rounded, sql.string("e"), exponent), "numeric")
    return sql.case((is_short, short), default=long)


def _by_size(number: Sql, *, huge: Sql, whole: Sql, limit: int) -> Sql:
    size = sql.call("abs", number)
    is_infinite = sql.binary(exp.EQ, size, sql.string("Infinity"))
    is_negative = sql.binary(exp.LT, number, sql.number(0))
    return sql.case(
        (sql.is_null(number), sql.null()),
        (sql.binary(exp.LT, size, sql.number(limit)), whole),
        (is_infinite, sql.case((is_negative, sql.string("-Inf")), default=sql.string("Inf"))),
        default=huge,
    )


def _scientific(number: Sql) -> Sql:
    """Return the number with an exponent, without trailing zeros but one digit after the point."""
    shown = sql.call("ltrim", sql.call("to_char", _digits(number), sql.string(_DIGITS_17)))
    return sql.call("regexp_replace", shown, sql.string(r"(\.[0-9]+?)0*e"), sql.string(r"\1e"))


# --- distance


def _geo_distance(args: list[Sql]) -> Sql:
    """Return kilometres by the arc cosine. Rounding may exceed 1, which acos would refuse."""
    lon_a, lat_a, lon_b, lat_b = (sql.call("radians", arg) for arg in args)

    def times(*factors: Sql) -> Sql:
        product, *rest = factors
        for factor in rest:
            product = sql.binary(exp.Mul, product, factor)
        return product

    apart = sql.call("cos", sql.binary(exp.Sub, lon_b, lon_a))
    cosine = sql.binary(
        exp.Add,
        times(sql.call("cos", lat_a), sql.call("cos", lat_b), apart),
        times(sql.call("sin", lat_a), sql.call("sin", lat_b)),
    )
    clamped = sql.case(
        (sql.binary(exp.GT, cosine, sql.number(1)), sql.number(1)),
        (sql.binary(exp.LT, cosine, sql.number(-1)), sql.number(-1)),
        default=cosine,
    )
    return sql.binary(exp.Mul, sql.number(6371), sql.call("acos", clamped))

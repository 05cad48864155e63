"""What an operand is in SQL: its number, its text, and how it is shown as text. For lower.py.

SQLite types values, PostgreSQL types columns. So a value is a pair of expressions, number and
text, of which at most one is not NULL in any row; where the type is known there is only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sqlglot import exp

from pgrealtime.catalog.model import Type
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.comparison import Rank, traits
from pgrealtime.rules.language.parameters import Form, Literal, Parameter, Shape
from pgrealtime.rules.language.predicate import (
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
    Strftime,
    Term,
)
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.joins import Scope, Statement
from pgrealtime.rules.sql.nodes import Sql, Typed, typed_column
from pgrealtime.rules.sql.strftime import formatted, moment

NUMERIC = r"^[ \t\n\v\f\r]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?[ \t\n\v\f\r]*$"
"""What SQLite would take for a number, as long as a double can hold it."""
LONGEST_NUMBER = 200
END_OF_INTEGERS = 1 << 63
"""From here on SQLite keeps whole numbers as floats too."""
_BIGGEST_INTEGER = 9223372036854774784
"""The largest double below."""
HASH = "$2a$"
"""Stands for a secret that the table doesn't hold: the beginning of every password hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """An operand in SQL. At least one of number and text is there."""

    rank: Rank
    number: Sql | None = None
    """Numeric or an integer type, which are exact, or double precision."""
    text: Sql | None = None
    show: Callable[[], Sql]
    """Makes the value as text, whichever it is; long for numbers, and seldom wanted."""
    parameter: Parameter | None = None
    """Of a constant: what a conversion needs before anything runs."""
    is_double: bool = False
    """The number is double precision, and what is compared with it becomes that too."""
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
        case Item(place, kind=kind):
            return replace(_item(kind, scope.item(place), scope), rank=rank)
        case JsonValue():
            return _json_value(term, scope)
        case Hidden(place, part):
            there = _where_found(place, scope, nodes.string(HASH))
            return _text(_lower(there) if part is Part.LOWER else there, rank)
        case Strftime():
            of = scope.named(term, lambda: {"t": _strftime(term, scope)})
            return _text(of("t"), rank)
        case GeoDistance():
            of = scope.named(term, lambda: {"n": _geo_distance(term, scope)})
            return _float(of("n"), rank, scope)


def _text(text: Sql, rank: Rank) -> Value:
    return Value(rank=rank, text=text, show=lambda: text)


def _float(number: Sql, rank: Rank, scope: Scope) -> Value:
    return Value(
        rank=rank,
        number=number,
        show=lambda: float_text(scope.statement, number),
        is_double=True,
    )


# --- constants


def _constant(parameter: Parameter, scope: Scope) -> Value:
    shape = scope.statement.shapes[parameter]
    if shape is Shape.ABSENT:
        return _keyword(None)
    if shape.is_number:
        return Value(
            rank=Rank.NONE,
            number=_bound_number(parameter, scope),
            show=lambda: scope.statement.bind(parameter, Form.TEXT),
            parameter=parameter,
        )
    text = scope.statement.bind(parameter, Form.TEXT)
    return replace(_text(text, Rank.NONE), parameter=parameter)


def _bound_number(parameter: Parameter, scope: Scope) -> Sql:
    return nodes.cast(scope.statement.bind(parameter, Form.NUMBER), nodes.EXACT)


def _keyword(flag: bool | None) -> Value:  # noqa: FBT001 (the keyword itself)
    if flag is None:
        return _text(nodes.null(), Rank.NONE)
    digit = str(int(flag))
    return Value(rank=Rank.NONE, number=nodes.number(int(flag)), show=lambda: nodes.string(digit))


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
            return Value(rank=Rank.NONE, number=length, show=lambda: nodes.cast(length, nodes.TEXT))


def _field(place: Place, field: Field, scope: Scope, *, is_strict: bool) -> Value:
    if field.is_multiple:
        return _text(_list_text(place, field, scope), Rank.NUMERIC)
    assert field.column is not None
    column = scope.column(place, field.column.name)
    match field.kind:
        case FieldKind.NUMBER:
            return _number(column, field.type, scope)
        case FieldKind.BOOL:
            return _flag(column)
        case FieldKind.GEO:
            return _text(_geo_text(column, field), Rank.NUMERIC)
        case FieldKind.DATE:
            text = _empty_where_found(place, scope, _date(column, field.type), is_strict=is_strict)
            return _text(text, Rank.TEXT)
        case FieldKind.RELATION:
            text = _empty_where_found(place, scope, _plain_text(column, field), is_strict=is_strict)
            return replace(_text(text, Rank.TEXT), native=column)
        case FieldKind.TEXT | FieldKind.FILE:
            return replace(_text(_plain_text(column, field), Rank.TEXT), native=column)
        case FieldKind.JSON | FieldKind.BYTES | FieldKind.COMPOSITE | FieldKind.GEOMETRY:
            raise AssertionError(f"the resolver lets no {field.kind} through")


def _plain_text(column: Sql, field: Field) -> Sql:
    assert field.column is not None
    return nodes.plain_text(Typed(column, field.type, field.column.is_deterministic))


def _empty_where_found(place: Place, scope: Scope, text: Sql, *, is_strict: bool) -> Sql:
    """Return the text, with '' for NULL in a row that exists."""
    if not is_strict:
        return text
    return _where_found(place, scope, nodes.coalesced(text, nodes.string("")))


def _where_found(place: Place, scope: Scope, text: Sql) -> Sql:
    """Return the text where the place has a row, else NULL."""
    if place.is_here:
        return text
    return nodes.case((nodes.is_null(scope.key(place).node), nodes.null()), default=text)


def _number(column: Sql, type_: Type, scope: Scope) -> Value:
    base = type_.base.name
    if base in {"int2", "int4", "int8"}:
        return Value(rank=Rank.NUMERIC, number=column, show=lambda: nodes.cast(column, nodes.TEXT))
    if base == "numeric":
        return Value(
            rank=Rank.NUMERIC,
            number=column,
            show=lambda: nodes.cast(nodes.call("trim_scale", column), nodes.TEXT),
        )
    # A real is shown with fewer digits than its double has, and means what is shown.
    shown = nodes.cast(column, nodes.TEXT) if base == "float4" else column
    number = nodes.cast(shown, nodes.DOUBLE)

    def show() -> Sql:
        of = scope.named(("shown", column), lambda: {"t": number_text(scope.statement, number)})
        return of("t")

    return Value(rank=Rank.NUMERIC, number=number, show=show, is_double=True)


def _flag(column: Sql) -> Value:
    number = nodes.cast(column, "int")
    return Value(rank=Rank.NUMERIC, number=number, show=lambda: nodes.cast(number, nodes.TEXT))


def _item(kind: FieldKind, item: Typed, scope: Scope) -> Value:
    """Return one of many values: the same as if the field held it alone."""
    match kind:
        case FieldKind.NUMBER:
            return _number(item.node, item.type, scope)
        case FieldKind.BOOL:
            return _flag(item.node)
        case FieldKind.DATE:
            return _text(_date(item.node, item.type), Rank.NONE)
        case _:
            return _text(nodes.plain_text(item), Rank.NONE)


def _date(column: Sql, type_: Type) -> Sql:
    """Return the moment as PocketBase writes it; infinities order last and first.

    Years before 1 are counted as records count them: 1 BC is 0000, 44 BC is -0043.
    """
    in_utc = moment_of(column, type_)
    shown = nodes.call("to_char", in_utc, nodes.string(f"YYYY{_DAY_AND_TIME}"))
    year = nodes.cast(nodes.call("to_char", in_utc, nodes.string("YYYY")), "int")
    counted = nodes.call(
        "to_char", nodes.binary(exp.Sub, nodes.number(1), year), nodes.string("FM0000")
    )
    early = nodes.joined(counted, nodes.call("to_char", in_utc, nodes.string(_DAY_AND_TIME)))
    is_early = nodes.binary(exp.LT, in_utc, nodes.cast(nodes.string("0001-01-01"), nodes.TIMESTAMP))
    finite = nodes.case((is_early, early), default=shown)
    return nodes.case(
        (nodes.call("isfinite", column), finite), default=nodes.cast(column, nodes.TEXT)
    )


_DAY_AND_TIME = '-MM-DD HH24:MI:SS.MS"Z"'


def moment_of(column: Sql, type_: Type) -> Sql:
    """Return a date column as a timestamp without zone, in UTC."""
    if type_.base.name == "timestamptz":
        return nodes.in_utc(column)
    return nodes.cast(column, nodes.TIMESTAMP)


def _list_text(place: Place, field: Field, scope: Scope) -> Sql:
    """Return many values as the JSON text that PocketBase keeps."""
    junction = None if field.relation is None else field.relation.junction
    if junction is not None:
        ids = nodes.call("array_to_json", _junction_ids(place, field, scope))
        return _where_found(
            place, scope, nodes.coalesced(nodes.cast(ids, nodes.TEXT), nodes.string("[]"))
        )
    assert field.column is not None
    column = scope.column(place, field.column.name)
    element = field.type.base.element
    assert element is not None
    is_native = field.kind in {FieldKind.NUMBER, FieldKind.BOOL, FieldKind.JSON}
    array = column if is_native or nodes.is_inet(element.base) else nodes.cast(column, "text[]")
    return nodes.cast(nodes.call("array_to_json", array), nodes.TEXT)


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
    ids = nodes.plain_text(typed_column(alias, target))
    own = nodes.equal_keys(typed_column(alias, source), scope.key(place))
    select = exp.Select(
        expressions=[ids],
        from_=exp.From(this=nodes.table(junction.table.name, alias)),
        where=exp.Where(this=own),
        order=exp.Order(expressions=[exp.Ordered(this=nodes.own(ids), nulls_first=False)]),
    )
    return exp.Array(expressions=[select])


def _length(place: Place, field: Field, scope: Scope) -> Sql:
    """Return how many values there are; 0 where there is no row."""
    if not field.is_multiple:
        whole = _field(place, field, scope, is_strict=False)
        is_something = nodes.binary(exp.NEQ, whole.shown, nodes.string(""))
        return nodes.case((is_something, nodes.number(1)), default=nodes.number(0))
    if field.column is None:
        count = nodes.call("cardinality", _junction_ids(place, field, scope))
    else:
        count = nodes.call("cardinality", scope.column(place, field.column.name))
    return nodes.coalesced(count, nodes.number(0))


def _lower(text: Sql) -> Sql:
    return nodes.call("lower", nodes.collated(text))


# --- json and points


def _json_value(term: JsonValue, scope: Scope) -> Value:
    column = term.field.column
    assert column is not None
    raw = scope.column(term.place, column.name)
    if term.field.kind is FieldKind.GEO and not term.field.is_stored_as_json:
        number = _coordinate(raw, term.keys[0], term.field.type)
        # PocketBase's points are JSON, whose whole numbers have no point.
        return Value(
            rank=Rank.NONE,
            number=number,
            show=lambda: number_text(scope.statement, number),
            is_double=True,
        )
    if any(key.isdigit() and len(key) > _LONGEST_INDEX for key in term.keys):
        return _text(nodes.null(), Rank.NONE)
    plain = replace(term, is_lower=False)

    def columns() -> dict[str, Sql]:
        node = _json_node(plain, raw, scope)
        number = scope.statement.given(node, _json_number)
        text = scope.statement.given(node, _json_text)
        return {"v": node, "n": number, "t": text}

    of = scope.named(plain, columns)

    def show() -> Sql:
        shown = scope.named(("shown", plain), lambda: {"t": _json_shown(scope.statement, of)})
        return shown("t")

    if term.is_lower:
        return _text(_lower(show()), Rank.NONE)
    return Value(rank=Rank.NONE, number=of("n"), text=of("t"), show=show)


_LONGEST_INDEX = 9
"""Digits of an array's index: no array is that long, and int4 ends there."""


def _json_node(term: JsonValue, column: Sql, scope: Scope) -> Sql:
    """Return the JSON value under the keys; NULL where a step finds nothing of its kind.

    Strict, so that an index is for arrays only and a name for objects only; silent, so that
    anything else is NULL and no error.
    """
    document = column if term.field.type.base.name == "jsonb" else nodes.cast(column, "jsonb")
    if not term.keys:
        return document
    steps = (f"[{int(key)}]" if key.isdigit() else f'."{key}"' for key in term.keys)
    path = scope.statement.bind(Literal(f"strict ${''.join(steps)}"), Form.TEXT)
    return nodes.call(
        "jsonb_path_query_first",
        document,
        nodes.cast(path, "jsonpath"),
        nodes.cast(nodes.string("{}"), "jsonb"),
        nodes.truth(True),
    )


def _json_number(node: Sql) -> Sql:
    """Return what SQLite's json_extract makes a number: numbers and booleans."""
    number = nodes.cast(node, nodes.EXACT)
    flag = nodes.cast(nodes.cast(node, "boolean"), "int")
    return _by_kind(node, {"number": number, "boolean": nodes.cast(flag, nodes.EXACT)})


def _json_text(node: Sql) -> Sql:
    """Return what SQLite's json_extract makes a text: strings, and the text of containers."""
    wrapped = nodes.call("jsonb_build_array", node)
    bare = nodes.call("jsonb_array_element_text", wrapped, nodes.number(0))
    compact = _compact(nodes.cast(node, nodes.TEXT))
    return _by_kind(node, {"string": bare, "object": compact, "array": compact})


def _json_shown(statement: Statement, of: Callable[[str], Sql]) -> Sql:
    """Return the value as text: a number without a point is an integer to SQLite."""
    spelt = nodes.cast(of("v"), nodes.TEXT)
    point = nodes.call("strpos", spelt, nodes.string("."))
    is_whole = nodes.binary(exp.EQ, point, nodes.number(0))
    is_integer = nodes.case(
        (is_whole, _is_below(of("n"), END_OF_INTEGERS)), default=nodes.truth(False)
    )
    double = nodes.cast(of("n"), nodes.DOUBLE)
    digits = nodes.case((is_integer, spelt), default=float_text(statement, double))
    flag = nodes.cast(nodes.cast(of("n"), "int"), nodes.TEXT)
    shown = _by_kind(of("v"), {"number": digits, "boolean": flag})
    return nodes.coalesced(of("t"), shown)


def _by_kind(node: Sql, results: Mapping[str, Sql]) -> Sql:
    """Return the result for the JSON value's kind; NULL for other kinds."""
    kind = nodes.call("jsonb_typeof", node)
    return nodes.case(
        *(
            (nodes.binary(exp.EQ, kind, nodes.string(name)), result)
            for name, result in results.items()
        )
    )


def _compact(text: Sql) -> Sql:
    """Return jsonb's text without the blanks between its tokens."""
    tokens = nodes.string(r'("([^"\\]|\\.)*")|([,:]) ')
    return nodes.call("regexp_replace", text, tokens, nodes.string(r"\1\3"), nodes.string("g"))


def _coordinate(point: Sql, key: str, type_: Type) -> Sql:
    """Return X or Y of a point or of a PostGIS point; NULL for other geometries and keys."""
    index = {"lon": 0, "lat": 1}.get(key)
    if index is None:
        return nodes.null(nodes.DOUBLE)
    base = type_.base
    if not base.extension:
        return exp.Bracket(this=nodes.own(point), expressions=[nodes.number(index)], offset=1)
    geometry = nodes.typed(point, replace(base, name="geometry"))
    shape = nodes.call_in(base.schema, "st_geometrytype", geometry)
    is_point = nodes.binary(exp.EQ, shape, nodes.string("ST_Point"))
    return nodes.case((is_point, nodes.call_in(base.schema, ("st_x", "st_y")[index], geometry)))


def _geo_text(column: Sql, field: Field) -> Sql:
    """Return a point as the JSON text that PocketBase keeps."""
    if not field.is_stored_as_json:
        lon, lat = (
            nodes.cast(_coordinate(column, key, field.type), nodes.TEXT) for key in ("lon", "lat")
        )
    else:
        node = column if field.type.base.name == "jsonb" else nodes.cast(column, "jsonb")
        lon, lat = (
            nodes.cast(nodes.call("jsonb_object_field", node, nodes.string(key)), nodes.TEXT)
            for key in ("lon", "lat")
        )
    return nodes.joined(
        nodes.string('{"lon":'), lon, nodes.string(',"lat":'), lat, nodes.string("}")
    )


# --- conversions


def to_number(operand: Value, scope: Scope) -> Value:
    """Return the operand with texts that look like numbers turned into numbers."""
    if operand.text is None:
        return operand
    if operand.parameter is not None:
        if scope.statement.shapes[operand.parameter] is not Shape.NUMERIC:
            return operand
        number = _bound_number(operand.parameter, scope)
        return Value(rank=operand.rank, number=number, show=operand.show)
    number, text = _split(operand.text)
    if operand.number is not None:
        number = nodes.coalesced(operand.number, number)
    return replace(operand, number=number, text=text, parameter=None, native=None)


def alike(one: Value, other: Value) -> tuple[Value, Value]:
    """Return both with numbers that can be compared: exact ones, unless one is a double."""
    if one.is_double is other.is_double:
        return one, other
    return _as_double(one), _as_double(other)


def _as_double(operand: Value) -> Value:
    if operand.is_double or operand.number is None:
        return operand
    return replace(operand, number=nodes.cast(operand.number, nodes.DOUBLE), is_double=True)


def to_text(operand: Value) -> Value:
    """Return the operand with numbers turned into texts."""
    if operand.number is None:
        return operand
    return replace(operand, number=None, text=operand.shown, is_double=False)


def _split(text: Sql) -> tuple[Sql, Sql]:
    """Return the number of a text that looks like one, and the text if it doesn't."""
    looks = nodes.matches(text, NUMERIC)
    is_short = nodes.binary(exp.LT, nodes.call("length", text), nodes.number(LONGEST_NUMBER))
    number = nodes.case((is_short, nodes.case((looks, nodes.cast(text, nodes.EXACT)))))
    rest = nodes.case((is_short, nodes.case((looks, nodes.null()), default=text)), default=text)
    return number, rest


def leading_number(text: Sql) -> Sql:
    """Return the number that a text begins with, NULL if it begins with none."""
    digits = nodes.string(r"^[ \t\n\v\f\r]*([+-]?(?:[0-9]{1,200}(?:\.[0-9]{0,99})?|\.[0-9]{1,99}))")
    return nodes.cast(nodes.call("substring", text, digits), nodes.DOUBLE)


def _as_number(operand: Value, scope: Scope) -> Sql:
    """Return the operand's number as a double, NULL if it is a text that doesn't look like one.

    A number beyond all doubles is NULL too, for functions that couldn't do anything with it.
    """
    converted = to_number(operand, scope)
    number = converted.number
    if number is None:
        return nodes.null(nodes.DOUBLE)
    if converted.is_double:
        return number

    def body(given: Sql) -> Sql:
        is_double = _is_below(given, nodes.cast(nodes.string("1e300"), nodes.EXACT))
        not_tiny = nodes.call("round", given, nodes.number(300))
        return nodes.case((is_double, nodes.cast(not_tiny, nodes.DOUBLE)))

    return scope.statement.given(nodes.cast(number, nodes.EXACT), body)


def _date_text(operand: Value) -> Sql:
    return nodes.null() if operand.text is None else operand.text


# --- numbers as SQLite shows them


def number_text(statement: Statement, number: Sql) -> Sql:
    """Return a number column's text: a whole number has no point, as integers haven't."""

    def body(given: Sql) -> Sql:
        whole = nodes.cast(nodes.cast(given, nodes.INTEGER), nodes.TEXT)
        is_whole = nodes.binary(exp.EQ, given, nodes.call("trunc", given))
        is_integer = nodes.case(
            (_is_below(given, _BIGGEST_INTEGER), is_whole), default=nodes.truth(False)
        )
        return nodes.case((is_integer, whole), default=float_text(statement, given))

    return statement.given(number, body)


def float_text(statement: Statement, number: Sql) -> Sql:
    """Return a float's text as ``parameters.number_text`` has it."""

    def body(given: Sql) -> Sql:
        is_negative = nodes.binary(exp.LT, given, nodes.number(0))
        infinite = nodes.case((is_negative, nodes.string("-Inf")), default=nodes.string("Inf"))
        return nodes.case(
            (nodes.is_null(given), nodes.null()),
            (nodes.binary(exp.EQ, given, nodes.number(0)), nodes.string("0.0")),
            (_is_below(given, nodes.string("Infinity")), statement.given(_digits(given), _shown)),
            default=infinite,
        )

    return statement.given(number, body)


_DIGITS_17 = "9.9999999999999999EEEE"
_DIGITS_18 = "9.99999999999999999EEEE"


def _is_below(number: Sql, limit: Sql | int) -> Sql:
    bound = nodes.number(limit) if isinstance(limit, int) else limit
    return nodes.binary(exp.LT, nodes.call("abs", number), bound)


def _digits(number: Sql) -> Sql:
    """Return the finite number with the digits that SQLite shows, as numeric."""
    short = nodes.cast(number, "numeric")
    reads_back = nodes.binary(exp.EQ, nodes.cast(short, nodes.DOUBLE), number)
    # Beyond this a number rounded to 15 digits may be none any more.
    is_safe = _is_below(number, nodes.string("1e308"))
    is_short = nodes.case((is_safe, reads_back), default=nodes.truth(False))
    spelt = nodes.call("to_char", number, nodes.string(_DIGITS_18))
    mantissa, exponent = (
        nodes.call("split_part", spelt, nodes.string("e"), nodes.number(part)) for part in (1, 2)
    )
    rounded = nodes.cast(
        nodes.call("round", nodes.cast(mantissa, "numeric"), nodes.number(16)), nodes.TEXT
    )
    long = nodes.cast(nodes.joined(rounded, nodes.string("e"), exponent), "numeric")
    return nodes.case((is_short, short), default=long)


def _shown(digits: Sql) -> Sql:
    """Return digits as text: plain if they are of common size, else with an exponent."""
    decimal = nodes.cast(nodes.call("trim_scale", digits), nodes.TEXT)
    has_no_point = nodes.binary(
        exp.EQ, nodes.call("strpos", decimal, nodes.string(".")), nodes.number(0)
    )
    plain = nodes.case((has_no_point, nodes.joined(decimal, nodes.string(".0"))), default=decimal)
    spelt = nodes.call("ltrim", nodes.call("to_char", digits, nodes.string(_DIGITS_17)))
    wide = nodes.call(
        "regexp_replace", spelt, nodes.string(r"(\.[0-9]+?)0*e"), nodes.string(r"\1e")
    )
    return nodes.case(
        (_is_below(digits, nodes.string("0.0001")), wide),
        (_is_below(digits, 10**17), plain),
        default=wide,
    )


# --- distance


def _geo_distance(term: GeoDistance, scope: Scope) -> Sql:
    """Return kilometres by the arc cosine. Rounding may exceed 1, which acos would refuse."""
    lon_a, lat_a, lon_b, lat_b = (_radians(value(arg, scope), scope) for arg in term.args)

    def times(*factors: Sql) -> Sql:
        product, *rest = factors
        for factor in rest:
            product = nodes.binary(exp.Mul, product, factor)
        return product

    def body(cosine: Sql) -> Sql:
        clamped = nodes.case(
            (nodes.binary(exp.GT, cosine, nodes.number(1)), nodes.number(1)),
            (nodes.binary(exp.LT, cosine, nodes.number(-1)), nodes.number(-1)),
            default=cosine,
        )
        return nodes.binary(exp.Mul, nodes.number(6371), nodes.call("acos", clamped))

    apart = nodes.call("cos", nodes.binary(exp.Sub, lon_b, lon_a))
    cosine = nodes.binary(
        exp.Add,
        times(nodes.call("cos", lat_a), nodes.call("cos", lat_b), apart),
        times(nodes.call("sin", lat_a), nodes.call("sin", lat_b)),
    )
    return scope.statement.given(cosine, body)


def _radians(degrees: Value, scope: Scope) -> Sql:
    """Return the angle; NULL if it is endless, of which PostgreSQL would refuse the cosine."""

    def body(given: Sql) -> Sql:
        is_finite = _is_below(given, nodes.string("Infinity"))
        return nodes.case((is_finite, nodes.call("radians", given)))

    return scope.statement.given(_as_number(degrees, scope), body)


# --- moments


def _strftime(term: Strftime, scope: Scope) -> Sql:
    when = None if term.time is None else value(term.time, scope)
    start = moment(
        scope,
        time=term.time,
        number=None if when is None else _as_number(when, scope),
        text=None if when is None else _date_text(when),
        modifiers=term.modifiers,
    )
    return formatted(scope, start, term.format, term.modifiers)

"""Converts values from PostgreSQL's text form to PocketBase's JSON.

The text forms are those under the pinned settings of the replication connection (see
``pgrealtime.changes``). A converter is chosen once per field; ``records.encode`` calls it for each
row and encodes the results by msgspec, which escapes strings as PocketBase does (protocol, 6.7).
The JSON forms are those of protocol 6.6 and 6.8. For what PocketBase doesn't have:

- integers and numerics keep all digits but a fraction's trailing zeros; floats are printed as in
  ECMAScript; NaN and infinity are null.
- dates beyond 9999 have a longer year (``12024-...``), dates BC the astronomical one (1 BC is
  ``0000-...``, 44 BC ``-0043-...``). Infinite dates are empty.
- a PostGIS geometry or geography is GeoJSON (see ``records.geometry``).
- bytea is base64, a composite an object of its attributes in order, an array an array. NULL in
  them is always null.
- everything else is its text form.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from math import isfinite
from typing import TypeAlias

import msgspec
from msgspec import Raw

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.collections.field_kinds import field_kind_of
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.records.geometry import point_coordinates, to_geojson
from pgrealtime.records.numbers import format_double, format_exponent_form
from pgrealtime.text_forms import Element, flatten_array, parse_array, parse_composite

Json: TypeAlias = "str | int | bool | Raw | list[Json] | dict[str, Json] | None"
"""What msgspec encodes. Raw is JSON already: numbers with their digits, json values."""

Converter: TypeAlias = Callable[[str], Json] | None
"""Converts the text form of a value that isn't NULL; None if the text is the value."""

_OPTION_CATEGORIES = ("S", "E")
"""Type categories whose arrays can be a select: strings and enums, but not, say, uuid."""


def choose_converter(field: Field) -> Converter:
    """Return the converter of a field that has a column."""
    type_ = field.type.base
    if field.name == "id":
        return None
    if type_.kind is not TypeKind.ARRAY:
        return _scalar_converter(field.kind, type_)
    element = _element_type(type_)
    if field.kind in (FieldKind.RELATION, FieldKind.FILE):
        return _convert_ids
    if field.is_select and element.category in _OPTION_CATEGORIES:
        return _convert_options
    return _array_converter(_scalar_converter(field.kind, element), element)


def zero_value(field: Field) -> Json:
    """Return PocketBase's value for an unset field."""
    if field.is_multiple:
        return []
    if field.name == "id":
        return ""
    match field.kind:
        case FieldKind.NUMBER:
            return 0
        case FieldKind.BOOL:
            return False
        case FieldKind.JSON | FieldKind.COMPOSITE | FieldKind.GEOMETRY:
            return None
        case FieldKind.GEO_POINT:
            return {"lon": 0, "lat": 0}
        case _:
            return ""


def distinct_ids(values: Iterable[str | None]) -> Json:
    """Return the ids or options of a multiple field, without empty and repeated ones."""
    return list(dict.fromkeys(value for value in values if value))


def _scalar_converter(kind: FieldKind, type_: Type) -> Converter:
    match kind:
        case FieldKind.NUMBER:
            return _number_converter(type_)
        case FieldKind.BOOL:
            return "t".__eq__
        case FieldKind.DATE:
            return _timestamptz if type_.name == "timestamptz" else _date
        case FieldKind.JSON:
            return _jsonb if type_.name == "jsonb" else _json
        case FieldKind.GEO_POINT:
            return _geo_point_converter(type_)
        case FieldKind.GEOMETRY:
            return _geometry
        case FieldKind.BYTES:
            return _bytea
        case FieldKind.COMPOSITE:
            return _composite_converter(type_)
        case FieldKind.TEXT | FieldKind.RELATION | FieldKind.FILE:
            return None


def _type_converter(type_: Type) -> Converter:
    """Return the converter of an array's elements or a composite's attribute."""
    type_ = type_.base
    if type_.kind is TypeKind.ARRAY:
        element = _element_type(type_)
        return _array_converter(_type_converter(element), element)
    kind, _ = field_kind_of(type_)
    return _scalar_converter(kind, type_)


def _element_type(array: Type) -> Type:
    assert array.element is not None
    return array.element.base


# Arrays and composites.


def _array_converter(convert: Converter, element: Type) -> Converter:
    if element.kind is TypeKind.ARRAY:  # a domain over an array, as an element
        convert = _type_converter(element)
    return lambda text: _convert_items(parse_array(text, element.delimiter), convert)


def _convert_items(items: list[Element], convert: Converter) -> list[Json]:
    return [
        _convert_items(item, convert)
        if isinstance(item, list)
        else item
        if item is None or convert is None
        else convert(item)
        for item in items
    ]


def _convert_ids(text: str) -> Json:
    return distinct_ids(flatten_array(parse_array(text)))


def _convert_options(text: str) -> Json:
    """Convert to PocketBase's multiple select, which has no option twice. NULL is kept."""
    items = parse_array(text)
    if any(isinstance(item, list) for item in items):
        return _convert_items(items, None)
    return list(dict.fromkeys(flatten_array(items)))


def _composite_converter(type_: Type) -> Converter:
    members = [(name, _type_converter(inner)) for name, inner in type_.attributes]

    def convert(text: str) -> Json:
        values = parse_composite(text)
        if len(values) > max(len(members), 1):  # () is one value, or none
            # Written before an attribute was dropped: which one each value belongs to is unknown.
            return text
        # Values of attributes that were added later are missing at the end.
        return {
            name: value if value is None or of_member is None else of_member(value)
            for (name, of_member), value in zip(members, values, strict=False)
        }

    return convert


# Numbers.


def _number_converter(type_: Type) -> Converter:
    match type_.name:
        case "int2" | "int4" | "int8":
            return int
        case "float4":
            return _float4
        case "float8":
            return _float8
        case _:
            return _numeric


def _numeric(text: str) -> Json:
    if "." in text:
        return Raw(text.rstrip("0").rstrip("."))
    return None if text[-1] in "Ny" else Raw(text)  # NaN, Infinity


def _float4(text: str) -> Json:
    if "e" in text:
        return Raw(format_exponent_form(text))
    return None if text[-1] in "Ny" else Raw(text)


def _float8(text: str) -> Json:
    """Print ECMAScript's digits, which are those of Python's repr."""
    # PostgreSQL's differ where a shorter number is exactly between two doubles and parses to this
    # one: 40095404089409024 against 40095404089409020. That needs 53 bits before the point, so it
    # occurs with numbers in exponent form only.
    if "e" in text:
        text = repr(float(text)).removesuffix(".0")
    return _float4(text)


# Booleans, dates, bytes.

_DATE = re.compile(
    r"(\d{4,})(-\d\d-\d\d)(?: (\d\d:\d\d:\d\d)(?:\.(\d+))?)?(?:\+00)?( BC)?", re.ASCII
)
_WITH_MILLISECONDS = len("YYYY-MM-DD hh:mm:ss.mmm")
_WHOLE_SECONDS = len("YYYY-MM-DD hh:mm:ss")


def _timestamptz(text: str) -> Json:
    if len(text) == _WHOLE_SECONDS + len("+00") and text[4] == "-" and text[-3] == "+":
        return text[:_WHOLE_SECONDS] + ".000Z"
    if len(text) >= _WITH_MILLISECONDS + len("+00") and text[4] == "-" and text[-3] == "+":
        return text[:_WITH_MILLISECONDS] + "Z"
    return _date(text)


def _date(text: str) -> Json:
    date = _DATE.fullmatch(text)
    if date is None:  # infinity, -infinity, or no date
        return ""
    year, day, time, fraction, era = date.groups(default="")
    if era:
        year = f"{1 - int(year):05d}" if int(year) > 1 else "0000"
    return f"{year}{day} {time or '00:00:00'}.{fraction:0<3.3}Z"


def _bytea(text: str) -> Json:
    return b64encode(bytes.fromhex(text[2:])).decode()


# JSON and places.

_STRING_OR_BLANKS = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|[ \t\r\n]+')
_SURROGATE = re.compile("[\ud800-\udfff]")


def _jsonb(text: str) -> Json:
    """Remove the blanks that jsonb's output has; its strings are escaped as ours."""
    return Raw(_without_blanks(text))


def _json(text: str) -> Json:
    if "\\" in text:
        return Raw(_STRING_OR_BLANKS.sub(_normalize_string, text))
    return Raw(_without_blanks(text.strip(" \t\r\n")))


def _without_blanks(text: str) -> str:
    if text[0] not in "{[":
        return text
    try:
        return msgspec.json.format(text, indent=-1)
    except RecursionError:
        return _STRING_OR_BLANKS.sub(r"\1", text)


def _normalize_string(match: re.Match[str]) -> str:
    string = match[1]
    if string is None:
        return ""
    if "\\" not in string:
        return string
    # The type json accepts a lone surrogate, for which PocketBase has U+FFFD.
    return msgspec.json.encode(_SURROGATE.sub("\ufffd", json.loads(string))).decode()


def _geo_point_of_point(text: str) -> Json:
    lon, _, lat = text[1:-1].partition(",")
    return {"lon": _float8(lon), "lat": _float8(lat)}


def _geometry(text: str) -> Json:
    shape = to_geojson(text)
    return text if shape is None else Raw(shape)


def _geo_point_converter(type_: Type) -> Converter:
    if type_.extension:
        return _geo_point_of_geometry
    return _geo_point_of_point if type_.name == "point" else _geo_point_of_json


def _geo_point_of_geometry(text: str) -> Json:
    lon, lat = point_coordinates(text) or (0.0, 0.0)
    return {"lon": _finite_or_zero(lon), "lat": _finite_or_zero(lat)}


def _geo_point_of_json(text: str) -> Json:
    """Convert an object with two numbers; anything else counts as 0."""
    try:
        value = json.loads(text, parse_int=float)
    except RecursionError:
        value = None
    point = value if isinstance(value, dict) else {}
    return {"lon": _finite_or_zero(point.get("lon")), "lat": _finite_or_zero(point.get("lat"))}


def _finite_or_zero(value: object) -> Json:
    if isinstance(value, float) and isfinite(value):
        return Raw(format_double(value))
    return 0

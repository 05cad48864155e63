"""Turns one value from PostgreSQL's text form into the JSON that PocketBase would show.

The text forms are those under the pinned settings of the replication connection (see
``pgrealtime.changes``). A converter is chosen once per field; ``records.encode`` calls it per row.
What the forms are: protocol page 6.6 to 6.8, and for types that PocketBase doesn't know:

- integers and numerics keep all their digits, a numeric's trailing fraction zeros are dropped;
  floats print as ECMAScript prints a number with these digits; NaN and infinity are null.
- dates beyond 9999 have a longer year (``12024-...``), dates BC the astronomical one (1 BC is
  ``0000-...``, 44 BC ``-0043-...``): PocketBase has neither. Infinite dates are empty.
- bytea is base64, a composite an object of its attributes in order, an array an array. NULL in
  them is null, whatever a field's own NULL is shown as.
- everything else is its text form.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Final, TypeAlias

import msgspec

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.collections import Field, FieldKind
from pgrealtime.records.text_forms import Element, parse_array, parse_row

Converter: TypeAlias = Callable[[str], bytes]
"""From the text form of a value that isn't NULL to its JSON."""

quote: Final[Converter] = msgspec.json.Encoder().encode
"""A JSON string, escaped exactly as protocol page 6.7 wants it (and as msgspec does it)."""

_FLOATS = ("float4", "float8")
_INTEGERS = ("int2", "int4", "int8")
_DATES = ("timestamptz", "timestamp", "date")


def converter(field: Field) -> Converter:
    """Return what makes JSON of the field's values."""
    type_ = field.type.base
    if type_.kind is not TypeKind.ARRAY:
        return _list_of_strings if field.is_multiple else _scalar(field.kind, type_)
    element = _leaf(type_)
    if field.kind in (FieldKind.RELATION, FieldKind.FILE):
        return _unique(element)
    if element.kind is TypeKind.ENUM:
        # An array of an enum is PocketBase's select, which holds no option twice.
        return _unique(element)
    return _array(_scalar(field.kind, element), element)


def zero(field: Field) -> bytes:
    """Return the JSON of a field without a value, as PocketBase has it."""
    if field.is_multiple:
        return b"[]"
    match field.kind:
        case FieldKind.NUMBER:
            return b"0"
        case FieldKind.BOOL:
            return b"false"
        case FieldKind.JSON | FieldKind.COMPOSITE:
            return b"null"
        case FieldKind.GEO:
            return b'{"lon":0,"lat":0}'
        case _:
            return b'""'


def ids(values: Iterable[str | None]) -> bytes:
    """Return the JSON array of ids or options: none empty, none twice, in order."""
    return msgspec.json.encode(list(dict.fromkeys(value for value in values if value)))


def _scalar(kind: FieldKind, type_: Type) -> Converter:
    match kind:
        case FieldKind.NUMBER:
            return _number_of(type_)
        case FieldKind.BOOL:
            return _bool
        case FieldKind.DATE:
            return _timestamptz if type_.name == "timestamptz" else _date
        case FieldKind.JSON:
            return _jsonb if type_.name == "jsonb" else _json
        case FieldKind.GEO:
            return _point if type_.name == "point" else _geo
        case FieldKind.BYTES:
            return _bytea
        case FieldKind.COMPOSITE:
            return _composite(type_)
        case FieldKind.TEXT | FieldKind.RELATION | FieldKind.FILE:
            return quote


def _of_type(type_: Type) -> Converter:
    """What is inside arrays and composites has a type but no field."""
    type_ = type_.base
    if type_.kind is TypeKind.ARRAY:
        element = _leaf(type_)
        return _array(_of_type(element), element)
    return _scalar(_kind(type_), type_)


def _kind(type_: Type) -> FieldKind:
    if type_.kind is TypeKind.COMPOSITE:
        return FieldKind.COMPOSITE
    name = type_.name
    if name in _INTEGERS or name in _FLOATS or name == "numeric":
        return FieldKind.NUMBER
    if name in _DATES:
        return FieldKind.DATE
    by_name = {
        "bool": FieldKind.BOOL,
        "json": FieldKind.JSON,
        "jsonb": FieldKind.JSON,
        "point": FieldKind.GEO,
        "bytea": FieldKind.BYTES,
    }
    return by_name.get(name, FieldKind.TEXT)


def _leaf(array: Type) -> Type:
    assert array.element is not None
    return array.element.base


# Arrays and composites.


def _array(convert: Converter, element: Type) -> Converter:
    if element.kind is TypeKind.ARRAY:  # a domain over an array, as an element
        convert = _of_type(element)
    elements = _elements(element)

    def encode(items: list[Element]) -> bytes:
        return b"[%b]" % b",".join([encode_item(item) for item in items])

    def encode_item(item: Element) -> bytes:
        match item:
            case None:
                return b"null"
            case str():
                return convert(item)
            case _:
                return encode(item)

    return lambda text: encode(elements(text))


def _elements(element: Type) -> Callable[[str], list[Element]]:
    delimiter = ";" if element.name == "box" else ","
    return lambda text: parse_array(text, delimiter)


def _unique(element: Type) -> Converter:
    elements = _elements(element)
    return lambda text: ids(item for item in elements(text) if isinstance(item, str))


def _list_of_strings(text: str) -> bytes:
    """A multiple field in a column that isn't an array: a JSON list, or the only element."""
    if text.startswith("["):
        try:
            return ids(msgspec.json.decode(text, type=list[str]))
        except msgspec.DecodeError:
            pass
    return ids([text])


def _composite(type_: Type) -> Converter:
    members = [(quote(name) + b":", _of_type(inner)) for name, inner in type_.base.attributes]

    def encode(text: str) -> bytes:
        return b"{%b}" % b",".join(
            [
                head + (b"null" if value is None else convert(value))
                for (head, convert), value in zip(members, parse_row(text), strict=False)
            ]
        )

    return encode


# Numbers.

_DECIMAL = re.compile(r"\s*([+-]?)0*(\d+)(?:\.(\d+))?\s*", re.ASCII)


def _number_of(type_: Type) -> Converter:
    if type_.name in _INTEGERS:
        return str.encode
    if type_.name in _FLOATS:
        return _float
    return _numeric if type_.name == "numeric" else _number


def _numeric(text: str) -> bytes:
    if "." in text:
        return text.rstrip("0").rstrip(".").encode()
    return b"null" if text[-1] in "Ny" else text.encode()  # NaN, Infinity


def _float(text: str) -> bytes:
    if "e" in text:
        return _ecmascript(text).encode()
    return b"null" if text[-1] in "Ny" else text.encode()


def _ecmascript(text: str) -> str:
    """Print a number in exponent form as ECMAScript does (Number::toString), with its digits.

    PostgreSQL has written the shortest digits that read back as the same float4 or float8.
    """
    mantissa, _, exponent = text.partition("e")
    sign = "-" if mantissa[0] == "-" else ""
    digits = mantissa.lstrip("-").replace(".", "")
    point = int(exponent) + 1  # the value is 0.DIGITS times ten to this power
    if len(digits) <= point <= 21:  # noqa: PLR2004 (ECMAScript's own bound)
        return sign + digits.ljust(point, "0")
    if -6 < point <= 0:  # noqa: PLR2004 (likewise)
        return f"{sign}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{fraction}e{point - 1:+d}"


def _number(text: str) -> bytes:
    """A number in a column of another type; 0 if it can't be read, as PocketBase shows it."""
    if plain := _DECIMAL.fullmatch(text):
        sign, whole, fraction = plain.groups()
        minus = "-" if sign == "-" else ""
        return _numeric(f"{minus}{whole}.{fraction or 0}")
    try:
        value = float(text)
    except ValueError:
        return b"0"
    return _float(repr(value).removesuffix(".0")) if isfinite(value) else b"null"


# Booleans, dates, bytes.

_TRUE = frozenset(("t", "true", "T", "TRUE", "True", "1"))
_DATE = re.compile(
    r"(\d{4,})(-\d\d-\d\d)(?: (\d\d:\d\d:\d\d)(?:\.(\d+))?)?(?:\+00)?( BC)?", re.ASCII
)
_SECONDS = slice(19)  # YYYY-MM-DD hh:mm:ss


def _bool(text: str) -> bytes:
    return b"true" if text in _TRUE else b"false"


def _timestamptz(text: str) -> bytes:
    if text[4] == "-" and text[-3:] == "+00":
        return f'"{text[_SECONDS]}.{text[20:-3]:0<3.3}Z"'.encode()
    return _date(text)


def _date(text: str) -> bytes:
    date = _DATE.fullmatch(text)
    if date is None:  # infinity, -infinity; or no date at all
        return b'""'
    year, day, time, fraction, era = date.groups(default="")
    if era:
        year = f"{1 - int(year):05d}" if int(year) > 1 else "0000"
    return f'"{year}{day} {time or "00:00:00"}.{fraction:0<3.3}Z"'.encode()


def _bytea(text: str) -> bytes:
    return b'"%b"' % b64encode(bytes.fromhex(text[2:]))


# JSON and places.

_STRING_OR_BLANKS = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|[ \t\r\n]+')
_NUMBER_TEXT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def _jsonb(text: str) -> bytes:
    """What jsonb prints only has blanks to lose: its strings are escaped as ours."""
    if text[0] not in "{[":
        return text.encode()
    try:
        return msgspec.json.format(text, indent=-1).encode()
    except RecursionError:
        return _compact(text)


def _json(text: str) -> bytes:
    text = text.strip(" \t\r\n")
    if not text:
        return b"null"
    if "\\" not in text and text[0] in "{[":
        try:
            return msgspec.json.format(text, indent=-1).encode()
        except (RecursionError, msgspec.DecodeError):
            pass
    return _compact(text)


def _compact(text: str) -> bytes:
    return _STRING_OR_BLANKS.sub(_string, text).encode()


def _string(match: re.Match[str]) -> str:
    string = match[1]
    if string is None:
        return ""
    if "\\" not in string:
        return string
    return quote(_unescape(string)).decode()


def _unescape(string: str) -> str:
    # msgspec refuses half a surrogate pair, which PostgreSQL's json type lets through.
    value: str = msgspec.json.decode(string)
    return value


def _point(text: str) -> bytes:
    lon, _, lat = text[1:-1].partition(",")
    return _place(_float(lon), _float(lat))


def _geo(text: str) -> bytes:
    try:
        place = msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError:
        place = {}
    return _place(_coordinate(place.get("lon")), _coordinate(place.get("lat")))


def _coordinate(value: object) -> bytes:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _number(str(value)) if is_number else b"0"


def _place(lon: bytes, lat: bytes) -> bytes:
    return b'{"lon":%b,"lat":%b}' % (lon, lat)

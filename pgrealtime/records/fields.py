"""Parses the option ``fields`` and compiles it to projections of members (protocol, 5.6).

Used by ``records.encode`` and ``api.json_response``. Details not in that document are as observed
with PocketBase 0.40.6, with which the conformance tests compare. One deliberate difference: numbers
in selected members keep their digits, PocketBase prints them anew.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec
from msgspec import Raw

from pgrealtime.records.excerpt import excerpt
from pgrealtime.records.values import Json


@dataclass(frozen=True, slots=True)
class ExcerptModifier:
    """The modifier ``excerpt(max,withEllipsis)``; applies to strings only."""

    max_characters: int
    with_ellipsis: bool = False


Fields: TypeAlias = Mapping[str, ExcerptModifier | None]
"""Modifiers by dotted path; the path ``*`` is for members that no other path names."""

Projection: TypeAlias = Callable[[Json], Json]
"""Returns what is shown of a member's value."""

MemberProjections: TypeAlias = Callable[[str], Projection | None]
"""Returns a member's projection by its name; None if it isn't shown."""

_BLANKS: Final = "\t\n\v\f\r \x85\xa0"
_QUOTES: Final = "'\"`"
_PIECE = re.compile(r"[^\\'\"`(), ]+|.", re.DOTALL)
"""A run of characters without meaning to ``_split_unquoted``, or one that may have some."""
_TRUE_WORDS: Final = frozenset(("1", "t", "T", "true", "TRUE", "True"))
_INTEGER = re.compile(
    r"\+?(0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO]?(?:_?[0-7])+|"
    r"[1-9](?:_?[0-9])*)",
    re.ASCII,
)
_WITH_FRACTION = re.compile(r"([+-]?[0-9]*)\.[0-9]*", re.ASCII)
_MAX_INT64: Final = 2**63 - 1


def parse_fields(text: str) -> Fields | None:
    """Parse the option; empty selects everything, None is a syntax error.

    Names of members that don't exist are valid and select nothing.
    """
    items = _split_unquoted(text, ",")
    if items is None:
        return None
    fields: dict[str, ExcerptModifier | None] = {}
    for item in items:
        path, colon, modifier = item.partition(":")
        fields[path] = None
        if colon:
            fields[path] = parsed = _parse_modifier(modifier)
            if parsed is None:
                return None
    return fields


def _parse_modifier(text: str) -> ExcerptModifier | None:
    match _split_unquoted(text, "(), ", respects_brackets=False):
        case ["excerpt", limit, *more] if len(more) <= 1:
            number = _parse_positive_integer(limit)
            with_ellipsis = bool(more) and more[0] in _TRUE_WORDS
            return ExcerptModifier(number, with_ellipsis) if number else None
        case _:
            return None


def _parse_positive_integer(text: str) -> int | None:
    """Parse as PocketBase does: prefixes and underscores are allowed, a fraction is cut off."""
    if fraction := _WITH_FRACTION.fullmatch(text):
        text = fraction[1]
    integer = _INTEGER.fullmatch(text)
    if integer is None:
        return None
    digits = integer[1].lower()
    is_octal = digits[0] == "0" and digits[1] not in "xbo"
    value = int(digits, 8) if is_octal else int(digits, 0)
    return value if value <= _MAX_INT64 else None


def _split_unquoted(
    text: str, separators: str, *, respects_brackets: bool = True
) -> list[str] | None:
    """Split at separators outside quotes and brackets; None if one of these isn't closed.

    Quotes and brackets stay. A backslash escapes a quote or bracket, but no separator.
    """
    items: list[list[str]] = [[]]
    depth, quote, before = 0, "", ""
    for piece in _PIECE.findall(text):
        if before == "\\":
            pass
        elif piece in _QUOTES:
            quote = "" if quote == piece else quote or piece
        elif respects_brackets and not quote and piece == "(":
            depth += 1
        elif respects_brackets and not quote and piece == ")":
            depth = max(depth - 1, 0)
        before = piece[-1]
        if piece in separators and not depth and not quote:
            items.append([])
        else:
            items[-1].append(piece)
    if depth or quote:
        return None
    return [item for item in ("".join(item).strip(_BLANKS) for item in items) if item]


def compile_projections(fields: Fields) -> MemberProjections:
    """Return the projections of members, by name."""
    if not fields:
        return lambda _name: project_all
    by_first: dict[str, dict[str, ExcerptModifier | None]] = {}
    for path, modifier in fields.items():
        by_first.setdefault(_first_name(path), {})[path] = modifier

    def projection_of(name: str) -> Projection | None:
        candidates = by_first.get(_first_name(name), {}).items()
        nested = {path: more for path, more in candidates if f"{path}.".startswith(f"{name}.")}
        if nested:
            return _nested_projection(name, nested)
        return _modifier_projection(fields["*"]) if "*" in fields else None

    return projection_of


def _first_name(path: str) -> str:
    return path.partition(".")[0]


def _nested_projection(name: str, nested_fields: Fields) -> Projection:
    for path, modifier in nested_fields.items():
        if path in (name, f"{name}."):
            return _modifier_projection(modifier)
    start = len(name) + 1
    inner = compile_projections({path[start:]: more for path, more in nested_fields.items()})

    def project(value: Json) -> Json:
        try:
            return Raw(msgspec.json.encode(apply_projections(value, inner)))
        except RecursionError:  # a path of hundreds of names into a value as deep
            return value

    return project


def project_all(value: Json) -> Json:
    """Return the value unchanged."""
    return value


def _modifier_projection(modifier: ExcerptModifier | None) -> Projection:
    if modifier is None:
        return project_all

    def shorten(value: Json) -> Json:
        if isinstance(value, Raw) and bytes(value)[:1] == b'"':
            value = msgspec.json.decode(value, type=str)
        if not isinstance(value, str):
            return value
        return excerpt(value, modifier.max_characters, with_ellipsis=modifier.with_ellipsis)

    return shorten


def apply_projections(value: Json, projections: MemberProjections) -> Json:
    """Project an object, or each of a list of objects; return anything else unchanged."""
    value = _decode_one_level(value)
    match value:
        case dict():
            return {
                name: project(member)
                for name, member in value.items()
                if (project := projections(name)) is not None
            }
        case [first, *_] if isinstance(_decode_one_level(first), dict):
            return [apply_projections(item, projections) for item in value]
        case _:
            return value


def _decode_one_level(value: Json) -> Json:
    """Decode a JSON object or list, its members left as Raw; return anything else unchanged."""
    if not isinstance(value, Raw):
        return value
    match bytes(value)[:1]:
        case b"{":
            return {**msgspec.json.decode(value, type=dict[str, Raw])}
        case b"[":
            return [*msgspec.json.decode(value, type=list[Raw])]
        case _:
            return value

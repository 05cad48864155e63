"""The option ``fields``: which members of a record a subscriber asked for (protocol page 5.6).

What is left open there was seen on PocketBase 0.40.6, which the integration tests ask again.
One deliberate difference: picked numbers keep their spelling, PocketBase prints them anew.
"""

from __future__ import annotations

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
    """The modifier ``excerpt(max,withEllipsis)``; touches strings only."""

    max_characters: int
    """In characters, at least 1."""
    with_ellipsis: bool = False


Fields: TypeAlias = Mapping[str, ExcerptModifier | None]
"""Dotted paths, or ``*`` for what no path names, to their modifier."""

Projection: TypeAlias = Callable[[Json], Json]
"""From a member's value to what is shown of it."""

MemberProjections: TypeAlias = Callable[[str], Projection | None]
"""From a member's name to its pick; None leaves it out."""

_BLANKS: Final = "\t\n\v\f\r \x85\xa0"
_QUOTES: Final = "'\"`"
_PIECE = re.compile(r"[^\\'\"`(), ]+|.", re.DOTALL)
"""What means nothing to ``_split``, in one; and each character that may mean something."""
_TRUE_WORDS: Final = frozenset(("1", "t", "T", "true", "TRUE", "True"))
_INTEGER = re.compile(
    r"\+?(0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO]?(?:_?[0-7])+|"
    r"[1-9](?:_?[0-9])*)",
    re.ASCII,
)
_WITH_FRACTION = re.compile(r"([+-]?[0-9]*)\.[0-9]*", re.ASCII)
_MAX_INT64: Final = 2**63 - 1


def parse_fields(text: str) -> Fields | None:
    """Return what the text asks for; empty asks for everything, None is not of the language.

    Names need not exist: those that don't select nothing.
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
    words = _split_unquoted(text, "(), ", respects_brackets=False)
    match words:
        case ["excerpt", limit, *more] if len(more) <= 1:
            number = _parse_positive_integer(limit)
            with_ellipsis = bool(more) and more[0] in _TRUE_WORDS
            return ExcerptModifier(number, with_ellipsis) if number else None
        case _:
            return None


def _parse_positive_integer(text: str) -> int | None:
    """Read a positive number as PocketBase does: prefixes, underscores, a fraction cut off."""
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
    """Cut at separators outside quotes and brackets; None if one of these stays open.

    Quotes and brackets remain part of the items. A backslash takes the meaning of the
    character after it, except that of a separator.
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
    """Return what is shown of a member, by its name."""
    if not fields:
        return lambda _name: project_all
    by_first: dict[str, dict[str, ExcerptModifier | None]] = {}
    for path, modifier in fields.items():
        by_first.setdefault(_first_name(path), {})[path] = modifier

    def pick_of(name: str) -> Projection | None:
        near = by_first.get(_first_name(name), {})
        below = {path: modifier for path, modifier in near.items() if _is_within(path, name)}
        if below:
            return _nested_projection(name, below)
        return _projection_of(fields["*"]) if "*" in fields else None

    return pick_of


def _first_name(path: str) -> str:
    return path.partition(".")[0]


def _nested_projection(name: str, nested_fields: Fields) -> Projection:
    for path, modifier in nested_fields.items():
        if path in (name, f"{name}."):
            return _projection_of(modifier)
    inner = compile_projections(
        {path[len(name) + 1 :]: modifier for path, modifier in nested_fields.items()}
    )

    def pick(value: Json) -> Json:
        try:
            return Raw(msgspec.json.encode(_project(value, inner)))
        except RecursionError:  # a path of hundreds of names into a value as deep
            return value

    return pick


def _is_within(path: str, name: str) -> bool:
    return f"{path}.".startswith(f"{name}.")


def project_all(value: Json) -> Json:
    """Return the value as it is: the pick that leaves all of it."""
    return value


def _projection_of(modifier: ExcerptModifier | None) -> Projection:
    if modifier is None:
        return project_all

    def cut(value: Json) -> Json:
        if isinstance(value, Raw) and bytes(value)[:1] == b'"':
            value = msgspec.json.decode(value, type=str)
        if not isinstance(value, str):
            return value
        return excerpt(value, modifier.max_characters, with_ellipsis=modifier.with_ellipsis)

    return cut


def _project(value: Json, projections: MemberProjections) -> Json:
    """Pick from an object or a list of objects; anything else is taken whole."""
    value = _decode_one_level(value)
    match value:
        case dict():
            picks = ((name, member, projections(name)) for name, member in value.items())
            return {name: pick(member) for name, member, pick in picks if pick is not None}
        case [first, *_] if isinstance(_decode_one_level(first), dict):
            return [_project(item, projections) for item in value]
        case _:
            return value


def _decode_one_level(value: Json) -> Json:
    """Return an object or list of JSON as such, its members still closed."""
    if not isinstance(value, Raw):
        return value
    match bytes(value)[:1]:
        case b"{":
            members: dict[str, Json] = dict(msgspec.json.decode(value, type=dict[str, Raw]))
            return members
        case b"[":
            items: list[Json] = list(msgspec.json.decode(value, type=list[Raw]))
            return items
        case _:
            return value

"""Decides what a comparison means in SQLite: affinity, NULL, match-all. Both backends obey it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.parameters import (
    Parameter,
    RequestValue,
    Shape,
    shape,
)
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
    Strftime,
    Term,
)


class Rank(Enum):
    """SQLite's affinity: which side is converted to the other's kind."""

    NUMERIC = auto()
    TEXT = auto()
    NONE = auto()


class Nulls(Enum):
    """How ``=`` treats NULL on this side."""

    AUTO = auto()
    """NULL and the empty text are alike."""
    OFF = auto()
    """NULL is only itself."""
    ENFORCED = auto()
    """As AUTO, and nothing is known about the value beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """All that decides how an operand is compared."""

    rank: Rank
    nulls: Nulls = Nulls.AUTO
    is_empty: bool = False
    """Known beforehand to be NULL or the empty text."""
    is_filled: bool = False
    """Known beforehand to be neither."""
    is_flag: bool = False
    """``:isset``, which SQLite sees as the word TRUE or FALSE. On the right side of ``IS`` and
    ``IS NOT`` (``NULL_SAFE``, and ``!=`` of ``PLAIN``) that asks for the other side's truth."""
    has_constants: bool = False
    """A function with something in its arguments that isn't empty, whatever comes out of it."""

    def opposed(self) -> Traits:
        """Return how it counts while a counter-example is sought among the other side's values.

        PocketBase takes NULL for empty then, whatever the operand, and a function with constants
        in its arguments for something, as it does with a constant.
        """
        is_filled = self.is_filled or (self.nulls is not Nulls.AUTO and self.has_constants)
        return replace(self, nulls=Nulls.AUTO, is_filled=is_filled)


class Equality(Enum):
    """Which of the five meanings ``=`` and ``!=`` have."""

    NULL_SAFE = auto()
    """``L IS R``; ``L IS NOT R``."""
    CONSTANT = auto()
    """Both are empty: true; false."""
    PLAIN = auto()
    """``L = R``; ``L IS NOT R``."""
    EMPTY = auto()
    """One is empty, ``X = '' OR X IS NULL`` of the other; the opposite of it."""
    COALESCED = auto()
    """``COALESCE(L, '') = COALESCE(R, '')`` without conversion; the opposite of it."""


def traits(term: Term, shapes: Mapping[Parameter, Shape]) -> Traits:
    """Return the traits of an operand whose parameters have these classes."""
    match term:
        case Constant(parameter):
            is_empty = shapes[parameter].is_empty
            is_flag = isinstance(parameter, RequestValue) and parameter.is_set
            return Traits(
                rank=Rank.NONE, is_empty=is_empty, is_filled=not is_empty, is_flag=is_flag
            )
        case NoItem():
            return Traits(rank=Rank.NONE, is_filled=True)
        case Keyword(value):
            return Traits(rank=Rank.NONE, is_empty=value is None, is_filled=value is not None)
        case FieldValue(field=field_, part=Part.WHOLE):
            return Traits(rank=_rank(field_))
        case Hidden(part=Part.WHOLE):
            return Traits(rank=Rank.TEXT)
        case FieldValue() | Hidden() | Item():
            return Traits(rank=_rank_of_part(term))
        case JsonValue():
            return Traits(rank=Rank.NONE, nulls=Nulls.OFF)
        case GeoDistance(args):
            given = [shapes[arg.parameter] for arg in args if isinstance(arg, Constant)]
            return Traits(rank=Rank.NONE, nulls=Nulls.OFF, has_constants=_are_something(given))
        case Strftime(layout, time, modifiers):
            given = [shape(text) for text in (layout, *modifiers)]
            given += [shapes[time.parameter]] if isinstance(time, Constant) else []
            return Traits(rank=Rank.NONE, nulls=Nulls.ENFORCED, has_constants=_are_something(given))


def _are_something(given: Iterable[Shape]) -> bool:
    """Whether there are constants, none of them the empty text; missing ones are no constants."""
    present = [one for one in given if one is not Shape.ABSENT]
    return bool(present) and Shape.EMPTY not in present


_NUMERIC = frozenset({FieldKind.NUMBER, FieldKind.BOOL})


def _rank_of_part(term: FieldValue | Hidden | Item) -> Rank:
    is_numeric = isinstance(term, Item) and term.kind in _NUMERIC
    return Rank.NUMERIC if is_numeric else Rank.NONE


def _rank(field_: Field) -> Rank:
    if field_.is_multiple or field_.kind in _NUMERIC or field_.kind is FieldKind.GEO:
        return Rank.NUMERIC
    return Rank.TEXT


def equality(left: Traits, right: Traits) -> Equality:
    """Return what ``=`` between the two means; the first case that applies."""
    if Nulls.OFF in {left.nulls, right.nulls}:
        return Equality.NULL_SAFE
    if left.is_empty and right.is_empty:
        return Equality.CONSTANT
    if left.is_filled or right.is_filled:
        return Equality.PLAIN
    if left.is_empty or right.is_empty:
        return Equality.EMPTY
    return Equality.COALESCED

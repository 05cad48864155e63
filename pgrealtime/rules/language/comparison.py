"""Decides what a comparison means in SQLite: affinity, NULL, match-all. Both backends obey it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.parameters import (
    Parameter,
    ParameterClass,
    RequestValue,
    parameter_class,
)
from pgrealtime.rules.language.predicate import (
    AbsentEach,
    EachTerm,
    EachValue,
    FieldValue,
    GeoDistance,
    JsonValue,
    Keyword,
    Modifier,
    ParameterTerm,
    SecretTerm,
    Strftime,
    Term,
    row_path_of,
)


class Affinity(Enum):
    """SQLite's affinity: which side is converted to the other's kind."""

    NUMERIC = auto()
    TEXT = auto()
    NONE = auto()


class NullFallback(Enum):
    """How ``=`` treats NULL on this side."""

    AUTO = auto()
    """NULL and the empty text are alike."""
    DISABLED = auto()
    """NULL is only itself."""
    ENFORCED = auto()
    """As AUTO, and nothing is known about the value beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """All that decides how an operand is compared."""

    affinity: Affinity
    null_fallback: NullFallback = NullFallback.AUTO
    is_empty: bool = False
    """Known beforehand to be NULL or the empty text."""
    is_nonempty: bool = False
    """Known beforehand to be neither."""
    is_isset: bool = False
    """``:isset``, which SQLite sees as the word TRUE or FALSE. On the right side of ``IS`` and
    ``IS EXCEPT`` (``NULL_SAFE``, and ``!=`` of ``PLAIN``) that asks for the other side's truth."""
    has_constants: bool = False
    """A function with something in its arguments that isn't empty, whatever comes out of it."""

    def for_counterexample(self) -> Traits:
        """Return how it counts while a counter-example is sought among the other side's values.

        PocketBase takes NULL for empty then, whatever the operand, and a function with constants
        in its arguments for something, as it does with a constant.
        """
        is_filled = self.is_nonempty or (
            self.null_fallback is not NullFallback.AUTO and self.has_constants
        )
        return replace(self, null_fallback=NullFallback.AUTO, is_nonempty=is_filled)


class Equality(Enum):
    """Which of the five meanings ``=`` and ``!=`` have."""

    NULL_SAFE = auto()
    """``L IS R``; ``L IS EXCEPT R``."""
    CONSTANT = auto()
    """Both are empty: true; false."""
    PLAIN = auto()
    """``L = R``; ``L IS EXCEPT R``."""
    EMPTY = auto()
    """One is empty, ``X = '' OR X IS NULL`` of the other; the opposite of it."""
    COALESCED = auto()
    """``COALESCE(L, '') = COALESCE(R, '')`` without conversion; the opposite of it."""


def traits(term: Term, parameter_classes: Mapping[Parameter, ParameterClass]) -> Traits:
    """Return the traits of an operand whose parameters have these classes."""
    match term:
        case ParameterTerm(parameter):
            is_empty = parameter_classes[parameter].is_empty
            is_flag = isinstance(parameter, RequestValue) and parameter.is_isset
            return Traits(
                affinity=Affinity.NONE,
                is_empty=is_empty,
                is_nonempty=not is_empty,
                is_isset=is_flag,
            )
        case AbsentEach():
            return Traits(affinity=Affinity.NONE, is_nonempty=True)
        case Keyword(value):
            return Traits(
                affinity=Affinity.NONE, is_empty=value is None, is_nonempty=value is not None
            )
        case FieldValue(field=field_, modifier=Modifier.WHOLE):
            return Traits(affinity=_affinity(field_))
        case SecretTerm(modifier=Modifier.WHOLE):
            return Traits(affinity=Affinity.TEXT)
        case FieldValue() | SecretTerm() | EachTerm():
            return Traits(affinity=_affinity_with_modifier(term))
        case JsonValue():
            return Traits(affinity=Affinity.NONE, null_fallback=NullFallback.DISABLED)
        case GeoDistance(args):
            given = [
                parameter_classes[arg.parameter] for arg in args if isinstance(arg, ParameterTerm)
            ]
            return Traits(
                affinity=Affinity.NONE,
                null_fallback=NullFallback.DISABLED,
                has_constants=_has_constants(given),
            )
        case Strftime(layout, time, modifiers):
            given = [parameter_class(text) for text in (layout, *modifiers)]
            given += [parameter_classes[time.parameter]] if isinstance(time, ParameterTerm) else []
            return Traits(
                affinity=Affinity.NONE,
                null_fallback=NullFallback.ENFORCED,
                has_constants=_has_constants(given),
            )


def _has_constants(classes: Iterable[ParameterClass]) -> bool:
    """Whether there are constants, none of them the empty text; missing ones are no constants."""
    present = [one for one in classes if one is not ParameterClass.ABSENT]
    return bool(present) and ParameterClass.EMPTY not in present


_NUMERIC_KINDS = frozenset({FieldKind.NUMBER, FieldKind.BOOL})


def _affinity_with_modifier(term: FieldValue | SecretTerm | EachTerm) -> Affinity:
    is_numeric = isinstance(term, EachTerm) and term.kind in _NUMERIC_KINDS
    return Affinity.NUMERIC if is_numeric else Affinity.NONE


def _affinity(field_: Field) -> Affinity:
    if field_.is_multiple or field_.kind in _NUMERIC_KINDS or field_.kind is FieldKind.GEO_POINT:
        return Affinity.NUMERIC
    return Affinity.TEXT


def equality(left: Traits, right: Traits) -> Equality:
    """Return what ``=`` between the two means; the first case that applies."""
    if NullFallback.DISABLED in {left.null_fallback, right.null_fallback}:
        return Equality.NULL_SAFE
    if left.is_empty and right.is_empty:
        return Equality.CONSTANT
    if left.is_nonempty or right.is_nonempty:
        return Equality.PLAIN
    if left.is_empty or right.is_empty:
        return Equality.EMPTY
    return Equality.COALESCED


def is_multiple(term: Term) -> bool:
    """Whether a comparison of it without ``?`` must hold for all of its values."""
    if isinstance(term, AbsentEach):
        return term.is_multiple
    place = row_path_of(term)
    return place is not None and place.is_multiple


def is_double(term: Term) -> bool:
    """Whether its numbers are double precision: all others are exact.

    What is compared with them is compared as doubles.
    """
    match term:
        case FieldValue(field=field_, modifier=Modifier.WHOLE | Modifier.EACH) if (
            not field_.is_multiple
        ):
            return field_.kind is FieldKind.NUMBER and field_.type.base.name in _DOUBLE_TYPES
        case EachTerm(place) if isinstance(place.steps[-1], EachValue):
            element = place.steps[-1].field.type.base.element
            is_number = term.kind is FieldKind.NUMBER
            return is_number and element is not None and element.base.name in _DOUBLE_TYPES
        case JsonValue(field=field_):
            return field_.kind is FieldKind.GEO_POINT and not field_.is_stored_as_json
        case GeoDistance():
            return True
        case _:
            return False


_DOUBLE_TYPES = frozenset({"float4", "float8"})

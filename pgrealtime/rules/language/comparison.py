"""Decides what a comparison means in SQLite: affinity, NULL, match-all, LIKE patterns.

``plan_comparison`` is called once per comparison when a rule is compiled. ``sql.conditions`` and
``memory.conditions`` only render its result, so that the two cannot disagree about the meaning.
The rules are those of PocketBase's ``tools/search/filter.go`` (``resolveEqualExpr``,
``manyVsManyExpr``, ``manyVsOneExpr``, ``wrapLikeParams``) and of SQLite's documentation,
"Datatypes In SQLite", sections 3 and 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from pgrealtime.collections.model import FieldKind
from pgrealtime.rules.language.parameters import (
    Parameter,
    ParameterClass,
    RequestValue,
    parameter_class,
)
from pgrealtime.rules.language.predicate import (
    AbsentEach,
    Comparison,
    EachTerm,
    EachValue,
    FieldValue,
    GeoDistance,
    JsonValue,
    Keyword,
    Modifier,
    ParameterTerm,
    RowPath,
    SecretTerm,
    Strftime,
    Term,
    is_multiple,
)
from pgrealtime.rules.language.sqlite_values import like_pattern
from pgrealtime.rules.language.syntax import Op

# --- the plan


class ComparisonKind(Enum):
    """What two values are asked. ``is_negated`` asks for the opposite of all but ORDER."""

    LIKE = auto()
    """LIKE with the right side as the pattern, ASCII letters without case."""
    LIKE_NOTHING = auto()
    """LIKE with a pattern that matches no text: unknown if the left side is NULL, else false."""
    ORDER = auto()
    """``L < R`` and the other orders."""
    CONSTANT = auto()
    """True: both sides are known to be empty."""
    BLANK = auto()
    """``L = '' OR L IS NULL``; the right side is known to be empty and is not evaluated."""
    TRUTH = auto()
    """``L IS TRUE`` or ``L IS FALSE``: the right side is ``:isset``."""
    EQUAL = auto()
    """``L = R``: unknown if a side is NULL."""
    NOT_DISTINCT = auto()
    """``L IS R``, which is never unknown."""
    COALESCED = auto()
    """``COALESCE(L, '') = COALESCE(R, '')``, without conversion."""


class Conversion(Enum):
    """How SQLite's affinity converts an operand before it is compared."""

    NONE = auto()
    NUMBER = auto()
    """Texts that look like numbers become numbers."""
    TEXT = auto()
    """Numbers become texts."""


class Pattern(Enum):
    """Where the pattern of a LIKE comes from."""

    NULL = auto()
    """There is none: the result is unknown."""
    BOUND = auto()
    """The right side's parameter, in the form ``SqlForm.PATTERN``."""
    TEXT = auto()
    """The right side's text as it is."""
    WRAPPED = auto()
    """The right side's text between two ``%``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOperand:
    """One side of a comparison and what is done with its value."""

    term: Term
    conversion: Conversion = Conversion.NONE
    is_made_double: bool = False
    """Its exact numbers become double precision, because the other side's numbers are."""
    is_empty_text: bool = False
    """It is known to be empty, and is compared as the empty text whatever it is."""
    is_json_text: bool = False
    """A constant that meets a JSON value: compared in the form ``SqlForm.JSON``."""
    is_searched: bool = False
    """All of its values are compared: it needs joins, or items, of its own."""


@dataclass(frozen=True, slots=True)
class ValueComparison:
    """A comparison of one value with one value."""

    kind: ComparisonKind
    op: Op
    left: PlannedOperand
    right: PlannedOperand
    is_null_safe: bool = False
    """NULL and the empty text are different values."""
    pattern: Pattern = Pattern.NULL
    """Of LIKE."""

    @property
    def is_negated(self) -> bool:
        """Whether the opposite of ``kind`` is asked; unknown stays unknown."""
        return self.op in {Op.NE, Op.NOT_LIKE}


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What a comparison of a rule asks: ``shared``, and no value for which ``searched`` is false.

    ``shared`` speaks of the rows that all comparisons of the scope share. ``searched`` is None
    unless every value of a multiple path must agree (match-all).
    """

    shared: ValueComparison
    searched: ValueComparison | None = None


def plan_comparison(
    comparison: Comparison, parameter_classes: Mapping[Parameter, ParameterClass]
) -> ComparisonPlan:
    """Return what the comparison means for parameters of these classes."""
    op = comparison.op
    terms = comparison.left, comparison.right
    left, right = (_Side(term, traits(term, parameter_classes)) for term in terms)
    is_left_searched = not comparison.is_any and is_multiple(comparison.left)
    is_right_searched = not comparison.is_any and is_multiple(comparison.right)
    if not (is_left_searched or is_right_searched):
        return ComparisonPlan(_plan_values(op, left, right))
    shared_right = replace(right, is_bare_pattern=True) if is_right_searched else right
    left_of_search = _side_of_search(left, is_searched=is_left_searched)
    right_of_search = _side_of_search(right, is_searched=is_right_searched)
    return ComparisonPlan(
        _plan_values(op, left, shared_right), _plan_values(op, left_of_search, right_of_search)
    )


def plan_values(
    op: Op, left: Term, right: Term, parameter_classes: Mapping[Parameter, ParameterClass]
) -> ValueComparison:
    """Return what ``left op right`` means for one value of either."""
    return _plan_values(op, *(_Side(t, traits(t, parameter_classes)) for t in (left, right)))


# --- planning


@dataclass(frozen=True, slots=True)
class _Side:
    term: Term
    traits: Traits
    is_searched: bool = False
    is_bare_pattern: bool = False
    """As the pattern of LIKE a formatted time gets no ``%``.

    PocketBase makes patterns of the constants, which are the format and its modifiers. Where the
    times are searched for a counter-example it undoes that, and puts the ``%`` around each of them.
    """


def _side_of_search(side: _Side, *, is_searched: bool) -> _Side:
    """Return a side as it is compared while a counter-example is searched.

    A side that isn't searched keeps the shared row. PocketBase takes its NULL for empty then,
    whatever the operand, and a function with constants in its arguments for something, as it does
    with a constant.
    """
    if is_searched:
        return replace(side, traits=replace(side.traits, is_nonempty=False), is_searched=True)
    is_nonempty = side.traits.is_nonempty or (
        side.traits.null_fallback is not NullFallback.AUTO and side.traits.has_constants
    )
    counted = replace(side.traits, null_fallback=NullFallback.AUTO, is_nonempty=is_nonempty)
    return replace(side, traits=counted)


def _plan_values(op: Op, left: _Side, right: _Side) -> ValueComparison:
    match op:
        case Op.LIKE | Op.NOT_LIKE:
            return _plan_like(op, left, right)
        case Op.EQ | Op.NE:
            return _plan_equality(op, left, right)
        case Op.LT | Op.LE | Op.GT | Op.GE:
            return ValueComparison(ComparisonKind.ORDER, op, *_comparable(left, right))


def _plan_equality(op: Op, left: _Side, right: _Side) -> ValueComparison:
    """Return the first meaning of ``=`` and ``!=`` that applies."""
    is_null_safe = NullFallback.DISABLED in {left.traits.null_fallback, right.traits.null_fallback}
    if not is_null_safe and not (left.traits.is_nonempty or right.traits.is_nonempty):
        return _plan_equality_of_unknown(op, left, right)
    kind, planned = ComparisonKind.NOT_DISTINCT, _comparable(left, right)
    if op is Op.EQ and not is_null_safe:
        kind = ComparisonKind.EQUAL
    elif right.traits.is_isset:
        kind, planned = ComparisonKind.TRUTH, (_unconverted(left), _unconverted(right))
    planned_left, planned_right = (
        replace(
            operand,
            is_empty_text=side.traits.is_empty and not is_null_safe,
            is_json_text=side.traits.parameter_class in _JSON_SPELLED_CLASSES
            and isinstance(other.term, JsonValue),
        )
        for operand, side, other in zip(planned, (left, right), (right, left), strict=True)
    )
    return ValueComparison(kind, op, planned_left, planned_right, is_null_safe=is_null_safe)


_JSON_SPELLED_CLASSES = frozenset({ParameterClass.TEXT, ParameterClass.DANGLING_ESCAPE})
"""Texts among which are JSON containers. jsonb has an order of keys of its own."""


def _plan_equality_of_unknown(op: Op, left: _Side, right: _Side) -> ValueComparison:
    """Return the meaning where neither side is known to be something, and NULL equals ``''``."""
    is_empty = left.traits.is_empty, right.traits.is_empty
    if any(is_empty):
        kind = ComparisonKind.CONSTANT if all(is_empty) else ComparisonKind.BLANK
        if is_empty[0]:
            left, right = right, left
        planned = _unconverted(left), _unconverted(right)
    else:
        kind = ComparisonKind.COALESCED
        planned = _with_equal_precision(_unconverted(left), _unconverted(right))
    return ValueComparison(kind, op, *planned)


def _comparable(left: _Side, right: _Side) -> tuple[PlannedOperand, PlannedOperand]:
    """Return both sides with SQLite's affinities applied: numeric before text before none."""
    return _with_equal_precision(_converted(left, right), _converted(right, left))


def _converted(side: _Side, other: _Side) -> PlannedOperand:
    match side.traits.affinity, other.traits.affinity:
        case ((Affinity.TEXT | Affinity.NONE), Affinity.NUMERIC):
            return replace(_unconverted(side), conversion=Conversion.NUMBER)
        case Affinity.NONE, Affinity.TEXT:
            return replace(_unconverted(side), conversion=Conversion.TEXT)
        case _:
            return _unconverted(side)


def _unconverted(side: _Side) -> PlannedOperand:
    return PlannedOperand(term=side.term, is_searched=side.is_searched)


def _with_equal_precision(
    left: PlannedOperand, right: PlannedOperand
) -> tuple[PlannedOperand, PlannedOperand]:
    """Return both with numbers that can be compared: exact ones, unless one side is a double."""
    is_left_double, is_right_double = (
        is_double(operand.term) and operand.conversion is not Conversion.TEXT
        for operand in (left, right)
    )
    if is_left_double:
        return left, replace(right, is_made_double=not is_right_double)
    return replace(left, is_made_double=is_right_double), right


def _plan_like(op: Op, left: _Side, right: _Side) -> ValueComparison:
    pattern_term, pattern = _like_pattern(right)
    is_dangling = right.traits.parameter_class is ParameterClass.DANGLING_ESCAPE
    kind = ComparisonKind.LIKE_NOTHING if is_dangling else ComparisonKind.LIKE
    planned_right = replace(_unconverted(right), term=pattern_term)
    return ValueComparison(kind, op, _unconverted(left), planned_right, pattern=pattern)


def _like_pattern(side: _Side) -> tuple[Term, Pattern]:
    """Return what the pattern is read from, and how.

    PocketBase makes patterns of all constants on the right side, those in a function's arguments
    included: a distance from a constant becomes NULL, and a format without ``%`` gets two.
    """
    match side.term:
        case ParameterTerm():
            is_absent = side.traits.parameter_class is ParameterClass.ABSENT
            return side.term, Pattern.NULL if is_absent else Pattern.BOUND
        case GeoDistance(args) if any(isinstance(arg, ParameterTerm) for arg in args):
            return side.term, Pattern.NULL
        case Strftime() if side.is_bare_pattern:
            return side.term, Pattern.TEXT
        case Strftime(layout, time, modifiers) if not side.is_searched:
            if modifiers or isinstance(time, ParameterTerm):
                return side.term, Pattern.NULL
            return Strftime(like_pattern(layout), time, ()), Pattern.TEXT
        case _:
            return side.term, Pattern.WRAPPED


# --- operands


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
    """As AUTO, and nothing is known about the value before it is evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """All that decides how an operand is compared, before its value is known."""

    affinity: Affinity = Affinity.NONE
    null_fallback: NullFallback = NullFallback.AUTO
    is_empty: bool = False
    """Known to be NULL or the empty text."""
    is_nonempty: bool = False
    """Known to be neither."""
    is_isset: bool = False
    """``:isset``, which SQLite sees as the keyword TRUE or FALSE. On the right side of ``IS`` that
    asks for the other side's truth."""
    has_constants: bool = False
    """A function with constants in its arguments, none of them the empty text."""
    parameter_class: ParameterClass | None = None
    """Of a parameter."""


def traits(term: Term, parameter_classes: Mapping[Parameter, ParameterClass]) -> Traits:
    """Return the traits of an operand whose parameters have these classes."""
    match term:
        case ParameterTerm(parameter):
            parameter_class_ = parameter_classes[parameter]
            return Traits(
                is_empty=parameter_class_.is_empty,
                is_nonempty=not parameter_class_.is_empty,
                is_isset=isinstance(parameter, RequestValue) and parameter.is_isset,
                parameter_class=parameter_class_,
            )
        case AbsentEach():
            return Traits(is_nonempty=True)
        case Keyword(value):
            return Traits(is_empty=value is None, is_nonempty=value is not None)
        case FieldValue() | EachTerm() | SecretTerm():
            return Traits(affinity=_affinity(term))
        case JsonValue():
            return Traits(null_fallback=NullFallback.DISABLED)
        case GeoDistance(args):
            has_constants = _has_constants(args, (), parameter_classes)
            return Traits(null_fallback=NullFallback.DISABLED, has_constants=has_constants)
        case Strftime(layout, time, modifiers):
            has_constants = _has_constants((time,), (layout, *modifiers), parameter_classes)
            return Traits(null_fallback=NullFallback.ENFORCED, has_constants=has_constants)


def _has_constants(
    args: Iterable[Term | None],
    texts: Iterable[str],
    parameter_classes: Mapping[Parameter, ParameterClass],
) -> bool:
    """Return whether there are constants, none of them empty; an absent one is no constant."""
    classes = {parameter_class(text) for text in texts}
    classes |= {parameter_classes[arg.parameter] for arg in args if isinstance(arg, ParameterTerm)}
    classes.discard(ParameterClass.ABSENT)
    return bool(classes) and ParameterClass.EMPTY not in classes


_NUMERIC_KINDS = frozenset({FieldKind.NUMBER, FieldKind.BOOL})


def _affinity(term: FieldValue | EachTerm | SecretTerm) -> Affinity:
    """Return the affinity of PocketBase's column; lists and points are of type JSON there."""
    match term:
        case EachTerm(kind=kind):
            return Affinity.NUMERIC if kind in _NUMERIC_KINDS else Affinity.NONE
        case FieldValue(field=field, modifier=Modifier.WHOLE):
            is_json = field.is_multiple or field.kind is FieldKind.GEO_POINT
            return Affinity.NUMERIC if is_json or field.kind in _NUMERIC_KINDS else Affinity.TEXT
        case SecretTerm(modifier=Modifier.WHOLE):
            return Affinity.TEXT
        case FieldValue() | SecretTerm():
            return Affinity.NONE


def is_double(term: Term) -> bool:
    """Return whether its numbers are double precision. All others are exact.

    What is compared with a double is compared as a double.
    """
    match term:
        case FieldValue(field=field, modifier=Modifier.WHOLE | Modifier.EACH):
            is_number = field.kind is FieldKind.NUMBER and not field.is_multiple
            return is_number and field.type.base.name in _DOUBLE_TYPES
        case EachTerm(RowPath(steps=(*_, EachValue(field)))):
            element = field.type.base.element
            is_number = field.kind is FieldKind.NUMBER
            return is_number and element is not None and element.base.name in _DOUBLE_TYPES
        case JsonValue(field=field):
            return field.kind is FieldKind.GEO_POINT and not field.is_stored_as_json
        case GeoDistance():
            return True
        case _:
            return False


_DOUBLE_TYPES = frozenset({"float4", "float8"})

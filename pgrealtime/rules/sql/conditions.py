"""The resolved rule to a sqlglot tree. Before reference and plan.

The tree is a boolean about one row, whose alias the caller knows. What differs per subscriber is
left to placeholders; ``Lowered.bindings`` says what goes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from sqlglot import exp

from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, FieldKind
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.rules.language.comparison import Equality, Rank, Traits, equality, traits
from pgrealtime.rules.language.parameters import Binding, Form, Parameter, Shape, pattern
from pgrealtime.rules.language.predicate import (
    Comparison,
    Condition,
    Conjunction,
    Constant,
    Disjunction,
    FieldValue,
    GeoDistance,
    JsonValue,
    Nested,
    NoItem,
    Part,
    Predicate,
    Strftime,
    Term,
    is_multiple,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.joins import Scope, Statement, native_form
from pgrealtime.rules.sql.nodes import Sql, all_of, any_of, is_known, negation
from pgrealtime.rules.sql.operands import Value, alike, leading_number, to_number, to_text, value

ROW = "r"
"""Alias of the judged row, unless the caller has another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """A predicate in SQL, the same for all subscribers whose parameters have these classes."""

    condition: exp.Expr
    """Boolean; NULL is as good as FALSE."""
    bindings: Mapping[str, Binding]
    """Placeholder to what goes there."""
    columns: tuple[str, ...]
    """Columns of the judged row that it reads."""
    tables: frozenset[TableName]
    """Tables that it reads beside the row."""


def lower(
    predicate: Predicate,
    collections: Collections,
    shapes: Mapping[Parameter, Shape],
    *,
    row: str = ROW,
    prefix: str = "p",
    caller: Collection | None = None,
    is_own_bound: bool = False,
) -> Lowered:
    """Return the predicate in SQL.

    Args:
        predicate: What to translate.
        collections: All there are.
        shapes: The class of each of ``ir.parameters(predicate.where)``.
        row: Alias of the judged row; its columns bear the names and types of the table's.
        prefix: Of the placeholders, so that two predicates fit into one statement.
        caller: Of the subscriber's own row. If anything beside the judged row is read for it, that
            row must be there: it may be deleted already, and what pointed to it with it, while the
            stream has yet to tell. None doesn't ask.
        is_own_bound: Columns of that row are parameters (``AuthColumn``), and not read.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    statement = Statement(
        collections=collections, shapes=shapes, prefix=prefix, is_own_bound=is_own_bound
    )
    scope = Scope(statement, row, is_judged=True)
    condition = _closed(predicate.where, scope)
    if caller is not None and statement.tables:
        condition = all_of(condition, scope.is_there(caller))
    return Lowered(
        condition=condition,
        bindings=statement.bindings,
        columns=tuple(statement.columns),
        tables=frozenset(statement.tables),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredValues:
    """The values of an operand for the judged row, where a condition is true."""

    select: exp.Select
    """First a column of texts; a value may come more than once."""
    bindings: Mapping[str, Binding]
    columns: tuple[str, ...]
    tables: frozenset[TableName]


def lower_values(
    term: Term,
    where: Condition | None,
    collections: Collections,
    shapes: Mapping[Parameter, Shape],
    *,
    row: str = ROW,
) -> LoweredValues:
    """Return the values that ``term`` has in the joins of one scope; numbers as their text.

    One column, none of it NULL: without a missing row's and an empty relation's.

    Args:
        term: An operand that is either a text or a number, whatever the row.
        where: What else must be true in the same joins.
        collections: All there are.
        shapes: The class of each parameter of ``where``.
        row: Alias of the judged row.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    statement = Statement(collections=collections, shapes=shapes)
    scope = Scope(statement, row, is_judged=True)
    shown = value(term, scope, is_strict=False)
    text = shown.text
    if text is None:
        assert shown.number is not None
        text = nodes.cast(shown.number, nodes.TEXT)
    conditions = [is_known(text)] if where is None else [is_known(text), _condition(where, scope)]
    return LoweredValues(
        select=scope.select(text, all_of(*conditions)),
        bindings=statement.bindings,
        columns=tuple(statement.columns),
        tables=frozenset(statement.tables),
    )


def lower_shown(
    term: Term, collections: Collections, shapes: Mapping[Parameter, Shape], *, row: str = ROW
) -> LoweredValues:
    """Return what ``term`` is for the judged row, NULL included; one row per row of its place.

    A second column says whether it is a number.

    Args:
        term: Any operand.
        collections: All there are.
        shapes: The class of each of its parameters.
        row: Alias of the judged row.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    statement = Statement(collections=collections, shapes=shapes)
    scope = Scope(statement, row, is_judged=True)
    told = value(term, scope, is_strict=False)
    is_number = nodes.truth(False) if told.number is None else is_known(told.number)
    text = told.shown
    select = scope.select(text, nodes.truth(True))
    select.append("expressions", nodes.own(is_number))
    return LoweredValues(
        select=select,
        bindings=statement.bindings,
        columns=tuple(statement.columns),
        tables=frozenset(statement.tables),
    )


# --- conditions


def _closed(condition: Condition, scope: Scope) -> Sql:
    """Return a condition with all joins that it made within itself."""
    where = _condition(condition, scope)
    return scope.exists(where) if scope.has_joins else where


def _condition(condition: Condition, scope: Scope) -> Sql:
    match condition:
        case Conjunction(parts):
            return all_of(*[_condition(part, scope) for part in parts])
        case Disjunction(parts):
            return any_of(*[_condition(part, scope) for part in parts])
        case Nested(place, where):
            inner = Scope(scope.statement, scope.row(place), is_judged=False)
            return _closed(where, inner)
        case Comparison():
            try:
                return _comparison(condition, scope)
            except RuleUnsupportedError as error:
                raise RuleUnsupportedError(
                    error.message, start=condition.start, end=condition.end, hint=error.hint
                ) from None


class _Wildcards(Enum):
    """Where LIKE with a formatted moment on its right side has its ``%`` from.

    PocketBase makes patterns of the constants, which are the format and its modifiers. Where the
    moments are searched for a counter-example it takes that back, and puts the ``%`` around each
    of them there.
    """

    OF_CONSTANTS = auto()
    NONE = auto()
    AROUND = auto()


@dataclass(frozen=True, slots=True)
class _Side:
    """An operand, where its value is found, and how it is compared."""

    term: Term
    scope: Scope
    traits: Traits
    wildcards: _Wildcards = _Wildcards.OF_CONSTANTS


def _comparison(comparison: Comparison, scope: Scope) -> Sql:
    shapes = scope.statement.shapes
    left = _Side(comparison.left, scope, traits(comparison.left, shapes))
    right = _Side(comparison.right, scope, traits(comparison.right, shapes))
    multiple = is_multiple(left.term), is_multiple(right.term)
    if comparison.is_any or not any(multiple):
        return _leaf(comparison.op, left, right, is_strict=False)
    if multiple[1]:
        right = replace(right, wildcards=_Wildcards.NONE)
    leaf = _leaf(comparison.op, left, right, is_strict=False)
    sides = [
        _opposed(side, scope.fresh() if is_fresh else None)
        for side, is_fresh in zip((left, right), multiple, strict=True)
    ]
    counter = negation(_leaf(comparison.op, *sides, is_strict=True))
    for side, is_fresh in zip(sides, multiple, strict=True):
        if is_fresh:
            counter = side.scope.exists(counter)
    return all_of(leaf, negation(counter))


def _opposed(side: _Side, others: Scope | None) -> _Side:
    """Return a side as the search for a counter-example has it.

    A side whose values are searched gets joins of its own, not shared with the other side either:
    all are compared with all. Any other keeps the shared row, and its NULLs count as empty there,
    whatever it is.
    """
    if others is not None:
        return replace(
            side,
            scope=others,
            traits=replace(side.traits, is_filled=False),
            wildcards=_Wildcards.AROUND,
        )
    return replace(side, traits=side.traits.opposed())


def _leaf(op: Op, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    """Return a comparison of two values.

    Args:
        op: What is asked.
        left: One side.
        right: The other.
        is_strict: It will be negated, so that false and unknown differ.
    """
    if op in {Op.LIKE, Op.NOT_LIKE}:
        return _like(op, left, right)
    if op in {Op.EQ, Op.NE}:
        return _equality(op, left, right, is_strict=is_strict)
    one, other = _converted(_value(left), _value(right), left.scope)
    return _order(op, one, other)


def _value(side: _Side, *, is_strict: bool = True) -> Value:
    return value(side.term, side.scope, is_strict=is_strict)


# --- equality


def _spelt(left: _Side, right: _Side, *, is_strict: bool) -> tuple[Value, Value]:
    """Return both values, a constant spelt as jsonb spells containers if it meets one."""
    values = []
    for side, other in ((left, right), (right, left)):
        shown = _value(side, is_strict=is_strict)
        if isinstance(other.term, JsonValue) and _shape(side) in {Shape.TEXT, Shape.DANGLING}:
            assert shown.parameter is not None
            spelt = side.scope.statement.bind(shown.parameter, Form.JSON)
            shown = replace(shown, text=spelt)
        values.append(shown)
    return values[0], values[1]


def _equality(op: Op, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    case = equality(left.traits, right.traits)
    is_null_safe = case is Equality.NULL_SAFE or (case is Equality.PLAIN and op is Op.NE)
    if is_null_safe and right.traits.is_flag:
        same = _has_truth(left, right)
        return same if op is Op.EQ else negation(same)
    match case:
        case Equality.NULL_SAFE:
            one, other = _converted(*_spelt(left, right, is_strict=True), left.scope)
            return _same(one, other) if op is Op.EQ else negation(_same(one, other))
        case Equality.CONSTANT:
            return nodes.truth(op is Op.EQ)
        case Equality.PLAIN:
            return _plain(op, left, right, is_strict=is_strict)
        case Equality.EMPTY:
            filled = right if left.traits.is_empty else left
            blank = _is_blank(_value(filled, is_strict=False))
            return blank if op is Op.EQ else negation(blank)
        case Equality.COALESCED:
            same = _coalesced(_value(left, is_strict=False), _value(right, is_strict=False))
            return same if op is Op.EQ else negation(same)


def _has_truth(side: _Side, flag: _Side) -> Sql:
    """Return ``X IS TRUE`` or ``X IS FALSE``, which asks for X's truth and not for its value.

    In SQLite a number is true unless it is 0, and a text is as true as the number it begins with.
    """
    truth = nodes.truth(False) if side.traits.is_empty else _truth(_value(side))
    number = _value(flag).number
    assert number is not None
    return nodes.binary(exp.NullSafeEQ, truth, nodes.binary(exp.NEQ, number, nodes.number(0)))


def _truth(operand: Value) -> Sql:
    cases: list[tuple[Sql, Sql]] = []
    if operand.number is not None:
        is_true = nodes.binary(exp.NEQ, operand.number, nodes.number(0))
        cases.append((is_known(operand.number), is_true))
    if operand.text is not None:
        begins = nodes.coalesced(leading_number(operand.text), nodes.number(0))
        is_true = nodes.binary(exp.NEQ, begins, nodes.number(0))
        cases.append((is_known(operand.text), is_true))
    return nodes.case(*cases)


def _plain(op: Op, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    """Return ``=`` or ``IS NOT`` where one side is always something."""
    if op is Op.EQ and not is_strict:
        native = _native(left, right) or _native(right, left)
        if native is not None:
            return native
    one, other = _spelt(left, right, is_strict=is_strict)
    if left.traits.is_empty or right.traits.is_empty:
        nothing = _blank_text()
        one, other = (
            nothing if side.traits.is_empty else shown
            for side, shown in ((left, one), (right, other))
        )
    one, other = _converted(one, other, left.scope)
    return _equal(one, other) if op is Op.EQ else negation(_same(one, other))


def _native(side: _Side, constant: _Side) -> Sql | None:
    """Return equality of an id column with a text by the column's own operator, if it has one."""
    match side.term, constant.term:
        case FieldValue(part=Part.WHOLE, field=field), Constant(parameter):
            shape = side.scope.statement.shapes[parameter]
            form = native_form(field.type)
            is_id = field.kind in {FieldKind.TEXT, FieldKind.RELATION} and not field.is_multiple
            if form is None or not is_id or shape.is_number:
                return None
            shown = _value(side, is_strict=False)
            assert shown.native is not None
            wanted = side.scope.statement.bind(parameter, form)
            return nodes.binary(exp.EQ, shown.native, wanted)
        case _:
            return None


def _blank_text() -> Value:
    return Value(rank=Rank.NONE, text=nodes.string(""), show=lambda: nodes.string(""))


def _equal(one: Value, other: Value) -> Sql:
    """Return ``=``: unknown if a side is NULL, false if one is a number and the other a text."""
    match one, other:
        case Value(number=a, text=None), Value(number=b, text=None) if (
            a is not None and b is not None
        ):
            return nodes.binary(exp.EQ, a, b)
        case Value(number=None, text=a), Value(number=None, text=b) if (
            a is not None and b is not None
        ):
            return _text_equal(exp.EQ, one, other)
        case _:
            return nodes.case(
                *_both(one.number, other.number, exp.EQ),
                *_both(_by_bytes(one.text), other.text, exp.EQ),
                (all_of(_is_something(one), _is_something(other)), nodes.truth(False)),
            )


def _same(one: Value, other: Value) -> Sql:
    """Return ``IS``: NULL is NULL."""
    pairs = []
    if one.number is not None or other.number is not None:
        pairs.append(_same_or_null(one.number, other.number))
    if one.text is not None or other.text is not None:
        if one.text is not None and other.text is not None:
            pairs.append(_text_equal(exp.NullSafeEQ, one, other))
        else:
            pairs.append(_same_or_null(one.text, other.text))
    return all_of(*pairs)


def _same_or_null(one: Sql | None, other: Sql | None) -> Sql:
    if one is None or other is None:
        there = one if one is not None else other
        assert there is not None
        return nodes.is_null(there)
    return nodes.binary(exp.NullSafeEQ, one, other)


def _is_blank(operand: Value) -> Sql:
    """Return ``X = '' OR X IS NULL``, which is never unknown."""
    if operand.text is None:
        assert operand.number is not None
        return nodes.is_null(operand.number)
    blank = nodes.binary(exp.EQ, nodes.coalesced(operand.text, nodes.string("")), nodes.string(""))
    if operand.number is None:
        empty = nodes.binary(exp.EQ, operand.text, nodes.string(""))
        return any_of(all_of(is_known(operand.text), empty), nodes.is_null(operand.text))
    return all_of(nodes.is_null(operand.number), blank)


def _coalesced(one: Value, other: Value) -> Sql:
    """Return ``COALESCE(L, '') = COALESCE(R, '')``: no conversions, never unknown."""
    return _same(*alike(_filled(one), _filled(other)))


def _filled(operand: Value) -> Value:
    """Return the operand with '' for NULL."""
    if operand.number is None:
        assert operand.text is not None
        text = nodes.coalesced(operand.text, nodes.string(""))
    else:
        blank = nodes.string("")
        rest = blank if operand.text is None else nodes.coalesced(operand.text, blank)
        text = nodes.case((nodes.is_null(operand.number), rest))
    return replace(operand, text=text)


def _text_equal(kind: type[exp.Binary], one: Value, other: Value) -> Sql:
    """Return equality of texts: with a constant in the column's collation, which indexes have."""
    assert one.text is not None
    assert other.text is not None
    is_constant = one.parameter is not None or other.parameter is not None
    left = one.text if is_constant else nodes.collated(one.text)
    return nodes.binary(kind, left, other.text)


# --- order


_ORDER: Mapping[Op, type[exp.Binary]] = {
    Op.LT: exp.LT,
    Op.LE: exp.LTE,
    Op.GT: exp.GT,
    Op.GE: exp.GTE,
}


def _order(op: Op, one: Value, other: Value) -> Sql:
    """Return an order: bytes for texts, and any number below any text."""
    kind = _ORDER[op]
    match one, other:
        case Value(number=a, text=None), Value(number=b, text=None) if (
            a is not None and b is not None
        ):
            return nodes.binary(kind, a, b)
        case Value(number=None, text=a), Value(number=None, text=b) if (
            a is not None and b is not None
        ):
            return nodes.binary(kind, nodes.collated(a), b)
        case _:
            is_less = op in {Op.LT, Op.LE}
            return nodes.case(
                *_both(one.number, other.number, kind),
                *_both(_by_bytes(one.text), other.text, kind),
                *_unlike(one.number, other.text, is_true=is_less),
                *_unlike(one.text, other.number, is_true=not is_less),
            )


def _both(a: Sql | None, b: Sql | None, kind: type[exp.Binary]) -> list[tuple[Sql, Sql]]:
    """Return the case that both are there, as a list to be unpacked; none if that can't be."""
    if a is None or b is None:
        return []
    return [(all_of(is_known(a), is_known(b)), nodes.binary(kind, a, b))]


def _by_bytes(text: Sql | None) -> Sql | None:
    return None if text is None else nodes.collated(text)


def _unlike(a: Sql | None, b: Sql | None, *, is_true: bool) -> list[tuple[Sql, Sql]]:
    if a is None or b is None:
        return []
    return [(all_of(is_known(a), is_known(b)), nodes.truth(is_true))]


def _is_something(operand: Value) -> Sql:
    parts = [is_known(part) for part in (operand.number, operand.text) if part is not None]
    return any_of(*parts)


# --- conversion


def _converted(one: Value, other: Value, scope: Scope) -> tuple[Value, Value]:
    """Apply SQLite's affinities, and make numbers comparable."""
    return alike(*_of_affinity(one, other, scope))


def _of_affinity(one: Value, other: Value, scope: Scope) -> tuple[Value, Value]:
    """Apply SQLite's affinities: numeric before text, and either before none."""
    match one.rank, other.rank:
        case Rank.NUMERIC, Rank.NUMERIC:
            return one, other
        case Rank.NUMERIC, _:
            return one, to_number(other, scope)
        case _, Rank.NUMERIC:
            return to_number(one, scope), other
        case Rank.TEXT, Rank.NONE:
            return one, to_text(other)
        case Rank.NONE, Rank.TEXT:
            return to_text(one), other
        case _:
            return one, other


# --- LIKE


def _like(op: Op, left: _Side, right: _Side) -> Sql:
    """Return ``~`` or ``!~``: LIKE that takes ASCII letters for alike, whatever their case."""
    shown = _value(left).shown
    shape = _shape(right)
    if shape is Shape.DANGLING:
        return nodes.case((is_known(shown), nodes.truth(op is Op.NOT_LIKE)))
    like = exp.ILike(this=nodes.collated(shown), expression=_pattern(right))
    return like if op is Op.LIKE else negation(like)


def _shape(side: _Side) -> Shape | None:
    match side.term:
        case Constant(parameter):
            return side.scope.statement.shapes[parameter]
        case _:
            return None


def _pattern(side: _Side) -> Sql:
    """Return the right side of LIKE: constants were made patterns, columns are one as they are.

    PocketBase makes patterns of all constants on that side, those in a function's arguments
    included: a distance from a constant becomes NULL, and a format without ``%`` gets two.
    """
    match side.term:
        case Constant(parameter):
            if side.scope.statement.shapes[parameter] is Shape.ABSENT:
                return nodes.null()
            return side.scope.statement.bind(parameter, Form.PATTERN)
        case NoItem():
            return nodes.null()
        case GeoDistance(args) if any(isinstance(arg, Constant) for arg in args):
            return nodes.null()
        case Strftime() if side.wildcards is _Wildcards.NONE:
            return _value(side).shown
        case Strftime(layout, time, modifiers) if side.wildcards is _Wildcards.OF_CONSTANTS:
            if modifiers or isinstance(time, Constant):
                return nodes.null()
            return _value(replace(side, term=Strftime(pattern(layout), time, ()))).shown
        case _:
            wildcard = nodes.string("%")
            return nodes.joined(wildcard, _value(side).shown, wildcard)

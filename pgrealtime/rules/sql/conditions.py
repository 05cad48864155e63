"""The resolved rule to a sqlglot tree. Before reference and plan.

The tree is a boolean about one row, whose alias the caller knows. What differs per subscriber is
left to placeholders; ``SqlPredicate.bindings`` says what goes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from sqlglot import exp

from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, FieldKind
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.rules.language.comparison import (
    Affinity,
    Equality,
    Traits,
    equality,
    is_multiple,
    traits,
)
from pgrealtime.rules.language.parameters import Binding, Parameter, ParameterClass, SqlForm
from pgrealtime.rules.language.predicate import (
    AbsentEach,
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    FieldValue,
    GeoDistance,
    JsonValue,
    Modifier,
    NestedRule,
    ParameterTerm,
    Predicate,
    Strftime,
    Term,
)
from pgrealtime.rules.language.sqlite_values import like_pattern
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.joins import Scope, Translation, native_id_form
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql, all_of, any_of, is_not_null, negation
from pgrealtime.rules.sql.operands import (
    SqlOperand,
    align_precision,
    convert_to_number,
    convert_to_text,
    leading_number,
    translate_operand,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlPredicate:
    """A predicate in SQL, the same for all subscribers whose parameters have these classes."""

    condition: exp.Expr
    """Boolean; NULL is as good as FALSE."""
    bindings: Mapping[str, Binding]
    """Placeholder to what goes there."""
    columns: tuple[str, ...]
    """Columns of the judged row that it reads."""
    tables: frozenset[TableName]
    """Tables that it reads beside the row."""


def translate_predicate(
    predicate: Predicate,
    collections: Collections,
    parameter_classes: Mapping[Parameter, ParameterClass],
    *,
    row_alias: str = ROW_ALIAS,
    placeholder_prefix: str = "p",
    auth_collection: Collection | None = None,
    is_caller_row_bound: bool = False,
) -> SqlPredicate:
    """Return the predicate in SQL.

    Args:
        predicate: What to translate.
        collections: All there are.
        parameter_classes: The class of each of ``ir.parameters(predicate.where)``.
        row_alias: Alias of the judged row; its columns bear the names and types of the table's.
        placeholder_prefix: Of the placeholders, so that two predicates fit into one statement.
        auth_collection: Of the subscriber's own row. If anything beside the judged row is read for
            it, that row must be there: it may be deleted already, and what pointed to it with it,
            while the stream has yet to tell. None doesn't ask.
        is_caller_row_bound: Columns of that row are parameters (``CallerColumn``), and not read.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    statement = Translation(
        collections=collections,
        parameter_classes=parameter_classes,
        placeholder_prefix=placeholder_prefix,
        is_caller_row_bound=is_caller_row_bound,
    )
    scope = Scope(statement, row_alias, is_row_image=True)
    condition = _condition_with_joins(predicate.where, scope)
    if auth_collection is not None and statement.tables:
        condition = all_of(condition, scope.caller_row_exists(auth_collection))
    return SqlPredicate(
        condition=condition,
        bindings=statement.bindings,
        columns=tuple(statement.columns),
        tables=frozenset(statement.tables),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlValues:
    """The values of an operand for the judged row, where a condition is true."""

    select: exp.Select
    """First a column of texts; a value may come more than once."""
    bindings: Mapping[str, Binding]
    columns: tuple[str, ...]
    tables: frozenset[TableName]


def translate_key_values(
    term: Term,
    where: Condition | None,
    collections: Collections,
    parameter_classes: Mapping[Parameter, ParameterClass],
    *,
    row_alias: str = ROW_ALIAS,
) -> SqlValues:
    """Return the values that ``term`` has in the joins of one scope; numbers as their text.

    One column, none of it NULL: without a missing row's and an empty relation's.

    Args:
        term: An operand that is either a text or a number, whatever the row.
        where: What else must be true in the same joins.
        collections: All there are.
        parameter_classes: The class of each parameter of ``where``.
        row_alias: Alias of the judged row.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    statement = Translation(collections=collections, parameter_classes=parameter_classes)
    scope = Scope(statement, row_alias, is_row_image=True)
    shown = translate_operand(term, scope, is_strict=False)
    text = shown.text
    if text is None:
        assert shown.number is not None
        text = nodes.cast(shown.number, nodes.TEXT)
    conditions = (
        [is_not_null(text)]
        if where is None
        else [is_not_null(text), _translate_condition(where, scope)]
    )
    return SqlValues(
        select=scope.select(text, all_of(*conditions)),
        bindings=statement.bindings,
        columns=tuple(statement.columns),
        tables=frozenset(statement.tables),
    )


def translate_explained_values(
    term: Term,
    collections: Collections,
    parameter_classes: Mapping[Parameter, ParameterClass],
    *,
    row_alias: str = ROW_ALIAS,
) -> SqlValues:
    """Return what ``term`` is for the judged row, NULL included; one row per row of its place.

    A second column says whether it is a number.

    Args:
        term: Any operand.
        collections: All there are.
        parameter_classes: The class of each of its parameters.
        row_alias: Alias of the judged row.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    statement = Translation(collections=collections, parameter_classes=parameter_classes)
    scope = Scope(statement, row_alias, is_row_image=True)
    told = translate_operand(term, scope, is_strict=False)
    is_number = nodes.boolean(False) if told.number is None else is_not_null(told.number)
    text = told.as_text
    select = scope.select(text, nodes.boolean(True))
    select.append("expressions", nodes.copy_if_attached(is_number))
    return SqlValues(
        select=select,
        bindings=statement.bindings,
        columns=tuple(statement.columns),
        tables=frozenset(statement.tables),
    )


# --- conditions


def _condition_with_joins(condition: Condition, scope: Scope) -> Sql:
    """Return a condition with all joins that it made within itself."""
    where = _translate_condition(condition, scope)
    return scope.exists(where) if scope.has_joins else where


def _translate_condition(condition: Condition, scope: Scope) -> Sql:
    match condition:
        case Conjunction(parts):
            return all_of(*[_translate_condition(part, scope) for part in parts])
        case Disjunction(parts):
            return any_of(*[_translate_condition(part, scope) for part in parts])
        case NestedRule(place, where):
            inner = Scope(scope.translation, scope.join_row(place), is_row_image=False)
            return _condition_with_joins(where, inner)
        case Comparison():
            try:
                return _translate_comparison(condition, scope)
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

    FROM_CONSTANTS = auto()
    NONE = auto()
    AROUND = auto()


@dataclass(frozen=True, slots=True)
class _Side:
    """An operand, where its value is found, and how it is compared."""

    term: Term
    scope: Scope
    traits: Traits
    wildcards: _Wildcards = _Wildcards.FROM_CONSTANTS


def _translate_comparison(comparison: Comparison, scope: Scope) -> Sql:
    shapes = scope.translation.parameter_classes
    left = _Side(comparison.left, scope, traits(comparison.left, shapes))
    right = _Side(comparison.right, scope, traits(comparison.right, shapes))
    multiple = is_multiple(left.term), is_multiple(right.term)
    if comparison.is_any or not any(multiple):
        return _compare_values(comparison.op, left, right, is_strict=False)
    if multiple[1]:
        right = replace(right, wildcards=_Wildcards.NONE)
    leaf = _compare_values(comparison.op, left, right, is_strict=False)
    sides = [
        _side_for_counterexample(side, scope.without_joins() if is_fresh else None)
        for side, is_fresh in zip((left, right), multiple, strict=True)
    ]
    counter = negation(_compare_values(comparison.op, *sides, is_strict=True))
    for side, is_fresh in zip(sides, multiple, strict=True):
        if is_fresh:
            counter = side.scope.exists(counter)
    return all_of(leaf, negation(counter))


def _side_for_counterexample(side: _Side, own_scope: Scope | None) -> _Side:
    """Return a side as the search for a counter-example has it.

    A side whose values are searched gets joins of its own, not shared with the other side either:
    all are compared with all. Any other keeps the shared row, and its NULLs count as empty there,
    whatever it is.
    """
    if own_scope is not None:
        return replace(
            side,
            scope=own_scope,
            traits=replace(side.traits, is_nonempty=False),
            wildcards=_Wildcards.AROUND,
        )
    return replace(side, traits=side.traits.for_counterexample())


def _compare_values(op: Op, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
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
    one, other = _make_comparable(_translate_side(left), _translate_side(right), left.scope)
    return _order(op, one, other)


def _translate_side(side: _Side, *, is_strict: bool = True) -> SqlOperand:
    return translate_operand(side.term, side.scope, is_strict=is_strict)


# --- equality


def _values_with_json_order(
    left: _Side, right: _Side, *, is_strict: bool
) -> tuple[SqlOperand, SqlOperand]:
    """Return both values, a constant spelt as jsonb spells containers if it meets one."""
    values = []
    for side, other in ((left, right), (right, left)):
        shown = _translate_side(side, is_strict=is_strict)
        if isinstance(other.term, JsonValue) and _class_of_side(side) in {
            ParameterClass.TEXT,
            ParameterClass.DANGLING_ESCAPE,
        }:
            assert shown.parameter is not None
            spelt = side.scope.translation.bind(shown.parameter, SqlForm.JSON)
            shown = replace(shown, text=spelt)
        values.append(shown)
    return values[0], values[1]


def _equality(op: Op, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    case = equality(left.traits, right.traits)
    is_null_safe = case is Equality.NULL_SAFE or (case is Equality.PLAIN and op is Op.NE)
    if is_null_safe and right.traits.is_isset:
        same = _equals_truth(left, right)
        return same if op is Op.EQ else negation(same)
    match case:
        case Equality.NULL_SAFE:
            one, other = _make_comparable(
                *_values_with_json_order(left, right, is_strict=True), left.scope
            )
            return (
                _is_not_distinct(one, other)
                if op is Op.EQ
                else negation(_is_not_distinct(one, other))
            )
        case Equality.CONSTANT:
            return nodes.boolean(op is Op.EQ)
        case Equality.PLAIN:
            return _plain_equality(op, left, right, is_strict=is_strict)
        case Equality.EMPTY:
            filled = right if left.traits.is_empty else left
            blank = _is_blank(_translate_side(filled, is_strict=False))
            return blank if op is Op.EQ else negation(blank)
        case Equality.COALESCED:
            same = _coalesced_equality(
                _translate_side(left, is_strict=False), _translate_side(right, is_strict=False)
            )
            return same if op is Op.EQ else negation(same)


def _equals_truth(side: _Side, flag: _Side) -> Sql:
    """Return ``X IS TRUE`` or ``X IS FALSE``, which asks for X's truth and not for its value.

    In SQLite a number is true unless it is 0, and a text is as true as the number it begins with.
    """
    truth = nodes.boolean(False) if side.traits.is_empty else _truth(_translate_side(side))
    number = _translate_side(flag).number
    assert number is not None
    return nodes.binary(exp.NullSafeEQ, truth, nodes.binary(exp.NEQ, number, nodes.number(0)))


def _truth(operand: SqlOperand) -> Sql:
    cases: list[tuple[Sql, Sql]] = []
    if operand.number is not None:
        is_true = nodes.binary(exp.NEQ, operand.number, nodes.number(0))
        cases.append((is_not_null(operand.number), is_true))
    if operand.text is not None:
        begins = nodes.coalesce(leading_number(operand.text), nodes.number(0))
        is_true = nodes.binary(exp.NEQ, begins, nodes.number(0))
        cases.append((is_not_null(operand.text), is_true))
    return nodes.case(*cases)


def _plain_equality(op: Op, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    """Return ``=`` or ``IS EXCEPT`` where one side is always something."""
    if op is Op.EQ and not is_strict:
        native = _native_id_equality(left, right) or _native_id_equality(right, left)
        if native is not None:
            return native
    one, other = _values_with_json_order(left, right, is_strict=is_strict)
    if left.traits.is_empty or right.traits.is_empty:
        nothing = _empty_text()
        one, other = (
            nothing if side.traits.is_empty else shown
            for side, shown in ((left, one), (right, other))
        )
    one, other = _make_comparable(one, other, left.scope)
    return _equal(one, other) if op is Op.EQ else negation(_is_not_distinct(one, other))


def _native_id_equality(side: _Side, constant: _Side) -> Sql | None:
    """Return equality of an id column with a text by the column's own operator, if it has one."""
    match side.term, constant.term:
        case FieldValue(modifier=Modifier.WHOLE, field=field), ParameterTerm(parameter):
            shape = side.scope.translation.parameter_classes[parameter]
            form = native_id_form(field.type)
            is_id = field.kind in {FieldKind.TEXT, FieldKind.RELATION} and not field.is_multiple
            if form is None or not is_id or shape.is_number:
                return None
            shown = _translate_side(side, is_strict=False)
            assert shown.native_column is not None
            wanted = side.scope.translation.bind(parameter, form)
            return nodes.binary(exp.EQ, shown.native_column, wanted)
        case _:
            return None


def _empty_text() -> SqlOperand:
    return SqlOperand(
        affinity=Affinity.NONE, text=nodes.string(""), make_text=lambda: nodes.string("")
    )


def _equal(one: SqlOperand, other: SqlOperand) -> Sql:
    """Return ``=``: unknown if a side is NULL, false if one is a number and the other a text."""
    match one, other:
        case SqlOperand(number=a, text=None), SqlOperand(number=b, text=None) if (
            a is not None and b is not None
        ):
            return nodes.binary(exp.EQ, a, b)
        case SqlOperand(number=None, text=a), SqlOperand(number=None, text=b) if (
            a is not None and b is not None
        ):
            return _text_equal(exp.EQ, one, other)
        case _:
            return nodes.case(
                *_case_of_same_type(one.number, other.number, exp.EQ),
                *_case_of_same_type(_collate_c_or_none(one.text), other.text, exp.EQ),
                (all_of(_is_not_null(one), _is_not_null(other)), nodes.boolean(False)),
            )


def _is_not_distinct(one: SqlOperand, other: SqlOperand) -> Sql:
    """Return ``IS``: NULL is NULL."""
    pairs = []
    if one.number is not None or other.number is not None:
        pairs.append(_is_not_distinct_sql(one.number, other.number))
    if one.text is not None or other.text is not None:
        if one.text is not None and other.text is not None:
            pairs.append(_text_equal(exp.NullSafeEQ, one, other))
        else:
            pairs.append(_is_not_distinct_sql(one.text, other.text))
    return all_of(*pairs)


def _is_not_distinct_sql(one: Sql | None, other: Sql | None) -> Sql:
    if one is None or other is None:
        there = one if one is not None else other
        assert there is not None
        return nodes.is_null(there)
    return nodes.binary(exp.NullSafeEQ, one, other)


def _is_blank(operand: SqlOperand) -> Sql:
    """Return ``X = '' OR X IS NULL``, which is never unknown."""
    if operand.text is None:
        assert operand.number is not None
        return nodes.is_null(operand.number)
    blank = nodes.binary(exp.EQ, nodes.coalesce(operand.text, nodes.string("")), nodes.string(""))
    if operand.number is None:
        empty = nodes.binary(exp.EQ, operand.text, nodes.string(""))
        return any_of(all_of(is_not_null(operand.text), empty), nodes.is_null(operand.text))
    return all_of(nodes.is_null(operand.number), blank)


def _coalesced_equality(one: SqlOperand, other: SqlOperand) -> Sql:
    """Return ``COALESCE(L, '') = COALESCE(R, '')``: no conversions, never unknown."""
    return _is_not_distinct(
        *align_precision(_empty_text_for_null(one), _empty_text_for_null(other))
    )


def _empty_text_for_null(operand: SqlOperand) -> SqlOperand:
    """Return the operand with '' for NULL."""
    if operand.number is None:
        assert operand.text is not None
        text = nodes.coalesce(operand.text, nodes.string(""))
    else:
        blank = nodes.string("")
        rest = blank if operand.text is None else nodes.coalesce(operand.text, blank)
        text = nodes.case((nodes.is_null(operand.number), rest))
    return replace(operand, text=text)


def _text_equal(kind: type[exp.Binary], one: SqlOperand, other: SqlOperand) -> Sql:
    """Return equality of texts: with a constant in the column's collation, which indexes have."""
    assert one.text is not None
    assert other.text is not None
    is_constant = one.parameter is not None or other.parameter is not None
    left = one.text if is_constant else nodes.collate_c(one.text)
    return nodes.binary(kind, left, other.text)


# --- order


_ORDER_OPERATORS: Mapping[Op, type[exp.Binary]] = {
    Op.LT: exp.LT,
    Op.LE: exp.LTE,
    Op.GT: exp.GT,
    Op.GE: exp.GTE,
}


def _order(op: Op, one: SqlOperand, other: SqlOperand) -> Sql:
    """Return an order: bytes for texts, and any number below any text."""
    kind = _ORDER_OPERATORS[op]
    match one, other:
        case SqlOperand(number=a, text=None), SqlOperand(number=b, text=None) if (
            a is not None and b is not None
        ):
            return nodes.binary(kind, a, b)
        case SqlOperand(number=None, text=a), SqlOperand(number=None, text=b) if (
            a is not None and b is not None
        ):
            return nodes.binary(kind, nodes.collate_c(a), b)
        case _:
            is_less = op in {Op.LT, Op.LE}
            return nodes.case(
                *_case_of_same_type(one.number, other.number, kind),
                *_case_of_same_type(_collate_c_or_none(one.text), other.text, kind),
                *_case_of_number_and_text(one.number, other.text, is_true=is_less),
                *_case_of_number_and_text(one.text, other.number, is_true=not is_less),
            )


def _case_of_same_type(
    a: Sql | None, b: Sql | None, kind: type[exp.Binary]
) -> list[tuple[Sql, Sql]]:
    """Return the case that both are there, as a list to be unpacked; none if that can't be."""
    if a is None or b is None:
        return []
    return [(all_of(is_not_null(a), is_not_null(b)), nodes.binary(kind, a, b))]


def _collate_c_or_none(text: Sql | None) -> Sql | None:
    return None if text is None else nodes.collate_c(text)


def _case_of_number_and_text(
    a: Sql | None, b: Sql | None, *, is_true: bool
) -> list[tuple[Sql, Sql]]:
    if a is None or b is None:
        return []
    return [(all_of(is_not_null(a), is_not_null(b)), nodes.boolean(is_true))]


def _is_not_null(operand: SqlOperand) -> Sql:
    parts = [is_not_null(part) for part in (operand.number, operand.text) if part is not None]
    return any_of(*parts)


# --- conversion


def _make_comparable(
    one: SqlOperand, other: SqlOperand, scope: Scope
) -> tuple[SqlOperand, SqlOperand]:
    """Apply SQLite's affinities, and make numbers comparable."""
    return align_precision(*_apply_affinity(one, other, scope))


def _apply_affinity(
    one: SqlOperand, other: SqlOperand, scope: Scope
) -> tuple[SqlOperand, SqlOperand]:
    """Apply SQLite's affinities: numeric before text, and either before none."""
    match one.affinity, other.affinity:
        case Affinity.NUMERIC, Affinity.NUMERIC:
            return one, other
        case Affinity.NUMERIC, _:
            return one, convert_to_number(other, scope)
        case _, Affinity.NUMERIC:
            return convert_to_number(one, scope), other
        case Affinity.TEXT, Affinity.NONE:
            return one, convert_to_text(other)
        case Affinity.NONE, Affinity.TEXT:
            return convert_to_text(one), other
        case _:
            return one, other


# --- LIKE


def _like(op: Op, left: _Side, right: _Side) -> Sql:
    """Return ``~`` or ``!~``: LIKE that takes ASCII letters for alike, whatever their case."""
    shown = _translate_side(left).as_text
    shape = _class_of_side(right)
    if shape is ParameterClass.DANGLING_ESCAPE:
        return nodes.case((is_not_null(shown), nodes.boolean(op is Op.NOT_LIKE)))
    like = exp.ILike(this=nodes.collate_c(shown), expression=_like_pattern(right))
    return like if op is Op.LIKE else negation(like)


def _class_of_side(side: _Side) -> ParameterClass | None:
    match side.term:
        case ParameterTerm(parameter):
            return side.scope.translation.parameter_classes[parameter]
        case _:
            return None


def _like_pattern(side: _Side) -> Sql:
    """Return the right side of LIKE: constants were made patterns, columns are one as they are.

    PocketBase makes patterns of all constants on that side, those in a function's arguments
    included: a distance from a constant becomes NULL, and a format without ``%`` gets two.
    """
    match side.term:
        case ParameterTerm(parameter):
            if side.scope.translation.parameter_classes[parameter] is ParameterClass.ABSENT:
                return nodes.null()
            return side.scope.translation.bind(parameter, SqlForm.PATTERN)
        case AbsentEach():
            return nodes.null()
        case GeoDistance(args) if any(isinstance(arg, ParameterTerm) for arg in args):
            return nodes.null()
        case Strftime() if side.wildcards is _Wildcards.NONE:
            return _translate_side(side).as_text
        case Strftime(layout, time, modifiers) if side.wildcards is _Wildcards.FROM_CONSTANTS:
            if modifiers or isinstance(time, ParameterTerm):
                return nodes.null()
            return _translate_side(
                replace(side, term=Strftime(like_pattern(layout), time, ()))
            ).as_text
        case _:
            wildcard = nodes.string("%")
            return nodes.concatenate(wildcard, _translate_side(side).as_text, wildcard)

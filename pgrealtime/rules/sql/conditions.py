"""The resolved rule to a sqlglot tree. Before reference and plan.

The tree is a boolean about one row, whose alias the caller knows. What differs per subscriber is
left to placeholders; ``SqlPredicate.bindings`` says what goes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sqlglot import exp

from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, FieldKind
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.rules.language.comparison import (
    ComparisonKind,
    Conversion,
    Pattern,
    PlannedOperand,
    ValueComparison,
    plan_comparison,
)
from pgrealtime.rules.language.parameters import Binding, Parameter, ParameterClass, SqlForm
from pgrealtime.rules.language.predicate import (
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    FieldValue,
    Modifier,
    NestedRule,
    ParameterTerm,
    Predicate,
    Term,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conversions import (
    SqlOperand,
    convert_to_double,
    convert_to_number,
    convert_to_text,
    leading_number,
)
from pgrealtime.rules.sql.joins import Scope, Translation, native_id_form
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql, all_of, any_of, is_not_null, negation
from pgrealtime.rules.sql.operands import translate_operand


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
    """Return a condition as EXISTS over the joins that it made, if it made any."""
    where = _translate_condition(condition, scope)
    return scope.exists(where) if scope.has_joins else where


def _translate_condition(condition: Condition, scope: Scope) -> Sql:
    match condition:
        case Conjunction(parts):
            return all_of(*[_translate_condition(part, scope) for part in parts])
        case Disjunction(parts):
            return any_of(*[_translate_condition(part, scope) for part in parts])
        case NestedRule(path, where):
            inner = Scope(scope.translation, scope.join_row(path), is_row_image=False)
            return _condition_with_joins(where, inner)
        case Comparison():
            try:
                return _translate_comparison(condition, scope)
            except RuleUnsupportedError as error:
                raise RuleUnsupportedError(
                    error.message, start=condition.start, end=condition.end, hint=error.hint
                ) from None


@dataclass(frozen=True, slots=True)
class _Side:
    """A planned operand and the scope in which its rows are joined."""

    planned: PlannedOperand
    scope: Scope

    def translate(self, *, is_strict: bool = True) -> SqlOperand:
        """Return the operand, converted as planned. For ``is_strict`` see translate_operand."""
        if self.planned.is_empty_text:
            return SqlOperand.of_text(nodes.string(""))
        operand = translate_operand(self.planned.term, self.scope, is_strict=is_strict)
        if self.planned.is_json_text:
            assert operand.parameter is not None
            spelled = self.scope.translation.bind(operand.parameter, SqlForm.JSON)
            operand = replace(operand, text=spelled)
        match self.planned.conversion:
            case Conversion.NUMBER:
                operand = convert_to_number(operand, self.scope)
            case Conversion.TEXT:
                operand = convert_to_text(operand)
            case Conversion.NONE:
                pass
        return convert_to_double(operand) if self.planned.is_made_double else operand


def _translate_comparison(comparison: Comparison, scope: Scope) -> Sql:
    plan = plan_comparison(comparison, scope.translation.parameter_classes)
    shared = plan.shared
    condition = _compare_values(
        shared, _Side(shared.left, scope), _Side(shared.right, scope), is_strict=False
    )
    if plan.searched is None:
        return condition
    # A searched side has joins of its own, not shared with the other side either: all values are
    # compared with all.
    sides = [
        _Side(planned, scope.without_joins() if planned.is_searched else scope)
        for planned in (plan.searched.left, plan.searched.right)
    ]
    counterexample = negation(_compare_values(plan.searched, *sides, is_strict=True))
    for side in sides:
        if side.planned.is_searched:
            counterexample = side.scope.exists(counterexample)
    return all_of(condition, negation(counterexample))


def _compare_values(plan: ValueComparison, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    """Return a comparison of two values.

    Args:
        plan: What is asked.
        left: One side.
        right: The other.
        is_strict: The result will be negated, so that false and unknown differ.
    """
    positive = _compare_unnegated(plan, left, right, is_strict=is_strict)
    return negation(positive) if plan.is_negated else positive


def _compare_unnegated(plan: ValueComparison, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    match plan.kind:
        case ComparisonKind.ORDER:
            return _order(plan.op, left.translate(), right.translate())
        case ComparisonKind.LIKE:
            text = nodes.collate_c(left.translate().as_text)
            return exp.ILike(this=text, expression=_like_pattern(plan.pattern, right))
        case ComparisonKind.LIKE_NOTHING:
            return nodes.case((is_not_null(left.translate().as_text), nodes.boolean(False)))
        case ComparisonKind.CONSTANT:
            return nodes.boolean(True)
        case ComparisonKind.BLANK:
            return _is_blank(left.translate(is_strict=False))
        case ComparisonKind.TRUTH:
            return _equals_truth(left, right)
        case ComparisonKind.EQUAL:
            return _equality(left, right, is_strict=is_strict)
        case ComparisonKind.NOT_DISTINCT:
            is_strict = is_strict or plan.is_null_safe
            return _is_not_distinct(*_translate(left, right, is_strict=is_strict))
        case ComparisonKind.COALESCED:
            return _is_not_distinct(
                *map(_empty_text_for_null, _translate(left, right, is_strict=False))
            )


def _translate(left: _Side, right: _Side, *, is_strict: bool) -> tuple[SqlOperand, SqlOperand]:
    return left.translate(is_strict=is_strict), right.translate(is_strict=is_strict)


def _like_pattern(pattern: Pattern, side: _Side) -> Sql:
    match pattern:
        case Pattern.NULL:
            return nodes.null()
        case Pattern.BOUND:
            assert isinstance(side.planned.term, ParameterTerm)
            return side.scope.translation.bind(side.planned.term.parameter, SqlForm.PATTERN)
        case Pattern.TEXT:
            return side.translate().as_text
        case Pattern.WRAPPED:
            wildcard = nodes.string("%")
            return nodes.concatenate(wildcard, side.translate().as_text, wildcard)


# --- equality


def _equality(left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    native = None if is_strict else _native_id_equality(left, right)
    return _equal(*_translate(left, right, is_strict=is_strict)) if native is None else native


def _equals_truth(side: _Side, flag: _Side) -> Sql:
    """Return ``X IS TRUE`` or ``X IS FALSE``, which asks for X's truth and not for its value.

    In SQLite a number is true unless it is 0, and a text is as true as the number it begins with.
    """
    truth = nodes.boolean(False) if side.planned.is_empty_text else _truth(side.translate())
    number = flag.translate().number
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


def _native_id_equality(left: _Side, right: _Side) -> Sql | None:
    """Return equality of an id column with a text by the column's own operator, if it has one."""
    for side, other in ((left, right), (right, left)):
        match side.planned.term, other.planned.term:
            case FieldValue(modifier=Modifier.WHOLE, field=field), ParameterTerm(parameter):
                translation = side.scope.translation
                form = native_id_form(field.type)
                is_id = field.kind in {FieldKind.TEXT, FieldKind.RELATION} and not field.is_multiple
                if form is None or not is_id:
                    continue
                if translation.parameter_classes[parameter].is_number:
                    continue
                shown = translate_operand(side.planned.term, side.scope, is_strict=False)
                assert shown.native_column is not None
                wanted = translation.bind(parameter, form)
                return nodes.binary(exp.EQ, shown.native_column, wanted)
            case _:
                continue
    return None


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

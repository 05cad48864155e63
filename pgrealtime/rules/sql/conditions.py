"""Translates a predicate to a boolean SQL expression about one row.

The engine, the reference query and ``explain`` put it into their statements. What differs per
caller becomes placeholders; ``SqlPredicate.bindings`` says what they stand for. What a comparison
means is decided by ``language.comparison``; here it is only rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sqlglot import exp

from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
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
    RowPath,
    Term,
    row_path_of,
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
    """A predicate in SQL, the same for all callers whose parameters have these classes."""

    condition: exp.Expr
    """Boolean, about the row called ``ROW_ALIAS``; NULL admits no more than FALSE."""
    bindings: Mapping[str, Binding]
    """Placeholder to its content."""
    column_names: tuple[str, ...]
    """Columns of the row that it reads."""
    tables: frozenset[TableName]
    """Other tables that it reads."""


def translate_predicate(
    predicate: Predicate,
    collections: Collections,
    parameter_classes: Mapping[Parameter, ParameterClass],
    *,
    placeholder_prefix: str = "p",
    auth_collection: Collection | None = None,
    is_caller_row_bound: bool = False,
) -> SqlPredicate:
    """Return the predicate in SQL.

    The prefix of the placeholders' names lets two predicates fit in a statement. With
    ``is_caller_row_bound`` columns of the caller's row are parameters (``CallerColumn``). The
    caller's own row, of ``auth_collection``, is then required to exist if other tables are read: it
    may be deleted, and what pointed to it with it, before the stream tells so.

    Raises:
        RuleUnsupportedError: It can't be evaluated exactly.
    """
    translation = Translation(
        collections=collections,
        parameter_classes=parameter_classes,
        placeholder_prefix=placeholder_prefix,
        is_caller_row_bound=is_caller_row_bound,
    )
    scope = Scope(translation, ROW_ALIAS, is_row_image=True)
    condition = condition_with_joins(predicate.where, scope)
    if auth_collection is not None and translation.tables:
        condition = all_of(condition, scope.caller_row_exists(auth_collection))
    return SqlPredicate(
        condition=condition,
        bindings=translation.bindings,
        column_names=tuple(translation.column_names),
        tables=frozenset(translation.tables),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlValues:
    """The values that an operand has for a row, as a SELECT."""

    select: exp.Select
    """Its first column are texts; a value may come more than once."""
    bindings: Mapping[str, Binding]
    column_names: tuple[str, ...]
    tables: frozenset[TableName]

    @classmethod
    def of_scope(cls, scope: Scope, text: Sql, where: Sql) -> SqlValues:
        """Return the values of an expression over the joins of a scope."""
        translation = scope.translation
        return cls(
            select=scope.build_select(text, where),
            bindings=translation.bindings,
            column_names=tuple(translation.column_names),
            tables=frozenset(translation.tables),
        )


def translate_key_values(
    term: Term,
    where: Condition | None,
    collections: Collections,
    parameter_classes: Mapping[Parameter, ParameterClass],
) -> SqlValues:
    """Return the values that the term has where a condition is true; numbers as their text.

    The term is either a text or a number, whatever the row. The condition is in the same joins.
    NULL is left out: a missing row's value and that of an empty relation.

    Raises:
        RuleUnsupportedError: It can't be evaluated exactly.
    """
    translation = Translation(collections=collections, parameter_classes=parameter_classes)
    scope = Scope(translation, ROW_ALIAS, is_row_image=True)
    operand = translate_operand(term, scope, is_strict=False)
    text = operand.text
    if text is None:
        assert operand.number is not None
        text = nodes.cast(operand.number, nodes.TEXT)
    conditions = [is_not_null(text)]
    if where is not None:
        conditions.append(translate_condition(where, scope))
    return SqlValues.of_scope(scope, text, all_of(*conditions))


# --- conditions


def condition_with_joins(condition: Condition, scope: Scope) -> Sql:
    """Return a condition as EXISTS over the joins that it made, if it made any."""
    where = translate_condition(condition, scope)
    return scope.exists(where) if scope.has_joins else where


def translate_condition(condition: Condition, scope: Scope) -> Sql:
    """Return a condition over the joins of the scope, which it makes as it needs them."""
    match condition:
        case Conjunction(parts):
            return all_of(*[translate_condition(part, scope) for part in parts])
        case Disjunction(parts):
            return any_of(*[translate_condition(part, scope) for part in parts])
        case NestedRule(path, where):
            inner = Scope(scope.translation, scope.join_row(path), is_row_image=False)
            return condition_with_joins(where, inner)
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
            json_text = self.scope.translation.bind(operand.parameter, SqlForm.JSON)
            operand = replace(operand, text=json_text)
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
            listed = _rows_listed(comparison.listed, side)
            counterexample = side.scope.exists(all_of(counterexample, *listed))
    return all_of(condition, negation(counterexample))


def _rows_listed(rules: Sequence[NestedRule], side: _Side) -> list[Sql]:
    """Return that the rows joined for a side meet the rules; a missing row needs to meet none."""
    path = row_path_of(side.planned.term)
    joined = () if path is None else tuple(path.joined_rows())
    return [
        any_of(
            nodes.is_null(side.scope.row_id_at(rule.row_path).node),
            translate_condition(rule, side.scope),
        )
        for rule in rules
        if rule.row_path in joined
    ]


def _compare_values(plan: ValueComparison, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    """Return a comparison of two values; if it ``is_strict``, false and unknown differ."""
    positive = _compare_unnegated(plan, left, right, is_strict=is_strict)
    return negation(positive) if plan.is_negated else positive


def _compare_unnegated(plan: ValueComparison, left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    match plan.kind:
        case ComparisonKind.ORDER:
            order = _order(plan.op, left.translate(), right.translate())
            bound = _integer_bound(plan.op, left, right)
            return order if bound is None else all_of(bound, order)
        case ComparisonKind.LIKE:
            text = nodes.collate_c(left.translate().as_text)
            return exp.ILike(this=text, expression=_like_pattern(plan.pattern, right))
        case ComparisonKind.LIKE_NOTHING:
            return nodes.case((is_not_null(left.translate().as_text), False))
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
            sides = _translate(left, right, is_strict=False)
            return _is_not_distinct(*map(_empty_text_for_null, sides))


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
            return nodes.concatenate("%", side.translate().as_text, "%")


# --- equality


def _equality(left: _Side, right: _Side, *, is_strict: bool) -> Sql:
    # What is no value of the column's type is bound as NULL, which makes "=" unknown and not false.
    # So it isn't used where that differs.
    native = None if is_strict else _native_equality(left, right)
    return _equal(*_translate(left, right, is_strict=is_strict)) if native is None else native


def _equals_truth(side: _Side, flag: _Side) -> Sql:
    """Return ``X IS TRUE`` or ``X IS FALSE``, which asks for X's truth and not for its value.

    In SQLite a number is true unless it is 0, and a text is as true as the number it begins with.
    """
    truth = nodes.boolean(False) if side.planned.is_empty_text else _truth(side.translate())
    number = flag.translate().number
    assert number is not None
    return nodes.binary(exp.NullSafeEQ, truth, nodes.binary(exp.NEQ, number, 0))


def _truth(operand: SqlOperand) -> Sql:
    cases: list[tuple[Sql, Sql]] = []
    if operand.number is not None:
        is_true = nodes.binary(exp.NEQ, operand.number, 0)
        cases.append((is_not_null(operand.number), is_true))
    if operand.text is not None:
        begins = nodes.coalesce(leading_number(operand.text), 0)
        is_true = nodes.binary(exp.NEQ, begins, 0)
        cases.append((is_not_null(operand.text), is_true))
    return nodes.case(*cases)


def _native_equality(left: _Side, right: _Side) -> Sql | None:
    """Return equality of an id or integer column with a value by the column's own operator.

    None if it has none. An index serves it, as it does not where the column is cast.
    """
    for side, other in ((left, right), (right, left)):
        match side.planned.term, other.planned.term:
            case FieldValue(path, field, Modifier.WHOLE), ParameterTerm(parameter):
                translation, form = side.scope.translation, native_id_form(field.type)
                class_ = translation.parameter_classes[parameter]
                if field.kind is FieldKind.NUMBER and _is_numeric(class_):
                    form = form and SqlForm.WHOLE
                elif field.kind not in {FieldKind.TEXT, FieldKind.RELATION} or class_.is_number:
                    form = None
                if form is not None and not field.is_multiple:
                    assert field.column is not None
                    column = side.scope.column_at(path, field.column.name)
                    return nodes.binary(exp.EQ, column, translation.bind(parameter, form))
                if field.type.id_parts and not class_.is_number:
                    return _computed_id_equality(path, field, parameter, side.scope)
            case _:
                pass
    return None


def _computed_id_equality(
    path: RowPath, field: Field, parameter: Parameter, scope: Scope
) -> Sql | None:
    """Return equality of a computed id with a value; None if the row is no table's."""
    if path.is_scope_row and scope.is_row_image:
        return None
    assert field.column is not None
    value = scope.translation.bind(parameter, SqlForm.TEXT)
    own = nodes.typed_column(scope.join_row(path), field.column)
    return nodes.equal_keys(own, nodes.TypedSql(value, field.type))


def _integer_bound(op: Op, left: _Side, right: _Side) -> Sql | None:
    """Return what an order of an integer column and a number implies, by the column's operator.

    None if there is no such column, or it is none of a table.
    """
    is_below = op in {Op.LT, Op.LE}
    for side, other, is_least in ((left, right, not is_below), (right, left, is_below)):
        match side.planned.term, other.planned.term:
            case FieldValue(path, field, Modifier.WHOLE), ParameterTerm(parameter):
                translation = side.scope.translation
                if (
                    field.kind is FieldKind.NUMBER
                    and not field.is_multiple
                    and native_id_form(field.type) is not None
                    and _is_numeric(translation.parameter_classes[parameter])
                    and not (path.is_scope_row and side.scope.is_row_image)
                ):
                    assert field.column is not None
                    column = side.scope.column_at(path, field.column.name)
                    form = SqlForm.FLOOR if is_least else SqlForm.CEILING
                    bound = translation.bind(parameter, form)
                    return nodes.binary(exp.GTE if is_least else exp.LTE, column, bound)
            case _:
                pass
    return None


def _is_numeric(class_: ParameterClass) -> bool:
    """Return whether a number column is compared with every value of the class as a number."""
    return class_.is_number or class_ is ParameterClass.NUMERIC_TEXT


def _equal(left: SqlOperand, right: SqlOperand) -> Sql:
    """Return ``=``: unknown if a side is NULL, false if one is a number and the other a text."""
    if numbers := _only_numbers(left, right):
        return nodes.binary(exp.EQ, *numbers)
    if _only_texts(left, right):
        return _text_equal(exp.EQ, left, right)
    return nodes.case(
        *_cases_of_same_type(left, right, exp.EQ),
        (all_of(_is_not_null(left), _is_not_null(right)), False),
    )


def _is_not_distinct(left: SqlOperand, right: SqlOperand) -> Sql:
    """Return ``IS``: NULL is NULL."""
    pairs = []
    if left.number is not None or right.number is not None:
        pairs.append(_parts_not_distinct(left.number, right.number))
    if left.text is not None and right.text is not None:
        pairs.append(_text_equal(exp.NullSafeEQ, left, right))
    elif left.text is not None or right.text is not None:
        pairs.append(_parts_not_distinct(left.text, right.text))
    return all_of(*pairs)


def _parts_not_distinct(left: Sql | None, right: Sql | None) -> Sql:
    if left is not None and right is not None:
        return nodes.binary(exp.NullSafeEQ, left, right)
    part = right if left is None else left
    assert part is not None
    return nodes.is_null(part)


def _is_blank(operand: SqlOperand) -> Sql:
    """Return ``X = '' OR X IS NULL``, which is never unknown."""
    if operand.text is None:
        assert operand.number is not None
        return nodes.is_null(operand.number)
    if operand.number is None:
        is_empty = nodes.binary(exp.EQ, operand.text, "")
        return any_of(all_of(is_not_null(operand.text), is_empty), nodes.is_null(operand.text))
    text = nodes.coalesce(operand.text, "")
    return all_of(nodes.is_null(operand.number), nodes.binary(exp.EQ, text, ""))


def _empty_text_for_null(operand: SqlOperand) -> SqlOperand:
    empty = nodes.string("")
    text = empty if operand.text is None else nodes.coalesce(operand.text, empty)
    if operand.number is not None:
        text = nodes.case((nodes.is_null(operand.number), text))
    return replace(operand, text=text)


def _text_equal(kind: type[exp.Binary], left: SqlOperand, right: SqlOperand) -> Sql:
    """Return equality of texts: with a constant in the column's collation, as its indexes have."""
    assert left.text is not None
    assert right.text is not None
    is_constant = left.parameter is not None or right.parameter is not None
    return nodes.binary(kind, left.text if is_constant else nodes.collate_c(left.text), right.text)


# --- order


_ORDER_OPERATORS: Mapping[Op, type[exp.Binary]] = {
    Op.LT: exp.LT,
    Op.LE: exp.LTE,
    Op.GT: exp.GT,
    Op.GE: exp.GTE,
}


def _order(op: Op, left: SqlOperand, right: SqlOperand) -> Sql:
    """Return an order: texts by bytes, and any number below any text."""
    kind = _ORDER_OPERATORS[op]
    if numbers := _only_numbers(left, right):
        return nodes.binary(kind, *numbers)
    if texts := _only_texts(left, right):
        return nodes.binary(kind, nodes.collate_c(texts[0]), texts[1])
    is_less = op in {Op.LT, Op.LE}
    return nodes.case(
        *_cases_of_same_type(left, right, kind),
        *_case_of_both(left.number, right.text, nodes.boolean(is_less)),
        *_case_of_both(left.text, right.number, nodes.boolean(not is_less)),
    )


def _only_numbers(left: SqlOperand, right: SqlOperand) -> tuple[Sql, Sql] | None:
    """Return both numbers, if neither side can be a text."""
    if left.text is not None or right.text is not None:
        return None
    assert left.number is not None
    assert right.number is not None
    return left.number, right.number


def _only_texts(left: SqlOperand, right: SqlOperand) -> tuple[Sql, Sql] | None:
    """Return both texts, if neither side can be a number."""
    if left.number is not None or right.number is not None:
        return None
    assert left.text is not None
    assert right.text is not None
    return left.text, right.text


def _cases_of_same_type(
    left: SqlOperand, right: SqlOperand, kind: type[exp.Binary]
) -> list[tuple[Sql, Sql]]:
    """Return the cases of CASE for two numbers and for two texts, as far as there can be any."""
    cases: list[tuple[Sql, Sql]] = []
    if left.number is not None and right.number is not None:
        compared = nodes.binary(kind, left.number, right.number)
        cases += _case_of_both(left.number, right.number, compared)
    if left.text is not None and right.text is not None:
        text = nodes.collate_c(left.text)
        cases += _case_of_both(text, right.text, nodes.binary(kind, text, right.text))
    return cases


def _case_of_both(a: Sql | None, b: Sql | None, result: Sql) -> list[tuple[Sql, Sql]]:
    """Return the case that both are not NULL; none if one never is."""
    if a is None or b is None:
        return []
    return [(all_of(is_not_null(a), is_not_null(b)), result)]


def _is_not_null(operand: SqlOperand) -> Sql:
    parts = [is_not_null(part) for part in (operand.number, operand.text) if part is not None]
    return any_of(*parts)

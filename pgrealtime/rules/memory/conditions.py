"""Compiles a condition about a row image to a function, where evaluating it here is exact.

Called by ``engine.formula`` for each test. What a comparison means is decided by
``language.comparison``, as for SQL. What isn't proved to give PostgreSQL's result (the tests
compare with a server, type by type) is left to PostgreSQL: then ``compile_condition`` returns None,
or the function raises ``UndecidedError`` for a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

from pgrealtime.changes import Row
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.comparison import (
    ComparisonKind,
    Pattern,
    ValueComparison,
    plan_comparison,
)
from pgrealtime.rules.language.parameters import SqlForm
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory import compare
from pgrealtime.rules.memory.operands import (
    MAX_SHARED_LISTS,
    Arguments,
    CompileContext,
    ItemCombination,
    ItemsReader,
    ListScope,
    NotInProcessError,
    ValueReader,
    argument_reader,
    compile_operand,
    compile_planned,
    constant_reader,
    empty_text_for_null,
)

CompiledCondition: TypeAlias = Callable[[Row, Arguments], bool]
"""Whether the condition is true. A row must have the columns that are read."""

_VerdictFunction: TypeAlias = Callable[[Row, Arguments, ItemCombination], bool | None]
"""TRUE, FALSE or UNKNOWN of a row, for one combination of items of the lists it reads."""

_UNITS_PER_COMPARISON = 0.5
"""What comparing two values costs, in units of ``WORK_BUDGET``."""
_MAX_COMBINATIONS = 10_000
"""Combinations of items that are tried in the process; PostgreSQL is faster for more."""
_NO_SHARED_ITEMS: ItemCombination = (None,) * MAX_SHARED_LISTS


def compile_condition(
    condition: predicate.Condition, context: CompileContext
) -> CompiledCondition | None:
    """Return the function that evaluates a condition, or None if only PostgreSQL can.

    Like the joins of a scope in SQL, the lists that are read are gone through in all combinations
    of their items, until the condition is true of one.
    """
    scope = ListScope(context)
    checks: list[_ForAll] = []
    try:
        verdict = _compile_verdict(condition, scope, checks)
    except NotInProcessError:
        return None
    if not scope.list_readers and not checks:
        return lambda row, args: verdict(row, args, ()) is True
    readers = tuple(scope.list_readers.values())
    units = _UNITS_PER_COMPARISON * len(predicate.comparisons(condition))

    def exists(row: Row, args: Arguments) -> bool:
        for check in checks:
            check.verdict = None
        for items in _combinations(readers, row, args):
            compare.WORK_BUDGET.spend(units)
            if verdict(row, args, items) is True:
                return True
        return False

    return exists


def _combinations(
    readers: Sequence[ItemsReader], row: Row, args: Arguments
) -> Iterator[ItemCombination]:
    lists = [read(row, args) for read in readers]
    if prod(map(len, lists)) > _MAX_COMBINATIONS:
        raise compare.UndecidedError
    return product(*lists)


def _compile_verdict(
    condition: predicate.Condition, scope: ListScope, checks: list[_ForAll]
) -> _VerdictFunction:
    """Compile a condition; each match-all within it is added to ``checks``."""
    match condition:
        case predicate.Comparison():
            return _compile_comparison(condition, scope, checks)
        # UNKNOWN counts as FALSE: nothing negates what AND and OR give, as nothing does in the SQL.
        case predicate.Conjunction(parts) | predicate.Disjunction(parts):
            verdicts = [_compile_verdict(part, scope, checks) for part in parts]
            combine = all if isinstance(condition, predicate.Conjunction) else any
            return lambda row, args, items: combine(
                verdict(row, args, items) is True for verdict in verdicts
            )
        case predicate.NestedRule():
            raise NotInProcessError


def _compile_comparison(
    comparison: predicate.Comparison, scope: ListScope, checks: list[_ForAll]
) -> _VerdictFunction:
    if comparison.listed:
        raise NotInProcessError
    plan = plan_comparison(comparison, scope.compile_context.parameter_classes)
    shared = _compile_values(plan.shared, scope, scope)
    if plan.searched is None:
        return shared
    # A searched side has its items to itself: they are numbered behind all that may be shared,
    # whose count isn't known before the whole condition is compiled.
    own_scopes: list[ListScope] = []
    scopes: list[ListScope] = []
    for planned in (plan.searched.left, plan.searched.right):
        if planned.is_searched:
            first = MAX_SHARED_LISTS + len(own_scopes)
            own_scopes.append(ListScope(scope.compile_context, first_item_index=first))
        scopes.append(own_scopes[-1] if planned.is_searched else scope)
    searched = _compile_values(plan.searched, *scopes)
    readers = [read for own in own_scopes for read in own.list_readers.values()]
    checks.append(check := _ForAll(searched, readers))
    return lambda row, args, items: shared(row, args, items) is True and check.holds(row, args)


@dataclass(slots=True)
class _ForAll:
    """Match-all: that a comparison is false for no item of a list, or no pair of items of two.

    That doesn't depend on the shared items, so it is evaluated once for all their combinations:
    ``verdict`` is None until then.
    """

    evaluate: _VerdictFunction
    list_readers: Sequence[ItemsReader]
    verdict: bool | None = None

    def holds(self, row: Row, args: Arguments) -> bool:
        """Return whether there is no counter-example."""
        if self.verdict is None:
            combinations = _combinations(self.list_readers, row, args)
            self.verdict = not any(self._is_counter(row, args, items) for items in combinations)
        return self.verdict

    def _is_counter(self, row: Row, args: Arguments, items: ItemCombination) -> bool:
        compare.WORK_BUDGET.spend(_UNITS_PER_COMPARISON)
        return self.evaluate(row, args, _NO_SHARED_ITEMS + items) is False


def _compile_values(plan: ValueComparison, left: ListScope, right: ListScope) -> _VerdictFunction:
    match plan.kind:
        case ComparisonKind.CONSTANT:
            is_true = not plan.is_negated
            return lambda _row, _args, _items: is_true
        case ComparisonKind.TRUTH:
            raise NotInProcessError
        case ComparisonKind.BLANK:
            read = compile_planned(plan.left, left).read_value
            is_wanted = not plan.is_negated
            return lambda row, args, items: compare.is_blank(read(row, args, items)) is is_wanted
        case ComparisonKind.LIKE | ComparisonKind.LIKE_NOTHING:
            return _compile_like(plan, left, right)
        case _:
            return _compile_sides(plan, left, right)


def _compile_sides(plan: ValueComparison, left: ListScope, right: ListScope) -> _VerdictFunction:
    operands = compile_planned(plan.left, left), compile_planned(plan.right, right)
    a, b = (operand.read_value for operand in operands)
    if plan.kind is ComparisonKind.ORDER:
        is_number = any(operand.only_type is float for operand in operands)
        if not is_number and not left.compile_context.is_utf8:
            raise NotInProcessError
        op, order = plan.op, compare.compare_order
        return lambda row, args, items: order(op, a(row, args, items), b(row, args, items))
    if plan.kind is ComparisonKind.COALESCED:
        a, b = empty_text_for_null(a), empty_text_for_null(b)
    are_equal = compare.equals if plan.kind is ComparisonKind.EQUAL else compare.is_not_distinct
    if plan.is_negated:
        return lambda row, args, items: not are_equal(a(row, args, items), b(row, args, items))
    return lambda row, args, items: are_equal(a(row, args, items), b(row, args, items))


def _compile_like(plan: ValueComparison, left: ListScope, right: ListScope) -> _VerdictFunction:
    read_text = compile_operand(plan.left.term, left).read_text
    is_wanted = plan.op is Op.LIKE
    if plan.kind is ComparisonKind.LIKE_NOTHING:
        return lambda row, args, items: (
            None if read_text(row, args, items) is None else not is_wanted
        )
    read_pattern = _pattern_reader(plan, right)

    def matches(row: Row, args: Arguments, items: ItemCombination) -> bool | None:
        text, pattern = read_text(row, args, items), read_pattern(row, args, items)
        if text is None or pattern is None:
            return None
        assert isinstance(text, str)
        assert isinstance(pattern, str)
        return compare.like_matcher(pattern)(text) is is_wanted

    return matches


def _pattern_reader(plan: ValueComparison, scope: ListScope) -> ValueReader:
    term = plan.right.term
    match plan.pattern:
        case Pattern.NULL:
            if not isinstance(term, predicate.ParameterTerm):
                # The SQL reads no argument of a function whose result is no text. Here they would
                # count as columns that the row must have.
                raise NotInProcessError
            return constant_reader(None)
        case Pattern.BOUND:
            assert isinstance(term, predicate.ParameterTerm)
            return argument_reader(term.parameter, SqlForm.PATTERN, scope.compile_context)
        case Pattern.TEXT:
            return compile_operand(term, scope).read_text
        case Pattern.WRAPPED:
            read_text = compile_operand(term, scope).read_text
            return lambda row, args, items: (
                None if (text := read_text(row, args, items)) is None else f"%{text}%"
            )

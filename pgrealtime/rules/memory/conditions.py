"""Conditions about a row image, decided in the process where that is exact. Beside lower.py.

What a comparison means comes from ``ir.traits`` and ``ir.equality``, as for SQL; what is not proved
to come out as Postgres has it (the tests ask a server, type by type) is left to Postgres: then
``compiled`` returns None, or a test raises ``UndecidedError`` for the odd value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import TypeAlias

from pgrealtime.changes import Row
from pgrealtime.collections.model import Field
from pgrealtime.rules.language.comparison import (
    Equality,
    Traits,
    equality,
    is_double,
    is_multiple,
    traits,
)
from pgrealtime.rules.language.parameters import (
    ParameterClass,
    RequestValue,
    SqlForm,
)
from pgrealtime.rules.language.predicate import (
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    EachTerm,
    EachValue,
    FieldValue,
    JsonValue,
    NestedRule,
    ParameterTerm,
    RowPath,
    ScopeRow,
    SecretTerm,
    Term,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import (
    WORK_BUDGET,
    SqliteValue,
    UndecidedError,
    compare_order,
    equals,
    is_blank,
    is_not_distinct,
    like_matcher,
)
from pgrealtime.rules.memory.operands import (
    EMPTY_TEXT,
    MAX_SHARED_LISTS,
    Arguments,
    CompileContext,
    ItemCombination,
    ItemsReader,
    ListScope,
    MemoryOperand,
    NotInProcessError,
    ValueReader,
    align_precision,
    argument_reader,
    compile_operand,
    make_comparable,
)

CompiledCondition: TypeAlias = Callable[[Row, Arguments], bool]
"""Whether the condition is true. A row must have the columns that are read."""

_VerdictFunction: TypeAlias = Callable[[Row, Arguments, ItemCombination], bool | None]


def compile_condition(condition: Condition, context: CompileContext) -> CompiledCondition | None:
    """Return what decides a condition about the judged row, or None if only Postgres can."""
    lists: dict[RowPath, ItemsReader] = {}
    checks: list[_ForAll] = []
    try:
        where = _compile_verdict(condition, ListScope(context, lists), checks)
    except NotInProcessError:
        return None
    if not lists and not checks:
        return lambda row, args: where(row, args, ()) is True
    readers = tuple(lists.values())
    size = sum(_UNITS_PER_COMPARISON for _ in _compared_terms(condition)) / 2

    def exists(row: Row, args: Arguments) -> bool:
        for check in checks:
            check.verdict = None
        for chosen in _combinations(readers, row, args):
            WORK_BUDGET.spend(size)
            if where(row, args, chosen) is True:
                return True
        return False

    return exists


def columns_read(condition: Condition) -> frozenset[str]:
    """Return the columns of the row image that the condition may read, as ``SqlPredicate`` does."""
    found: set[str] = set()
    for term in _compared_terms(condition):
        place = _row_path(term)
        field_ = getattr(term, "field", None)
        if place is None or not isinstance(place.root, ScopeRow):
            continue
        if place.is_scope_row and isinstance(field_, Field) and field_.column is not None:
            found.add(field_.column.name)
        if place.steps and isinstance(place.steps[0], EachValue):
            column = place.steps[0].field.column
            if column is not None:
                found.add(column.name)
    return frozenset(found)


def _compared_terms(condition: Condition) -> Iterator[Term]:
    match condition:
        case Comparison(left, _, _, right):
            yield from (left, right)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _compared_terms(part)
        case NestedRule():
            return


def _row_path(term: Term) -> RowPath | None:
    match term:
        case (
            FieldValue(row_path=place)
            | EachTerm(place)
            | JsonValue(row_path=place)
            | SecretTerm(row_path=place)
        ):
            return place
        case _:
            return None


# --- conditions


def _compile_verdict(
    condition: Condition, scope: ListScope, checks: list[_ForAll]
) -> _VerdictFunction:
    match condition:
        case Comparison():
            return _compile_comparison(condition, scope, checks)
        case Conjunction(parts):
            leaves = [_compile_verdict(part, scope, checks) for part in parts]
            return lambda row, args, chosen: all(leaf(row, args, chosen) is True for leaf in leaves)
        case Disjunction(parts):
            leaves = [_compile_verdict(part, scope, checks) for part in parts]
            return lambda row, args, chosen: any(leaf(row, args, chosen) is True for leaf in leaves)
        case NestedRule():
            raise NotInProcessError


@dataclass(frozen=True, slots=True)
class _Side:
    term: Term
    scope: ListScope
    traits: Traits


def _compile_comparison(
    comparison: Comparison, scope: ListScope, checks: list[_ForAll]
) -> _VerdictFunction:
    shapes = scope.context.parameter_classes
    left, right = (
        _Side(term, scope, traits(term, shapes)) for term in (comparison.left, comparison.right)
    )
    leaf = _compile_operator(comparison.op, left, right)
    if comparison.is_any or not (is_multiple(left.term) or is_multiple(right.term)):
        return leaf
    return _for_all(comparison.op, left, right, leaf, checks)


def _for_all(
    op: Op, left: _Side, right: _Side, compare_shared: _VerdictFunction, checks: list[_ForAll]
) -> _VerdictFunction:
    """Add to a leaf that no item, or no pair of two, makes it false.

    Each side that is searched has its items to itself; the leaf before speaks of the shared ones.
    """
    # Far beyond the shared ones, whose number isn't known before everything is compiled.
    fresh: list[dict[RowPath, ItemsReader]] = []
    sides: list[_Side] = []
    for side in (left, right):
        if is_multiple(side.term):
            lists: dict[RowPath, ItemsReader] = {}
            scope = ListScope(
                side.scope.context, lists, first_item_index=MAX_SHARED_LISTS + len(fresh)
            )
            fresh.append(lists)
            sides.append(replace(side, scope=scope))
        else:
            sides.append(replace(side, traits=side.traits.for_counterexample()))
    counter = _compile_operator(op, *sides)
    check = _ForAll(counter, [read for lists in fresh for read in lists.values()])
    checks.append(check)
    return lambda row, args, chosen: (
        compare_shared(row, args, chosen) is True and check.holds(row, args)
    )


class _ForAll:
    """That no item, or no pair of two, makes a leaf false.

    That doesn't depend on the shared items: it is found out once for all their combinations.

    Attributes:
        verdict: Of the evaluation under way; None if it isn't known yet.
    """

    __slots__ = ("_compare", "_list_readers", "verdict")

    def __init__(self, counter: _VerdictFunction, readers: Sequence[ItemsReader]) -> None:
        self._compare = counter
        self._list_readers = readers
        self.verdict: bool | None = None

    def holds(self, row: Row, args: Arguments) -> bool:
        """Whether there is no counter-example."""
        if self.verdict is None:
            combinations = _combinations(self._list_readers, row, args)
            self.verdict = not any(
                self._is_counterexample(row, args, items) for items in combinations
            )
        return self.verdict

    def _is_counterexample(self, row: Row, args: Arguments, items: ItemCombination) -> bool:
        WORK_BUDGET.spend(_UNITS_PER_COMPARISON)
        return self._compare(row, args, _NO_SHARED_ITEMS + items) is False


_NO_SHARED_ITEMS: ItemCombination = (None,) * MAX_SHARED_LISTS
_UNITS_PER_COMPARISON = 0.5
"""What it costs to compare two values, in units of ``WORK_BUDGET``."""
_MAX_COMBINATIONS = 10_000
"""Combinations of items that are gone through here; more of them take Postgres less time."""


def _combinations(
    readers: Sequence[ItemsReader], row: Row, args: Arguments
) -> Iterator[ItemCombination]:
    lists = [read(row, args) for read in readers]
    if prod(map(len, lists)) > _MAX_COMBINATIONS:
        raise UndecidedError
    return product(*lists)


def _compile_operator(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    match op:
        case Op.LIKE | Op.NOT_LIKE:
            return _compile_like(op, left, right)
        case Op.EQ | Op.NE:
            return _compile_equality(op, left, right)
        case _:
            return _compile_order(op, left, right)


def _compile_order(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    one, other = make_comparable(_operand_of_side(left), _operand_of_side(right))
    if not left.scope.context.is_utf8 and float not in {one.only_type, other.only_type}:
        raise NotInProcessError
    a, b = one.read_value, other.read_value
    return lambda row, args, chosen: compare_order(op, a(row, args, chosen), b(row, args, chosen))


def _compile_equality(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    is_equal = op is Op.EQ
    case = equality(left.traits, right.traits)
    if is_isset(right.term) and case in {Equality.NULL_SAFE, Equality.PLAIN}:
        raise NotInProcessError  # SQLite asks for truth there, a meaning of its own
    match case:
        case Equality.CONSTANT:
            return lambda _row, _args, _chosen: is_equal
        case Equality.EMPTY:
            blank = _operand_of_side(right if left.traits.is_empty else left).read_value
            return lambda row, args, chosen: is_blank(blank(row, args, chosen)) is is_equal
        case Equality.COALESCED:
            one, other = align_precision(_operand_of_side(left), _operand_of_side(right))
            return _equality_function(
                is_not_distinct, is_equal, _empty_text_for_null(one), _empty_text_for_null(other)
            )
        case Equality.NULL_SAFE:
            one, other = make_comparable(_operand_of_side(left), _operand_of_side(right))
            return _equality_function(is_not_distinct, is_equal, one.read_value, other.read_value)
        case Equality.PLAIN:
            one, other = make_comparable(
                *(
                    EMPTY_TEXT if side.traits.is_empty else _operand_of_side(side)
                    for side in (left, right)
                )
            )
            return _equality_function(
                equals if is_equal else is_not_distinct, is_equal, one.read_value, other.read_value
            )


def is_isset(term: Term) -> bool:
    """Whether it is ``:isset``, which SQLite sees as the word TRUE or FALSE."""
    match term:
        case ParameterTerm(RequestValue(is_isset=is_set)):
            return is_set
        case _:
            return False


def _equality_function(
    comparison: Callable[[SqliteValue, SqliteValue], bool | None],
    is_equal: bool,  # noqa: FBT001 (an operator or its opposite)
    a: ValueReader,
    b: ValueReader,
) -> _VerdictFunction:
    if is_equal:
        return lambda row, args, chosen: comparison(a(row, args, chosen), b(row, args, chosen))
    return lambda row, args, chosen: not comparison(a(row, args, chosen), b(row, args, chosen))


def _empty_text_for_null(operand: MemoryOperand) -> ValueReader:
    read = operand.read_value

    def filled(row: Row, args: Arguments, chosen: ItemCombination) -> SqliteValue:
        value = read(row, args, chosen)
        return "" if value is None else value

    return filled


def _compile_like(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    shown = _operand_of_side(left).read_text
    is_like = op is Op.LIKE
    if _class_of_side(right) is ParameterClass.DANGLING_ESCAPE:
        return lambda row, args, chosen: None if shown(row, args, chosen) is None else not is_like
    made = _pattern_reader(right)

    def matches(row: Row, args: Arguments, chosen: ItemCombination) -> bool | None:
        text, pattern = shown(row, args, chosen), made(row, args, chosen)
        if text is None or pattern is None:
            return None
        assert isinstance(text, str)
        assert isinstance(pattern, str)
        return like_matcher(pattern)(text) is is_like

    return matches


def _class_of_side(side: _Side) -> ParameterClass | None:
    match side.term:
        case ParameterTerm(parameter):
            return side.scope.context.parameter_classes[parameter]
        case _:
            return None


def _pattern_reader(side: _Side) -> ValueReader:
    match side.term:
        case ParameterTerm(parameter):
            return argument_reader(parameter, SqlForm.PATTERN, side.scope.context)
        case _:
            shown = _operand_of_side(side).read_text

            def wrapped(row: Row, args: Arguments, chosen: ItemCombination) -> SqliteValue:
                text = shown(row, args, chosen)
                return None if text is None else f"%{text}%"

            return wrapped


# --- operands


def _operand_of_side(side: _Side) -> MemoryOperand:
    return replace(compile_operand(side.term, side.scope), is_double=is_double(side.term))


# --- constants


# --- fields


# --- lists


# --- json

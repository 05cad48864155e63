"""AND and OR over calls of tests: what is left of a rule or filter once it is split.

``RuleCompiler`` builds formulas, ``Plan`` simplifies them for a caller, ``RowEvaluation`` evaluates
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pgrealtime.rules.engine.test import Test
from pgrealtime.rules.language.predicate import (
    CallerRow,
    CollectionRows,
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    GeoDistance,
    NestedRule,
    RowPath,
    Strftime,
    Term,
    ToOne,
    row_path_of,
)


@dataclass(frozen=True, slots=True)
class TestCall:
    """A test, and which of the caller's values are its arguments."""

    test: Test
    argument_positions: tuple[int, ...]
    """For each of ``test.caller_parameters``, where its value is among the caller's values."""

    @property
    def is_caller_independent(self) -> bool:
        """Whether the verdict is the same for all callers."""
        return not self.argument_positions


@dataclass(frozen=True, slots=True)
class AllOf:
    """True if every operand is."""

    operands: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """True if some operand is."""

    operands: tuple[Formula, ...]


Formula: TypeAlias = bool | TestCall | AllOf | AnyOf


def each_test_call(formula: Formula) -> tuple[TestCall, ...]:
    """Return the calls of tests, from left to right."""
    match formula:
        case TestCall():
            return (formula,)
        case AllOf(operands) | AnyOf(operands):
            return tuple(call for operand in operands for call in each_test_call(operand))
        case bool():
            return ()


def map_test_calls(formula: Formula, replace: Callable[[TestCall], Formula]) -> Formula:
    """Return the formula with its calls replaced, simplified where they became constants."""
    match formula:
        case TestCall():
            return replace(formula)
        case AllOf(operands):
            return conjunction(map_test_calls(operand, replace) for operand in operands)
        case AnyOf(operands):
            return disjunction(map_test_calls(operand, replace) for operand in operands)
        case bool():
            return formula


def conjunction(operands: Iterable[Formula]) -> Formula:
    """Return the conjunction, flat and without constants inside."""
    return _flattened(AllOf, operands, neutral=True)


def disjunction(operands: Iterable[Formula]) -> Formula:
    """Return the disjunction, flat and without constants inside."""
    return _flattened(AnyOf, operands, neutral=False)


def _flattened(
    connective: type[AllOf | AnyOf], operands: Iterable[Formula], *, neutral: bool
) -> Formula:
    """Join operands; ``neutral`` is the constant that changes nothing, the other one decides."""
    flat: list[Formula] = []
    for operand in operands:
        if isinstance(operand, bool):
            if operand is not neutral:
                return operand
        elif isinstance(operand, connective):
            flat.extend(operand.operands)
        else:
            flat.append(operand)
    return connective(tuple(flat)) if len(flat) > 1 else flat[0] if flat else neutral


def split_condition(condition: Condition, compile_part: Callable[[Condition], Formula]) -> Formula:
    """Return the condition as a formula over parts that share no join.

    Args:
        condition: In one scope of joins.
        compile_part: Compiles a part; called once for each, from left to right.
    """
    match condition:
        case Comparison() | NestedRule():
            return compile_part(condition)
        case Disjunction(parts):
            return disjunction(split_condition(part, compile_part) for part in parts)
        case Conjunction(parts):
            groups = _group_by_shared_joins(_flatten_conjunction(parts))
            return conjunction(
                split_condition(group[0], compile_part)
                if len(group) == 1
                else compile_part(Conjunction(tuple(group)))
                for group in groups
            )


def _flatten_conjunction(parts: Sequence[Condition]) -> Iterator[Condition]:
    for part in parts:
        if isinstance(part, Conjunction):
            yield from _flatten_conjunction(part.conditions)
        else:
            yield part


def _group_by_shared_joins(conditions: Iterator[Condition]) -> list[list[Condition]]:
    """Return the conditions in groups: those that share a join, directly or through others."""
    groups: list[tuple[set[RowPath], list[Condition]]] = []
    for condition in conditions:
        joins, members = set(_joins_of_condition(condition)), [condition]
        separate = []
        for group in groups:
            if joins.isdisjoint(group[0]):
                separate.append(group)
            else:
                joins |= group[0]
                members = group[1] + members
        groups = [*separate, (joins, members)]
    return [members for _, members in groups]


def _joins_of_condition(condition: Condition) -> Iterator[RowPath]:
    """Yield every join of the condition's own scope."""
    match condition:
        case Comparison(left, _, _, right):
            for term in (left, right):
                yield from _joins_of_term(term)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _joins_of_condition(part)
        case NestedRule(path, _):
            yield from _joins_of_path(path)


def _joins_of_term(term: Term) -> Iterator[RowPath]:
    match term:
        case GeoDistance(arguments):
            for argument in arguments:
                yield from _joins_of_term(argument)
        case Strftime(time=time):
            if time is not None:
                yield from _joins_of_term(time)
        case _:
            path = row_path_of(term)
            if path is not None:
                yield from _joins_of_path(path)


def _joins_of_path(path: RowPath) -> Iterator[RowPath]:
    """Yield the joins of a path, except those that give exactly one row of the caller.

    The caller's own row, and what it points to by single relations, is the same in every
    combination of joined rows: comparisons that share it are independent all the same.
    """
    if isinstance(path.root, CollectionRows):
        yield RowPath(path.root)
    is_one_row = isinstance(path.root, CallerRow)
    for length, step in enumerate(path.steps, start=1):
        is_one_row = is_one_row and isinstance(step, ToOne)
        if not is_one_row:
            yield RowPath(path.root, path.steps[:length])

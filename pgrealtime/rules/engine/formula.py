"""AND and OR over calls of tests: what is left of a rule or filter once it is split.

``RuleCompiler`` builds formulas, ``Plan`` simplifies them for a caller, ``RowEvaluation`` evaluates
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from pgrealtime.rules.engine.test import Test


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


def each_test_call(formula: Formula) -> Iterator[TestCall]:
    """Yield the calls of tests, from left to right."""
    match formula:
        case TestCall():
            yield formula
        case AllOf(operands) | AnyOf(operands):
            for operand in operands:
                yield from each_test_call(operand)
        case bool():
            return


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
    found: list[Formula] = []
    for operand in operands:
        if isinstance(operand, bool):
            if operand is not neutral:
                return operand
        elif isinstance(operand, connective):
            found.extend(operand.operands)
        else:
            found.append(operand)
    return connective(tuple(found)) if len(found) > 1 else found[0] if found else neutral

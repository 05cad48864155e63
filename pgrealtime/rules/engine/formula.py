"""Tests, and AND and OR over calls of them: what a rule or filter is once it is split.

``RuleCompiler`` splits rules and filters into conditions without shared joins and makes one
``Test`` of equal ones, so that filters that differ in literals share it and a row's verdict is
computed once for all. ``Plan`` simplifies formulas for a caller, ``RowEvaluation`` evaluates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from pgrealtime.collections.model import Collection, Collections
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.parameters import Parameter, ParameterClass
from pgrealtime.rules.language.predicate import Condition
from pgrealtime.rules.memory.conditions import compile_condition
from pgrealtime.rules.memory.operands import CompileContext
from pgrealtime.rules.sql.conditions import SqlPredicate, translate_predicate


@dataclass(eq=False, kw_only=True)
class Test:
    """A condition on one row of a collection, compiled for parameters of given classes.

    It has three uses: ``in_process`` evaluates it here; ``sql_predicate`` is the same in SQL;
    ``index_paths`` makes index keys of its comparisons. It is compared by identity, and verdicts
    are kept by it. The condition has joins of its own. With ``is_caller_row_bound`` the columns
    that it reads of the caller's row, of ``auth_collection``, are parameters; else PostgreSQL reads
    them.

    Attributes:
        caller_parameters: Its parameters that differ per caller. Its arguments are their values, in
            this order, followed by those of ``macros``.
        macros: Its parameters that differ per batch.
        in_process: Evaluates it here; None if only PostgreSQL can.
        column_names: The columns of the row that it reads.
        is_row_independent: Whether the verdict depends on the caller alone, not on row and time.
    """

    collections: Collections
    collection: Collection
    condition: Condition
    parameter_classes: Mapping[Parameter, ParameterClass]
    auth_collection: Collection | None
    is_caller_row_bound: bool
    is_utf8: bool

    def __post_init__(self) -> None:
        self.caller_parameters, self.macros = predicate.varying_parameters(
            self.condition, is_caller_row_bound=self.is_caller_row_bound
        )
        arguments = (*self.caller_parameters, *self.macros)
        self.memory_context = CompileContext(
            parameter_classes=self.parameter_classes,
            argument_index={parameter: index for index, parameter in enumerate(arguments)},
            is_utf8=self.is_utf8,
        )
        self.in_process = compile_condition(self.condition, self.memory_context)
        self.column_names = (
            frozenset(self.sql_predicate.column_names)
            if self.in_process is None
            else predicate.columns_read(self.condition)
        )
        self.is_row_independent = bool(self.in_process) and not (self.column_names or self.macros)

    @cached_property
    def reads_other_rows(self) -> bool:
        """Whether it reads rows of other tables; the caller's own row is read if it isn't bound."""
        paths = predicate.paths_read(self.condition, is_nested_included=True)
        return any(
            True
            for path in paths
            for joined in path.joined_rows()
            if not (joined.is_caller_row and self.is_caller_row_bound)
        )

    @cached_property
    def sql_predicate(self) -> SqlPredicate:
        """The condition in SQL, translated when it is first used.

        Raises:
            RuleUnsupportedError: PostgreSQL can't evaluate it exactly either.
        """
        return translate_predicate(
            predicate.Predicate(collection_name=self.collection.name, where=self.condition),
            self.collections,
            self.parameter_classes,
            auth_collection=self.auth_collection,
            is_caller_row_bound=self.is_caller_row_bound,
        )


@dataclass(frozen=True, slots=True)
class TestCall:
    """A test, and which of the caller's values are its arguments."""

    test: Test
    argument_positions: tuple[int, ...]
    """For each of ``test.caller_parameters``, where its value is among the caller's values."""


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


def tests_of(formula: Formula) -> frozenset[Test]:
    """Return the tests that are called."""
    return frozenset(call.test for call in each_test_call(formula))


def is_caller_independent(formula: Formula) -> bool:
    """Return whether the verdict is the same for all callers."""
    return not any(call.argument_positions for call in each_test_call(formula))


def decide_calls(formula: Formula, verdicts: Mapping[TestCall, bool | None]) -> Formula:
    """Return the formula, simplified, with a constant for each call that has a verdict."""

    def decided(call: TestCall) -> Formula:
        verdict = verdicts.get(call)
        return call if verdict is None else verdict

    return _map_calls(formula, decided)


def number_arguments_from_zero(formula: Formula) -> tuple[Formula, tuple[int, ...]]:
    """Return the formula over only those of the caller's values that it reads, and which these are.

    Callers that differ in nothing else then have equal formulas and values.
    """
    used = sorted({at for call in each_test_call(formula) for at in call.argument_positions})
    number_of = {at: number for number, at in enumerate(used)}

    def renumbered(call: TestCall) -> Formula:
        return TestCall(call.test, tuple([number_of[at] for at in call.argument_positions]))

    return _map_calls(formula, renumbered), tuple(used)


def _map_calls(formula: Formula, replace: Callable[[TestCall], Formula]) -> Formula:
    match formula:
        case TestCall():
            return replace(formula)
        case AllOf(operands):
            return conjunction(_map_calls(operand, replace) for operand in operands)
        case AnyOf(operands):
            return disjunction(_map_calls(operand, replace) for operand in operands)
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

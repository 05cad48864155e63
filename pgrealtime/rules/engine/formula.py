"""A predicate cut into parts that are decided each by itself. Between resolve and plan.

A rule is true or not; it has no negation outside a comparison. So EXISTS over its joins may be
moved inwards as far as comparisons don't share a join, and what is left is a formula of AND and OR
over *atoms*: conditions with joins of their own, each decided in the process or by Postgres.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Macro,
    Parameter,
    ParameterClass,
)
from pgrealtime.rules.language.predicate import (
    CallerRow,
    CollectionRows,
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    EachValue,
    FieldValue,
    GeoDistance,
    JsonValue,
    NestedRule,
    Predicate,
    RowPath,
    Strftime,
    Term,
    ToOne,
    condition_parameters,
    row_path_of,
    terms,
)
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.memory.conditions import (
    CompiledCondition,
    columns_read,
    compile_condition,
)
from pgrealtime.rules.memory.operands import CompileContext
from pgrealtime.rules.sql.conditions import SqlPredicate, translate_predicate
from pgrealtime.rules.sql.joins import CALLER_ID_PARAMETER


class Test:
    """A condition about one row of a collection. Its identity is what verdicts are kept by.

    Attributes:
        caller_parameters: Its parameters that differ per subscriber, in the order of its arguments.
        macros: Those that differ per moment; their values follow.
        in_process: Decides it in the process; None if only Postgres can.
        columns: What must be known of the row.

    Args:
        collections: All there are.
        collection: Whose rows it is about.
        condition: The condition.
        parameter_classes: The class of each of its parameters.
        auth_collection: The collection of the subscriber's own row; None if there is no such row.
        is_caller_row_bound: The columns that are read of it come with the parameters.
        is_utf8: As ``CompileContext`` has it.
    """

    def __init__(
        self,
        collections: Collections,
        collection: Collection,
        condition: Condition,
        parameter_classes: Mapping[Parameter, ParameterClass],
        *,
        auth_collection: Collection | None = None,
        is_caller_row_bound: bool = False,
        is_utf8: bool = True,
    ) -> None:
        self.collections = collections
        self.collection = collection
        self.condition = condition
        self.parameter_classes = parameter_classes
        self._auth_collection = auth_collection
        self._is_caller_row_bound = is_caller_row_bound
        found = [p for p in condition_parameters(condition) if not isinstance(p, LiteralParameter)]
        own = list(caller_columns(condition)) if is_caller_row_bound else []
        free: list[Parameter | CallerColumn] = [p for p in found if not isinstance(p, Macro)]
        if reads_caller_row(condition) and CALLER_ID_PARAMETER not in free:
            free.append(CALLER_ID_PARAMETER)
        self.macros = _macros_read(condition, found)
        self.caller_parameters = (*free, *own)
        order = {p: n for n, p in enumerate([*self.caller_parameters, *self.macros])}
        self.memory_context = CompileContext(
            parameter_classes=parameter_classes, argument_index=order, is_utf8=is_utf8
        )
        self.in_process: CompiledCondition | None = compile_condition(
            condition, self.memory_context
        )
        self.columns = (
            frozenset(self.sql_predicate.columns)
            if self.in_process is None
            else columns_read(condition)
        )

    @cached_property
    def sql_predicate(self) -> SqlPredicate:
        """The condition in SQL.

        Raises:
            RuleUnsupportedError: It can't be decided exactly there either.
        """
        predicate = Predicate(collection=self.collection.name, where=self.condition)
        return translate_predicate(
            predicate,
            self.collections,
            self.parameter_classes,
            auth_collection=self._auth_collection,
            is_caller_row_bound=self._is_caller_row_bound,
        )

    @property
    def tables(self) -> frozenset[TableName]:
        """What Postgres reads to decide it, beside the row."""
        return self.sql_predicate.tables

    @property
    def is_row_independent(self) -> bool:
        """Whether it is decided here once for a subscriber, whatever the row and the moment."""
        return self.in_process is not None and not self.columns and not self.macros


@dataclass(frozen=True, slots=True)
class TestCall:
    """An atom in a formula."""

    test: Test
    argument_positions: tuple[int, ...]
    """Where its free parameters' values are among those of the whole."""

    @property
    def is_caller_independent(self) -> bool:
        """Whether all subscribers share its verdict."""
        return not self.argument_positions


@dataclass(frozen=True, slots=True)
class AllOf:
    """True if every part is."""

    operands: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """True if some part is."""

    operands: tuple[Formula, ...]


Formula: TypeAlias = bool | TestCall | AllOf | AnyOf


def each_test_call(formula: Formula) -> Iterator[TestCall]:
    """Every leaf, in order."""
    match formula:
        case TestCall():
            yield formula
        case AllOf(parts) | AnyOf(parts):
            for part in parts:
                yield from each_test_call(part)
        case bool():
            return


def map_test_calls(formula: Formula, replace: Callable[[TestCall], Formula]) -> Formula:
    """Return the formula with other leaves, simplified where they became constants."""
    match formula:
        case TestCall():
            return replace(formula)
        case AllOf(parts):
            return conjunction(map_test_calls(part, replace) for part in parts)
        case AnyOf(parts):
            return disjunction(map_test_calls(part, replace) for part in parts)
        case bool():
            return formula


def conjunction(operands: Iterator[Formula]) -> Formula:
    """Return the conjunction, flat and without constants."""
    kept: list[Formula] = []
    for part in operands:
        match part:
            case True:
                continue
            case False:
                return False
            case AllOf(inner):
                kept.extend(inner)
            case _:
                kept.append(part)
    return AllOf(tuple(kept)) if len(kept) > 1 else kept[0] if kept else True


def disjunction(operands: Iterator[Formula]) -> Formula:
    """Return the disjunction, flat and without constants."""
    kept: list[Formula] = []
    for part in operands:
        match part:
            case False:
                continue
            case True:
                return True
            case AnyOf(inner):
                kept.extend(inner)
            case _:
                kept.append(part)
    return AnyOf(tuple(kept)) if len(kept) > 1 else kept[0] if kept else False


# --- the subscriber's own row


def reads_caller_row(condition: Condition) -> bool:
    """Whether it reads the subscriber's row, or anything reached through it."""
    return any(isinstance(place.root, CallerRow) for place in _row_paths(condition))


def caller_columns(condition: Condition) -> Iterator[CallerColumn]:
    """Yield the columns of the subscriber's row that it reads, first that for whether there is."""
    names = {
        field.column.name
        for term in terms(condition)
        if (place := row_path_of(term)) is not None and isinstance(place.root, CallerRow)
        for field in _root_fields_read(term, place)
        if field.column is not None
    }
    if names:
        yield CallerColumn("")
        yield from map(CallerColumn, sorted(names))


def _root_fields_read(term: Term, path: RowPath) -> Iterator[Field]:
    """Yield the field that is read of the row where the place begins, if any."""
    match path.steps, term:
        case (), (FieldValue(field=field) | JsonValue(field=field)):
            yield field
        case ((ToOne(field) | EachValue(field)), *_), _:
            yield field
        case _:
            return


def _row_paths(condition: Condition) -> Iterator[RowPath]:
    """Every place that is read, in nested conditions too."""
    match condition:
        case Comparison():
            found = (row_path_of(term) for term in terms(condition))
            yield from (place for place in found if place is not None)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _row_paths(part)
        case NestedRule(place, where):
            yield place
            yield from _row_paths(where)


def _macros_read(condition: Condition, found_parameters: Sequence[Parameter]) -> tuple[Macro, ...]:
    """Return the macros among the parameters, and ``@now`` where a format has no other time."""
    macros = [p for p in found_parameters if isinstance(p, Macro)]
    is_now = any(isinstance(term, Strftime) for term in terms(condition))
    if is_now and Macro.NOW not in macros:
        macros.append(Macro.NOW)
    return tuple(macros)


# --- verdicts


class MacroValues:
    """What macros mean while one batch is decided."""

    __slots__ = ("_compute", "_values")

    def __init__(self, compute: Callable[[Macro], Scalar]) -> None:
        self._compute = compute
        self._values: dict[Macro, Scalar] = {}

    def __getitem__(self, macro: Macro) -> Scalar:
        if macro not in self._values:
            self._values[macro] = self._compute(macro)
        return self._values[macro]


# --- cutting


SplitCondition: TypeAlias = Condition | tuple[str, tuple["SplitCondition", ...]]
"""A condition that stays whole, or ``("all" | "some", parts)``."""


def split_condition(condition: Condition) -> SplitCondition:
    """Return the condition in as many parts as are independent of one another."""
    match condition:
        case Comparison() | NestedRule():
            return condition
        case Disjunction(parts):
            return ("some", tuple(split_condition(part) for part in parts))
        case Conjunction(parts):
            groups = _group_by_shared_joins(_flatten_conjunction(parts))
            if len(groups) == 1 and len(groups[0]) > 1:
                return Conjunction(tuple(groups[0]))
            return ("all", tuple(_split_group(group) for group in groups))


def _split_group(group: Sequence[Condition]) -> SplitCondition:
    return split_condition(group[0]) if len(group) == 1 else Conjunction(tuple(group))


def _flatten_conjunction(parts: Sequence[Condition]) -> Iterator[Condition]:
    for part in parts:
        if isinstance(part, Conjunction):
            yield from _flatten_conjunction(part.conditions)
        else:
            yield part


def _group_by_shared_joins(parts: Iterator[Condition]) -> list[list[Condition]]:
    """Put together what shares a join, directly or through others."""
    groups: list[tuple[set[RowPath], list[Condition]]] = []
    for part in parts:
        joins, members = set(_joins_of_condition(part)), [part]
        rest = []
        for other in groups:
            if joins.isdisjoint(other[0]):
                rest.append(other)
            else:
                joins |= other[0]
                members = other[1] + members
        groups = [*rest, (joins, members)]
    return [members for _, members in groups]


def _joins_of_condition(condition: Condition) -> Iterator[RowPath]:
    """Every join that the condition's own scope makes."""
    match condition:
        case Comparison(left, _, _, right):
            for term in (left, right):
                yield from _joins_of_term(term)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _joins_of_condition(part)
        case NestedRule(place, _):
            yield from _joins_of_path(place)


def _joins_of_term(term: Term) -> Iterator[RowPath]:
    match term:
        case GeoDistance(args):
            for arg in args:
                yield from _joins_of_term(arg)
        case Strftime(time=time):
            if time is not None:
                yield from _joins_of_term(time)
        case _:
            place = row_path_of(term)
            if place is not None:
                yield from _joins_of_path(place)


def _joins_of_path(path: RowPath) -> Iterator[RowPath]:
    """Yield the joins that lead to a place, those excepted that give a subscriber's one row.

    The subscriber's own row, and what it points to by single relations, is the same in every
    combination of joined rows: comparisons that share it are independent all the same.
    """
    if isinstance(path.root, CollectionRows):
        yield RowPath(path.root)
    is_one = isinstance(path.root, CallerRow)
    for length, step in enumerate(path.steps, start=1):
        is_one = is_one and isinstance(step, ToOne)
        if not is_one:
            yield RowPath(path.root, path.steps[:length])

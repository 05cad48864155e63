"""The predicate: a rule or filter resolved to row paths, terms and comparisons.

Made by ``resolve``; knows no SQL. ``rules.sql`` translates it, ``rules.memory`` compiles parts of
it, ``rules.engine`` splits it. What a comparison of two terms means is decided in ``comparison``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TypeAlias

from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.parameters import (
    CALLER_ID_PARAMETER,
    CallerColumn,
    LiftedLiteral,
    LiteralParameter,
    Macro,
    Parameter,
)
from pgrealtime.rules.language.syntax import Op

# --- row paths


@dataclass(frozen=True, slots=True)
class ScopeRow:
    """The row that the rule, or the ``NestedRule`` around, is about."""

    collection_name: str


@dataclass(frozen=True, slots=True)
class CallerRow:
    """The caller's own row, found by ``@request.auth.id``."""

    collection_name: str


@dataclass(frozen=True, slots=True)
class CollectionRows:
    """Every row of a collection: ``@collection.name`` or ``@collection.name:alias``."""

    collection_name: str
    alias: str | None


PathRoot: TypeAlias = ScopeRow | CallerRow | CollectionRows


@dataclass(frozen=True, slots=True)
class ToOne:
    """From a row to the row that its single relation names."""

    field: Field
    collection_name: str


@dataclass(frozen=True, slots=True)
class EachValue:
    """From a row to each id, or each value, of a multiple field; this isn't a row yet."""

    field: Field


@dataclass(frozen=True, slots=True)
class ToEach:
    """From one of those ids to the row that it names."""

    collection_name: str


@dataclass(frozen=True, slots=True)
class BackRelation:
    """From a row to the rows of the collection whose relation ``field`` points to it."""

    collection_name: str
    field: Field
    is_unique: bool
    """At most one row can point to it."""


PathStep: TypeAlias = ToOne | EachValue | ToEach | BackRelation


@dataclass(frozen=True, slots=True)
class RowPath:
    """A chain of LEFT JOINs. Equal paths of a scope are one join, shared by all comparisons."""

    root: PathRoot
    steps: tuple[PathStep, ...] = ()

    @property
    def is_scope_row(self) -> bool:
        """Whether it is the scope's row itself, without a join."""
        return isinstance(self.root, ScopeRow) and not self.steps

    @property
    def is_caller_row(self) -> bool:
        """Whether it is the caller's own row itself, without a join."""
        return isinstance(self.root, CallerRow) and not self.steps

    @property
    def is_multiple(self) -> bool:
        """Whether it can lead to more than one row or value, so that comparisons match all."""
        return isinstance(self.root, CollectionRows) or any(
            isinstance(step, EachValue) or (isinstance(step, BackRelation) and not step.is_unique)
            for step in self.steps
        )

    @property
    def collection_name(self) -> str:
        """The collection of the rows at its end; of values, that of the rows that hold them."""
        for step in reversed(self.steps):
            if not isinstance(step, EachValue):
                return step.collection_name
        return self.root.collection_name

    def extended_by(self, *steps: PathStep) -> RowPath:
        """Return the path with these steps added."""
        return replace(self, steps=self.steps + steps)

    def joined_rows(self) -> Iterator[RowPath]:
        """Yield every path on the way, itself included, that is a joined row of a collection."""
        if not isinstance(self.root, ScopeRow):
            yield RowPath(self.root)
        for length, step in enumerate(self.steps, start=1):
            if not isinstance(step, EachValue):
                yield RowPath(self.root, self.steps[:length])


# --- operands


@dataclass(frozen=True, slots=True)
class ParameterTerm:
    """A value that depends on no row."""

    parameter: Parameter


@dataclass(frozen=True, slots=True)
class Keyword:
    """``null``, ``true``, ``false``, and what has one of these values for every request."""

    value: bool | None


@dataclass(frozen=True, slots=True)
class AbsentEach:
    """``:each`` of a field of the request's body, which realtime hasn't: NULL.

    PocketBase takes it for nonempty, since it comes from a parameter, and for one of many values if
    the field is multiple.
    """

    is_multiple: bool


class Modifier(Enum):
    """What of a field's value is meant."""

    WHOLE = auto()
    LOWER = auto()
    """``:lower``, ASCII only."""
    LENGTH = auto()
    """``:length``; 0 where there is nothing."""
    EACH = auto()
    """``:each`` of a single field: the value, without its affinity."""


@dataclass(frozen=True, slots=True)
class FieldValue:
    """A field of the row at a path; of many values, their JSON text."""

    row_path: RowPath
    field: Field
    modifier: Modifier = Modifier.WHOLE
    shown_by: Field | None = None
    """Of an address: the boolean field without which it counts as NULL."""


@dataclass(frozen=True, slots=True)
class EachTerm:
    """``:each``: one of a multiple field's values. The path ends with its ``EachValue``."""

    row_path: RowPath

    @property
    def kind(self) -> FieldKind:
        """The kind of one value."""
        last = self.row_path.steps[-1]
        assert isinstance(last, EachValue)
        return last.field.kind


@dataclass(frozen=True, slots=True)
class JsonValue:
    """What a json or geo field has under the keys; without keys the whole of a json field."""

    row_path: RowPath
    field: Field
    keys: tuple[str, ...]
    is_lower: bool = False


@dataclass(frozen=True, slots=True)
class SecretTerm:
    """A secret that PocketBase has and the table hasn't: a text that no rule can name."""

    row_path: RowPath
    modifier: Modifier = Modifier.WHOLE


@dataclass(frozen=True, slots=True)
class Strftime:
    """A time in SQLite's format; without ``time``, the time of the batch."""

    format: str
    time: Term | None
    modifiers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GeoDistance:
    """Kilometres between two points on a sphere."""

    args: tuple[Term, Term, Term, Term]
    """lonA, latA, lonB, latB."""


RowTerm: TypeAlias = FieldValue | EachTerm | JsonValue | SecretTerm
Term: TypeAlias = ParameterTerm | Keyword | AbsentEach | RowTerm | Strftime | GeoDistance


# --- conditions


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two operands compared. Without ``is_any`` every value of a multiple path must agree."""

    left: Term
    op: Op
    is_any: bool
    right: Term
    start: int = field(compare=False, default=0)
    end: int = field(compare=False, default=0)
    listed: tuple[NestedRule, ...] = ()
    """Of a client's filter: list rules of the rows on its multiple paths. Where all values must
    agree, only those of listed rows are asked."""


@dataclass(frozen=True, slots=True)
class Conjunction:
    """True if every condition is."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Disjunction:
    """True if some condition is."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class NestedRule:
    """Another collection's rule about the row at a path, with joins of its own."""

    row_path: RowPath
    where: Condition


Condition: TypeAlias = Comparison | Conjunction | Disjunction | NestedRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicate:
    """A rule or filter about a row of the collection: one scope of joins."""

    collection_name: str
    where: Condition


@dataclass(frozen=True, slots=True)
class AdmitAll:
    """In place of a predicate: all rows are admitted."""


@dataclass(frozen=True, slots=True)
class DenyAll:
    """In place of a predicate: no row is admitted."""

    reason: str
    """For the log; says nothing about any row."""


# --- walking


def comparisons(condition: Condition) -> tuple[Comparison, ...]:
    """Return every comparison, those of nested rules included, from left to right."""
    match condition:
        case Comparison(listed=listed):
            return (condition, *(comparison for rule in listed for comparison in comparisons(rule)))
        case Conjunction(parts) | Disjunction(parts):
            return tuple(comparison for part in parts for comparison in comparisons(part))
        case NestedRule(_, where):
            return comparisons(where)


def terms(condition: Condition) -> list[Term]:
    """Return every operand, each followed by its arguments."""
    return [term for comparison in comparisons(condition) for term in own_terms(comparison)]


def own_terms(comparison: Comparison) -> Iterator[Term]:
    """Yield its operands, each followed by its arguments, without those of ``listed``."""
    for term in (comparison.left, comparison.right):
        yield term
        if isinstance(term, Strftime) and term.time is not None:
            yield term.time
        if isinstance(term, GeoDistance):
            yield from term.args


def paths_read(condition: Condition, *, is_nested_included: bool) -> Iterator[RowPath]:
    """Yield every path that is read; of a nested rule that to its row, and those in it or not."""
    match condition:
        case Comparison(listed=listed):
            yield from filter(None, map(row_path_of, own_terms(condition)))
            if is_nested_included:
                for rule in listed:
                    yield from paths_read(rule, is_nested_included=True)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from paths_read(part, is_nested_included=is_nested_included)
        case NestedRule(path, where):
            yield path
            if is_nested_included:
                yield from paths_read(where, is_nested_included=True)


def condition_parameters(condition: Condition) -> tuple[Parameter, ...]:
    """Return the distinct parameters in order of appearance."""
    parameters = (term.parameter for term in terms(condition) if isinstance(term, ParameterTerm))
    return tuple(dict.fromkeys(parameters))


def caller_columns(condition: Condition) -> list[CallerColumn]:
    """Return the columns that it reads of the caller's own row.

    The first stands for whether there is such a row (its name is empty), the others are sorted.
    """
    names = columns_read(condition, CallerRow)
    return [CallerColumn(name) for name in ("", *sorted(names))] if names else []


def columns_read(
    condition: Condition, root: type[ScopeRow | CallerRow] = ScopeRow
) -> frozenset[str]:
    """Return the columns that a condition reads of the scope's row itself, or of the caller's."""
    columns: set[str] = set()
    for term in terms(condition):
        path = row_path_of(term)
        if path is None or not isinstance(path.root, root):
            continue
        match path.steps[0] if path.steps else term:
            case ToOne(f) | EachValue(f) | FieldValue(_, f) | JsonValue(_, f) if f.column:
                columns.add(f.column.name)
    return frozenset(columns)


def reads_caller_row(condition: Condition) -> bool:
    """Return whether it reads the caller's own row, or anything reached from it."""
    paths = paths_read(condition, is_nested_included=True)
    return any(isinstance(path.root, CallerRow) for path in paths)


def varying_parameters(
    condition: Condition, *, is_caller_row_bound: bool
) -> tuple[tuple[Parameter | CallerColumn, ...], tuple[Macro, ...]]:
    """Return the parameters that differ per caller, and those that differ per batch.

    If the caller's row is bound, its columns are parameters. ``strftime`` without a time reads
    ``@now``.
    """
    parameters = condition_parameters(condition)
    macros = [one for one in parameters if isinstance(one, Macro)]
    if any(isinstance(term, Strftime) for term in terms(condition)):
        macros.append(Macro.NOW)
    of_caller: list[Parameter | CallerColumn] = [
        one for one in parameters if not isinstance(one, Macro | LiteralParameter)
    ]
    if reads_caller_row(condition):
        of_caller.append(CALLER_ID_PARAMETER)
    if is_caller_row_bound:
        of_caller += caller_columns(condition)
    return tuple(dict.fromkeys(of_caller)), tuple(dict.fromkeys(macros))


def row_path_of(term: Term) -> RowPath | None:
    """Return the path to the operand's value; None if it is the same for every row.

    ``geoDistance`` has none: PocketBase never matches all of its values.
    """
    match term:
        case FieldValue() | EachTerm() | JsonValue() | SecretTerm():
            return term.row_path
        case Strftime(time=time):
            return None if time is None else row_path_of(time)
        case ParameterTerm() | Keyword() | AbsentEach() | GeoDistance():
            return None


def is_multiple(term: Term) -> bool:
    """Return whether a comparison of it without ``?`` must hold for all of its values."""
    if isinstance(term, AbsentEach):
        return term.is_multiple
    path = row_path_of(term)
    return path is not None and path.is_multiple


# --- parameters


def lift_literals(predicate: Predicate) -> tuple[Predicate, tuple[str | float, ...]]:
    """Return the predicate with its literals as parameters, and the literals.

    Predicates that differ only in literals become equal, and share what is compiled of them.
    """
    where, lifted = _lift(predicate.where, LiteralParameter)
    literals = tuple(one.value for one in lifted if isinstance(one, LiteralParameter))
    return replace(predicate, where=where), literals


def number_literals_from_zero(
    part: Condition,
) -> tuple[Condition, Mapping[Parameter | CallerColumn, Parameter]]:
    """Return a part of a filter as filters with other parts have it, and what its literals were.

    So that filters share tests whatever else they ask for.
    """
    renumbered, lifted = _lift(part, LiftedLiteral)
    return renumbered, {LiftedLiteral(at): original for at, original in enumerate(lifted)}


def _lift(
    condition: Condition, kind: type[LiteralParameter | LiftedLiteral]
) -> tuple[Condition, list[Parameter]]:
    """Return the condition with its parameters of a kind numbered, and these from left to right."""
    lifted: list[Parameter] = []

    def lift_term(term: Term) -> Term:
        match term:
            case ParameterTerm(parameter) if isinstance(parameter, kind):
                lifted.append(parameter)
                return ParameterTerm(LiftedLiteral(len(lifted) - 1))
            case Strftime(time=time) if time is not None:
                return replace(term, time=lift_term(time))
            case GeoDistance((a, b, c, d)):
                return GeoDistance((lift_term(a), lift_term(b), lift_term(c), lift_term(d)))
            case _:
                return term

    def lift(part: Condition) -> Condition:
        match part:
            case Comparison(left, _, _, right):
                sides = lift_term(left), lift_term(right)
                listed = tuple(map(lift_rule, part.listed))
                return replace(part, left=sides[0], right=sides[1], listed=listed)
            case Conjunction(parts) | Disjunction(parts):
                return replace(part, conditions=tuple(map(lift, parts)))
            case NestedRule():
                return lift_rule(part)

    def lift_rule(rule: NestedRule) -> NestedRule:
        return replace(rule, where=lift(rule.where))

    return lift(condition), lifted


# --- parts without shared joins


def independent_parts(conjunction: Conjunction) -> list[Condition]:
    """Return what the conjunction consists of, as conditions that share no join.

    What shares a join, directly or through others, is one part: it is about one and the same row.
    """
    groups: list[tuple[set[RowPath], list[Condition]]] = []
    for condition in _flattened(conjunction):
        shared = joins(condition)
        members = [condition]
        separate = []
        for group in groups:
            if shared.isdisjoint(group[0]):
                separate.append(group)
            else:
                shared |= group[0]
                members = group[1] + members
        groups = [*separate, (shared, members)]
    return [one[0] if len(one) == 1 else Conjunction(tuple(one)) for _, one in groups]


def joins(condition: Condition) -> set[RowPath]:
    """Return the joins that other conditions in its scope share with it."""
    paths = paths_read(condition, is_nested_included=False)
    return {join for path in paths for join in _joins_of_path(path)}


def _flattened(conjunction: Conjunction) -> Iterator[Condition]:
    for part in conjunction.conditions:
        if isinstance(part, Conjunction):
            yield from _flattened(part)
        else:
            yield part


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

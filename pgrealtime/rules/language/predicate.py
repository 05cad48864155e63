"""The predicate: a rule or filter resolved to row paths, terms and comparisons.

Made by ``resolve``; knows no SQL. ``rules.sql`` translates it, ``rules.memory`` compiles parts of
it, ``rules.engine`` splits it. What a comparison of two terms means is decided in ``comparison``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TypeAlias

from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.parameters import LiftedLiteral, LiteralParameter, Parameter
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


Term: TypeAlias = (
    ParameterTerm
    | Keyword
    | AbsentEach
    | FieldValue
    | EachTerm
    | JsonValue
    | SecretTerm
    | Strftime
    | GeoDistance
)


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
        case Comparison():
            return (condition,)
        case Conjunction(parts) | Disjunction(parts):
            return tuple(comparison for part in parts for comparison in comparisons(part))
        case NestedRule(_, where):
            return comparisons(where)


def terms(condition: Condition) -> tuple[Term, ...]:
    """Return every operand, each followed by its arguments."""
    return tuple(_each_term(condition))


def _each_term(condition: Condition) -> Iterator[Term]:
    for comparison in comparisons(condition):
        for term in (comparison.left, comparison.right):
            yield term
            if isinstance(term, Strftime) and term.time is not None:
                yield term.time
            if isinstance(term, GeoDistance):
                yield from term.args


def row_paths(condition: Condition) -> tuple[RowPath, ...]:
    """Return every path that is read, in nested rules too."""
    match condition:
        case Comparison():
            paths = (row_path_of(term) for term in terms(condition))
            return tuple(path for path in paths if path is not None)
        case Conjunction(parts) | Disjunction(parts):
            return tuple(path for part in parts for path in row_paths(part))
        case NestedRule(path, where):
            return (path, *row_paths(where))


def condition_parameters(condition: Condition) -> tuple[Parameter, ...]:
    """Return the distinct parameters in order of appearance."""
    parameters = (term.parameter for term in terms(condition) if isinstance(term, ParameterTerm))
    return tuple(dict.fromkeys(parameters))


def columns_read(condition: Condition) -> frozenset[str]:
    """Return the columns that a condition without nested rules reads of the scope's row."""
    columns: set[str] = set()
    for term in terms(condition):
        path = row_path_of(term)
        if path is None or not isinstance(path.root, ScopeRow):
            continue
        field_: Field | None = None
        if path.steps:
            first = path.steps[0]
            field_ = first.field if isinstance(first, EachValue) else None
        elif isinstance(term, FieldValue | JsonValue):
            field_ = term.field
        if field_ is not None and field_.column is not None:
            columns.add(field_.column.name)
    return frozenset(columns)


def row_path_of(term: Term) -> RowPath | None:
    """Return the path to the operand's value; None if it is the same for every row.

    ``geoDistance`` has none: PocketBase never matches all of its values.
    """
    match term:
        case (
            FieldValue(row_path=path)
            | EachTerm(path)
            | JsonValue(row_path=path)
            | SecretTerm(row_path=path)
        ):
            return path
        case Strftime(time=time):
            return None if time is None else row_path_of(time)
        case ParameterTerm() | Keyword() | AbsentEach() | GeoDistance():
            return None


def map_parameters(condition: Condition, replaced: Callable[[Parameter], Parameter]) -> Condition:
    """Return the condition with each parameter replaced, from left to right."""

    def map_term(term: Term) -> Term:
        match term:
            case ParameterTerm(parameter):
                return ParameterTerm(replaced(parameter))
            case Strftime(time=time) if time is not None:
                return replace(term, time=map_term(time))
            case GeoDistance((lon_a, lat_a, lon_b, lat_b)):
                return GeoDistance(
                    (map_term(lon_a), map_term(lat_a), map_term(lon_b), map_term(lat_b))
                )
            case _:
                return term

    match condition:
        case Comparison(left, op, is_any, right, start, end):
            return Comparison(map_term(left), op, is_any, map_term(right), start, end)
        case Conjunction(parts):
            return Conjunction(tuple(map_parameters(part, replaced) for part in parts))
        case Disjunction(parts):
            return Disjunction(tuple(map_parameters(part, replaced) for part in parts))
        case NestedRule(path, where):
            return NestedRule(path, map_parameters(where, replaced))


def lift_literals(predicate: Predicate) -> tuple[Predicate, tuple[str | float, ...]]:
    """Return the predicate with its literals as parameters, and the literals.

    Predicates that differ only in literals become equal, and share what is compiled of them.
    """
    literals: list[str | float] = []

    def lift(parameter: Parameter) -> Parameter:
        if not isinstance(parameter, LiteralParameter):
            return parameter
        literals.append(parameter.value)
        return LiftedLiteral(len(literals) - 1)

    return replace(predicate, where=map_parameters(predicate.where, lift)), tuple(literals)

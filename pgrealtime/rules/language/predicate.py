"""The resolved rule: paths are places and fields, the rest is parameters. Built by resolve.py.

``lower.py`` turns it into SQL; a planner or an evaluator in the process may read it part by part.
What a comparison means follows from the ``Traits`` of its two sides alone, so both ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TypeAlias

from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.parameters import (
    LiftedLiteral,
    LiteralParameter,
    Parameter,
)
from pgrealtime.rules.language.syntax import Op

# --- where a value is found


@dataclass(frozen=True, slots=True)
class ScopeRow:
    """The row that the rule, or the ``NestedRule`` part around, is about."""

    collection: str


@dataclass(frozen=True, slots=True)
class CallerRow:
    """The subscriber's own row, found by ``@request.auth.id``."""

    collection: str


@dataclass(frozen=True, slots=True)
class CollectionRows:
    """Every row of a collection: ``@collection.name`` or ``@collection.name:alias``."""

    collection: str
    alias: str | None


PathRoot: TypeAlias = ScopeRow | CallerRow | CollectionRows


@dataclass(frozen=True, slots=True)
class ToOne:
    """Along a single relation to the row it names."""

    field: Field
    collection: str


@dataclass(frozen=True, slots=True)
class EachValue:
    """To each id, or each value, that a multiple field holds; not a row yet."""

    field: Field


@dataclass(frozen=True, slots=True)
class ToEach:
    """From one of the ids to the row it names."""

    collection: str


@dataclass(frozen=True, slots=True)
class BackRelation:
    """To the rows of ``collection`` whose relation ``field`` points here."""

    collection: str
    field: Field
    is_unique: bool
    """At most one row can point here."""


PathStep: TypeAlias = ToOne | EachValue | ToEach | BackRelation


@dataclass(frozen=True, slots=True)
class RowPath:
    """A chain of LEFT JOINs. Within one scope equal places are one join, shared by all leaves."""

    root: PathRoot
    steps: tuple[PathStep, ...] = ()

    @property
    def is_scope_row(self) -> bool:
        """The row itself, no join."""
        return isinstance(self.root, ScopeRow) and not self.steps

    @property
    def is_multiple(self) -> bool:
        """Whether more than one row may be found there, so that comparisons need match-all."""
        return isinstance(self.root, CollectionRows) or any(map(_is_multiple, self.steps))

    @property
    def collection(self) -> str:
        """The collection whose rows are found there; of items, the one that holds them."""
        for step in reversed(self.steps):
            match step:
                case ToOne() | ToEach() | BackRelation():
                    return step.collection
                case EachValue():
                    continue
        return self.root.collection

    def extended_by(self, *steps: PathStep) -> RowPath:
        """The place these steps further on."""
        return replace(self, steps=self.steps + steps)

    def joined_rows(self) -> Iterator[RowPath]:
        """Every place on the way that is a row of a collection reached by a join, in order."""
        if not isinstance(self.root, ScopeRow):
            yield RowPath(self.root)
        for length, step in enumerate(self.steps, start=1):
            if not isinstance(step, EachValue):
                yield RowPath(self.root, self.steps[:length])


def _is_multiple(step: PathStep) -> bool:
    match step:
        case EachValue():
            return True
        case BackRelation():
            return not step.is_unique
        case ToOne() | ToEach():
            return False


# --- operands


@dataclass(frozen=True, slots=True)
class ParameterTerm:
    """A value that doesn't depend on any row."""

    parameter: Parameter


@dataclass(frozen=True, slots=True)
class Keyword:
    """``null``, ``true``, ``false`` and what is one of them for everybody."""

    value: bool | None


@dataclass(frozen=True, slots=True)
class AbsentEach:
    """``:each`` of a field that the request's body would hold: in realtime NULL.

    PocketBase takes it for something, since it comes from a parameter, and for one of many values
    if the field is multiple.
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
    """``:each`` of a single field: the value, without a class of its own."""


@dataclass(frozen=True, slots=True)
class FieldValue:
    """A field of the row at a place; of many values, their JSON text."""

    row_path: RowPath
    field: Field
    modifier: Modifier = Modifier.WHOLE


@dataclass(frozen=True, slots=True)
class EachTerm:
    """``:each``: one of a multiple field's values; the path ends with its ``EachValue``."""

    row_path: RowPath

    @property
    def kind(self) -> FieldKind:
        """What the field holds several of."""
        last = self.row_path.steps[-1]
        assert isinstance(last, EachValue)
        return last.field.kind


@dataclass(frozen=True, slots=True)
class JsonValue:
    """What a json or geo field holds under the keys, the whole of a json field without any."""

    row_path: RowPath
    field: Field
    keys: tuple[str, ...]
    is_lower: bool = False


@dataclass(frozen=True, slots=True)
class SecretTerm:
    """A secret that PocketBase has and the table hasn't: a text that nobody can name."""

    row_path: RowPath
    modifier: Modifier = Modifier.WHOLE


@dataclass(frozen=True, slots=True)
class Strftime:
    """A moment in SQLite's format; without ``time``, the moment of the batch."""

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
    """Two operands compared; without ``is_any`` every value of a multiple place must agree."""

    left: Term
    op: Op
    is_any: bool
    right: Term
    start: int = field(compare=False, default=0)
    end: int = field(compare=False, default=0)


@dataclass(frozen=True, slots=True)
class Conjunction:
    """True if every part is."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Disjunction:
    """True if some part is."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class NestedRule:
    """A condition about the row at ``place`` with joins of its own: another collection's rule."""

    row_path: RowPath
    where: Condition


Condition: TypeAlias = Comparison | Conjunction | Disjunction | NestedRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicate:
    """A rule or a filter, resolved: one scope of joins about a row of ``collection``."""

    collection: str
    where: Condition


# --- walking


def comparisons(condition: Condition) -> Iterator[Comparison]:
    """Every comparison, those of nested conditions included."""
    match condition:
        case Comparison():
            yield condition
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from comparisons(part)
        case NestedRule(_, where):
            yield from comparisons(where)


def terms(condition: Condition) -> Iterator[Term]:
    """Every operand and every argument of one."""
    for comparison in comparisons(condition):
        yield from _with_arguments(comparison.left)
        yield from _with_arguments(comparison.right)


def _with_arguments(term: Term) -> Iterator[Term]:
    yield term
    if isinstance(term, Strftime) and term.time is not None:
        yield term.time
    if isinstance(term, GeoDistance):
        yield from term.args


def condition_parameters(condition: Condition) -> tuple[Parameter, ...]:
    """The distinct parameters in order of appearance: shapes and values are given in this order."""
    found = (term.parameter for term in terms(condition) if isinstance(term, ParameterTerm))
    return tuple(dict.fromkeys(found))


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


def map_parameters(condition: Condition, replaced: Callable[[Parameter], Parameter]) -> Condition:
    """Return the condition with each parameter replaced, from left to right."""

    def map_term(term: Term) -> Term:
        match term:
            case ParameterTerm(parameter):
                return ParameterTerm(replaced(parameter))
            case Strftime(time=time) if time is not None:
                return replace(term, time=map_term(time))
            case GeoDistance((one, two, three, four)):
                return GeoDistance((map_term(one), map_term(two), map_term(three), map_term(four)))
            case _:
                return term

    match condition:
        case Comparison():
            left = map_term(condition.left)
            return replace(condition, left=left, right=map_term(condition.right))
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


def row_path_of(term: Term) -> RowPath | None:
    """Where the operand's value is found, for match-all; None if it is the same for every row.

    ``geoDistance`` has none: PocketBase never asks it for all.
    """
    match term:
        case (
            FieldValue(row_path=place)
            | EachTerm(place)
            | JsonValue(row_path=place)
            | SecretTerm(row_path=place)
        ):
            return place
        case Strftime(time=time):
            return None if time is None else row_path_of(time)
        case ParameterTerm() | Keyword() | AbsentEach() | GeoDistance():
            return None


# --- what a comparison means


@dataclass(frozen=True, slots=True)
class AdmitAll:
    """No row needs to be asked about: all are admitted."""


@dataclass(frozen=True, slots=True)
class DenyAll:
    """No row is admitted."""

    reason: str
    """For the log; says nothing about any row."""

"""A predicate cut into parts that are decided each by itself. Between resolve and plan.

A rule is true or not; it has no negation outside a comparison. So EXISTS over its joins may be
moved inwards as far as comparisons don't share a join, and what is left is a formula of AND and OR
over *atoms*: conditions with joins of their own, each decided in the process or by Postgres.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from pgrealtime.changes import Row, TableName
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.rules.language.parameters import AuthColumn, Literal, Macro, Parameter, Shape
from pgrealtime.rules.language.predicate import (
    AllRows,
    AuthRow,
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    FieldValue,
    GeoDistance,
    Items,
    JsonValue,
    Nested,
    Place,
    Predicate,
    Strftime,
    Term,
    ToOne,
    parameters,
    place_of,
    terms,
)
from pgrealtime.rules.memory.compare import Scalar
from pgrealtime.rules.memory.conditions import Args, Ground, Test, columns_read, compiled
from pgrealtime.rules.sql.conditions import Lowered, lower
from pgrealtime.rules.sql.joins import AUTH_ID


class Atom:
    """A condition about one row of a collection. Its identity is what verdicts are kept by.

    Attributes:
        free: Its parameters that differ per subscriber, in the order of its arguments.
        macros: Those that differ per moment; their values follow.
        test: Decides it in the process; None if only Postgres can.
        columns: What must be known of the row.

    Args:
        collections: All there are.
        collection: Whose rows it is about.
        condition: The condition.
        shapes: The class of each of its parameters.
        auth: The collection of the subscriber's own row; None if there is no such row.
        is_own_known: The columns that are read of it come with the parameters.
        is_utf8: As ``Ground`` has it.
    """

    def __init__(
        self,
        collections: Collections,
        collection: Collection,
        condition: Condition,
        shapes: Mapping[Parameter, Shape],
        *,
        auth: Collection | None = None,
        is_own_known: bool = False,
        is_utf8: bool = True,
    ) -> None:
        self.collections = collections
        self.collection = collection
        self.condition = condition
        self.shapes = shapes
        self._auth = auth
        self._is_own_known = is_own_known
        found = [p for p in parameters(condition) if not isinstance(p, Literal)]
        own = list(own_columns(condition)) if is_own_known else []
        free: list[Parameter | AuthColumn] = [p for p in found if not isinstance(p, Macro)]
        if asks_own_row(condition) and AUTH_ID not in free:
            free.append(AUTH_ID)
        self.macros = _macros(condition, found)
        self.free = (*free, *own)
        order = {p: n for n, p in enumerate([*self.free, *self.macros])}
        self.ground = Ground(shapes=shapes, order=order, is_utf8=is_utf8)
        self.test: Test | None = compiled(condition, self.ground)
        self.columns = (
            frozenset(self.lowered.columns) if self.test is None else columns_read(condition)
        )

    @cached_property
    def lowered(self) -> Lowered:
        """The condition in SQL.

        Raises:
            RuleUnsupportedError: It can't be decided exactly there either.
        """
        predicate = Predicate(collection=self.collection.name, where=self.condition)
        return lower(
            predicate,
            self.collections,
            self.shapes,
            caller=self._auth,
            is_own_bound=self._is_own_known,
        )

    @property
    def tables(self) -> frozenset[TableName]:
        """What Postgres reads to decide it, beside the row."""
        return self.lowered.tables

    @property
    def is_constant(self) -> bool:
        """Whether it is decided here once for a subscriber, whatever the row and the moment."""
        return self.test is not None and not self.columns and not self.macros


@dataclass(frozen=True, slots=True)
class Leaf:
    """An atom in a formula."""

    atom: Atom
    picks: tuple[int, ...]
    """Where its free parameters' values are among those of the whole."""

    @property
    def is_guard(self) -> bool:
        """Whether all subscribers share its verdict."""
        return not self.picks


@dataclass(frozen=True, slots=True)
class All:
    """True if every part is."""

    parts: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """True if some part is."""

    parts: tuple[Formula, ...]


Formula: TypeAlias = bool | Leaf | All | Some


def leaves(formula: Formula) -> Iterator[Leaf]:
    """Every leaf, in order."""
    match formula:
        case Leaf():
            yield formula
        case All(parts) | Some(parts):
            for part in parts:
                yield from leaves(part)
        case bool():
            return


def rebuilt(formula: Formula, make: Callable[[Leaf], Formula]) -> Formula:
    """Return the formula with other leaves, simplified where they became constants."""
    match formula:
        case Leaf():
            return make(formula)
        case All(parts):
            return all_of(rebuilt(part, make) for part in parts)
        case Some(parts):
            return some_of(rebuilt(part, make) for part in parts)
        case bool():
            return formula


def all_of(parts: Iterator[Formula]) -> Formula:
    """Return the conjunction, flat and without constants."""
    kept: list[Formula] = []
    for part in parts:
        match part:
            case True:
                continue
            case False:
                return False
            case All(inner):
                kept.extend(inner)
            case _:
                kept.append(part)
    return All(tuple(kept)) if len(kept) > 1 else kept[0] if kept else True


def some_of(parts: Iterator[Formula]) -> Formula:
    """Return the disjunction, flat and without constants."""
    kept: list[Formula] = []
    for part in parts:
        match part:
            case False:
                continue
            case True:
                return True
            case Some(inner):
                kept.extend(inner)
            case _:
                kept.append(part)
    return Some(tuple(kept)) if len(kept) > 1 else kept[0] if kept else False


# --- the subscriber's own row


def asks_own_row(condition: Condition) -> bool:
    """Whether it reads the subscriber's row, or anything reached through it."""
    return any(isinstance(place.origin, AuthRow) for place in _places(condition))


def own_columns(condition: Condition) -> Iterator[AuthColumn]:
    """Yield the columns of the subscriber's row that it reads, first that for whether there is."""
    names = {
        field.column.name
        for term in terms(condition)
        if (place := place_of(term)) is not None and isinstance(place.origin, AuthRow)
        for field in _fields_read(term, place)
        if field.column is not None
    }
    if names:
        yield AuthColumn("")
        yield from map(AuthColumn, sorted(names))


def _fields_read(term: Term, place: Place) -> Iterator[Field]:
    """Yield the field that is read of the row where the place begins, if any."""
    match place.steps, term:
        case (), (FieldValue(field=field) | JsonValue(field=field)):
            yield field
        case ((ToOne(field) | Items(field)), *_), _:
            yield field
        case _:
            return


def _places(condition: Condition) -> Iterator[Place]:
    """Every place that is read, in nested conditions too."""
    match condition:
        case Comparison():
            found = (place_of(term) for term in terms(condition))
            yield from (place for place in found if place is not None)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _places(part)
        case Nested(place, where):
            yield place
            yield from _places(where)


def _macros(condition: Condition, found: Sequence[Parameter]) -> tuple[Macro, ...]:
    """Return the macros among the parameters, and ``@now`` where a format has no other time."""
    macros = [p for p in found if isinstance(p, Macro)]
    is_now = any(isinstance(term, Strftime) for term in terms(condition))
    if is_now and Macro.NOW not in macros:
        macros.append(Macro.NOW)
    return tuple(macros)


# --- verdicts


class Moment:
    """What macros mean while one batch is decided."""

    __slots__ = ("_read", "_values")

    def __init__(self, read: Callable[[Macro], Scalar]) -> None:
        self._read = read
        self._values: dict[Macro, Scalar] = {}

    def __getitem__(self, macro: Macro) -> Scalar:
        if macro not in self._values:
            self._values[macro] = self._read(macro)
        return self._values[macro]


class Facts:
    """What is known about one row while a batch is decided.

    Attributes:
        row: The image.
        missing: Columns that the image lacks.
        is_missing_unknown: Whether an atom that reads a missing column is neither true nor false,
            for ever; else it is false.
        answers: What Postgres said of atoms, by their arguments.
    """

    __slots__ = (
        "_guards",
        "_undecided",
        "answers",
        "is_missing_unknown",
        "missing",
        "moment",
        "row",
    )

    def __init__(
        self,
        row: Row,
        missing: frozenset[str],
        moment: Moment,
        *,
        is_missing_unknown: bool = False,
    ) -> None:
        self.row = row
        self.missing = missing
        self.is_missing_unknown = is_missing_unknown
        self.moment = moment
        self.answers: dict[tuple[Atom, Args], bool] = {}
        self._guards: dict[Atom, bool] = {}
        self._undecided: set[tuple[Atom, Args]] = set()
        """What only Postgres can say although its atom has a test: it isn't tried again."""

    def args(self, leaf: Leaf, values: Sequence[Scalar]) -> tuple[Scalar, ...]:
        """Return the leaf's arguments for a subscriber's values."""
        picked = tuple([values[at] for at in leaf.picks])
        macros = leaf.atom.macros
        return picked + tuple([self.moment[macro] for macro in macros]) if macros else picked

    def verdict(self, leaf: Leaf, values: Sequence[Scalar]) -> bool | None:
        """Return whether the leaf is true; None if Postgres has yet to say."""
        atom = leaf.atom
        if not leaf.picks:
            known = self._guards.get(atom)
            if known is None:
                known = self._ask(atom, self.args(leaf, values))
                if known is not None:
                    self._guards[atom] = known
            return known
        return self._ask(atom, self.args(leaf, values))

    def _ask(self, atom: Atom, args: tuple[Scalar, ...]) -> bool | None:
        if self.missing and not self.missing.isdisjoint(atom.columns):
            return None if self.is_missing_unknown else False
        if atom.test is not None and (atom, args) not in self._undecided:
            try:
                return atom.test(self.row, args)
            except Exception:  # noqa: BLE001 (Postgres decides what can't be decided here)
                self._undecided.add((atom, args))
        return self.answers.get((atom, args)) if self.answers else None

    def is_undecided(
        self, formula: Formula, values: Sequence[Scalar], atoms: AbstractSet[Atom]
    ) -> bool:
        """Whether it is open for one of the atoms that has a test, which couldn't say."""
        return bool(self._undecided) and any(
            leaf.atom in atoms and (leaf.atom, self.args(leaf, values)) in self._undecided
            for leaf in self.open_leaves(formula, values)
        )

    def decide(self, formula: Formula, values: Sequence[Scalar]) -> bool | None:
        """Return whether the formula is true for a subscriber; None if Postgres has yet to say."""
        match formula:
            case Leaf():
                return self.verdict(formula, values)
            case All(parts):
                is_known = True
                for part in parts:
                    if isinstance(part, Leaf):
                        verdict = self.verdict(part, values)
                    else:
                        verdict = self.decide(part, values)
                    if verdict is False:
                        return False
                    is_known = is_known and verdict is not None
                return True if is_known else None
            case Some(parts):
                is_known = True
                for part in parts:
                    verdict = self.decide(part, values)
                    if verdict:
                        return True
                    is_known = is_known and verdict is not None
                return False if is_known else None
            case bool():
                return formula

    def open_leaves(self, formula: Formula, values: Sequence[Scalar]) -> Iterator[Leaf]:
        """Yield the leaves that keep the formula from being decided."""
        match formula:
            case Leaf():
                if self.verdict(formula, values) is None:
                    yield formula
            case All(parts) | Some(parts):
                for part in parts:
                    if self.decide(part, values) is None:
                        yield from self.open_leaves(part, values)
            case bool():
                return


# --- cutting


Part: TypeAlias = Condition | tuple[str, tuple["Part", ...]]
"""A condition that stays whole, or ``("all" | "some", parts)``."""


def cut(condition: Condition) -> Part:
    """Return the condition in as many parts as are independent of one another."""
    match condition:
        case Comparison() | Nested():
            return condition
        case Disjunction(parts):
            return ("some", tuple(cut(part) for part in parts))
        case Conjunction(parts):
            groups = _grouped(_flat(parts))
            if len(groups) == 1 and len(groups[0]) > 1:
                return Conjunction(tuple(groups[0]))
            return ("all", tuple(_whole(group) for group in groups))


def _whole(group: Sequence[Condition]) -> Part:
    return cut(group[0]) if len(group) == 1 else Conjunction(tuple(group))


def _flat(parts: Sequence[Condition]) -> Iterator[Condition]:
    for part in parts:
        if isinstance(part, Conjunction):
            yield from _flat(part.parts)
        else:
            yield part


def _grouped(parts: Iterator[Condition]) -> list[list[Condition]]:
    """Put together what shares a join, directly or through others."""
    groups: list[tuple[set[Place], list[Condition]]] = []
    for part in parts:
        joins, members = set(_joins(part)), [part]
        rest = []
        for other in groups:
            if joins.isdisjoint(other[0]):
                rest.append(other)
            else:
                joins |= other[0]
                members = other[1] + members
        groups = [*rest, (joins, members)]
    return [members for _, members in groups]


def _joins(condition: Condition) -> Iterator[Place]:
    """Every join that the condition's own scope makes."""
    match condition:
        case Comparison(left, _, _, right):
            for term in (left, right):
                yield from _joins_of(term)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _joins(part)
        case Nested(place, _):
            yield from _on_the_way(place)


def _joins_of(term: Term) -> Iterator[Place]:
    match term:
        case GeoDistance(args):
            for arg in args:
                yield from _joins_of(arg)
        case Strftime(time=time):
            if time is not None:
                yield from _joins_of(time)
        case _:
            place = place_of(term)
            if place is not None:
                yield from _on_the_way(place)


def _on_the_way(place: Place) -> Iterator[Place]:
    """Yield the joins that lead to a place, those excepted that give a subscriber's one row.

    The subscriber's own row, and what it points to by single relations, is the same in every
    combination of joined rows: comparisons that share it are independent all the same.
    """
    if isinstance(place.origin, AllRows):
        yield Place(place.origin)
    is_one = isinstance(place.origin, AuthRow)
    for length, step in enumerate(place.steps, start=1):
        is_one = is_one and isinstance(step, ToOne)
        if not is_one:
            yield Place(place.origin, place.steps[:length])

"""How an index finds the subscribers that a row may concern, without trying each. For plan, index.

An equality with a subscriber's value is its own key. AND takes its cheapest part that has a way,
OR the ways of all its parts. What has none is tried subscriber by subscriber.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from typing import TypeAlias
from weakref import WeakValueDictionary

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collections, FieldKind
from pgrealtime.rules.engine.formula import (
    All,
    Atom,
    Formula,
    Leaf,
    Some,
    all_of,
    asks_own_row,
    leaves,
)
from pgrealtime.rules.language.comparison import Equality, Rank, equality, traits
from pgrealtime.rules.language.parameters import (
    Form,
    Literal,
    Macro,
    Parameter,
    Scalar,
    Shape,
    number_of,
    render,
)
from pgrealtime.rules.language.predicate import (
    AuthRow,
    Comparison,
    Condition,
    Conjunction,
    Constant,
    Disjunction,
    FieldValue,
    Item,
    Nested,
    Part,
    Predicate,
    Term,
    is_double,
    is_multiple,
    parameters,
    place_of,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import Comparable, as_double, exact
from pgrealtime.rules.memory.conditions import Key, key

Values: TypeAlias = Sequence[Scalar]


class RowSource:
    """Reads what one key of an index is looked up by; shared by all rules that compare it.

    Attributes:
        read: The row's values.
        columns: What is read of the row.
    """

    __slots__ = ("__weakref__", "columns", "is_single", "read", "serial")

    def __init__(self, made: Key, serial: int, *, is_single: bool) -> None:
        self.read: Callable[[Row], Sequence[Comparable]] = made.of_row
        self.columns = made.columns
        self.serial = serial
        self.is_single = is_single


class RemoteSource:
    """A question about a row whose answers are the subscribers' values that satisfy it.

    The condition was ``where && term = value``, in joins of its own.

    Attributes:
        where: What else must be true of the joined rows, None if nothing; no free parameters.
        is_number: The values are numbers and not texts.
    """

    __slots__ = ("__weakref__", "collections", "is_number", "shapes", "term", "where", "whole")

    def __init__(
        self,
        collections: Collections,
        whole: Predicate,
        term: Term,
        where: Condition | None,
        shapes: Mapping[Parameter, Shape],
        *,
        is_number: bool,
    ) -> None:
        self.collections = collections
        self.whole = whole
        self.term = term
        self.where = where
        self.shapes = shapes
        self.is_number = is_number

    def key(self, text: str) -> Comparable:
        """Return what members are found by, given a value as Postgres names it."""
        if not self.is_number:
            return text
        return float(text) if is_double(self.term) else exact(text)


class Kind(Enum):
    """How the subscribers of a path are found; the value is what finding them costs, roughly."""

    KEY = 1
    """Their key is among the row's."""
    REMOTE = 5
    """Their key is among those that Postgres names."""
    RANGE = 20
    """Their bound is on the right side of the row's value."""
    NOT = 50
    """All but those whose key is the row's."""
    FREE = 100
    """All of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """One way to some of a template's subscribers; together the paths lead to all."""

    kind: Kind
    sources: tuple[RowSource, ...] = ()
    """Of KEY, perhaps several at once; of RANGE and NOT one."""
    remote: RemoteSource | None = None
    op: Op | None = None
    """Of RANGE: ``row op bound``."""
    keys: tuple[Callable[[Values], Comparable], ...] = ()
    """Make a subscriber's key of its values, one for each source."""
    guards: tuple[Formula, ...] = ()
    """What must be true too, and is the same for all subscribers."""
    rest: Formula = True
    """What must be asked of whom it finds; with it and the guards who is found is admitted."""
    proves: Leaf | None = None
    """What is true of everybody who is found."""

    @property
    def is_exact(self) -> bool:
        """Whether who is found, guards being true, is admitted."""
        return self.rest is True

    @property
    def lead(self) -> Hashable:
        """What an index keeps the path's subscribers by."""
        match self.kind:
            case Kind.KEY:
                return self.sources
            case Kind.REMOTE:
                return self.remote
            case Kind.RANGE:
                return (*self.sources, self.op)
            case Kind.NOT:
                return self.sources[0]
            case Kind.FREE:
                return (self.guards, self.is_exact)

    def key(self, values: Values) -> Hashable | None:
        """Return what a subscriber is found by, None if nothing ever finds it."""
        if len(self.keys) == 1:
            return self.keys[0](values)
        made = tuple([make(values) for make in self.keys])
        return None if None in made else made

    @property
    def is_scan(self) -> bool:
        """Whether subscribers are tried that may well not be admitted, however many there are."""
        return not self.is_exact and self.kind in {Kind.FREE, Kind.NOT, Kind.RANGE}


class Sources:
    """Makes a source once for all templates that live at the same time."""

    def __init__(self) -> None:
        self._of_row: WeakValueDictionary[Hashable, RowSource] = WeakValueDictionary()
        self._remote: WeakValueDictionary[Hashable, RemoteSource] = WeakValueDictionary()
        self._serials = count()

    def of_row(self, atom: Atom, made: Key, *, is_single: bool) -> RowSource:
        """Return the source of a key that is read from rows."""
        place = (atom.collection.name, made.identity)
        found = self._of_row.get(place)
        if found is None:
            found = RowSource(made, next(self._serials), is_single=is_single)
            self._of_row[place] = found
        return found

    def of_postgres(
        self, atom: Atom, term: Term, where: Condition | None, *, is_number: bool
    ) -> RemoteSource:
        """Return the source of a key that Postgres is asked for."""
        shapes = {} if where is None else {p: atom.shapes[p] for p in parameters(where)}
        place = (atom.collection.name, term, where, tuple(shapes.items()), is_number)
        found = self._remote.get(place)
        if found is None:
            whole = Predicate(collection=atom.collection.name, where=atom.condition)
            found = RemoteSource(atom.collections, whole, term, where, shapes, is_number=is_number)
            self._remote[place] = found
        return found


def access(formula: Formula, sources: Sources) -> tuple[Path, ...]:
    """Return the paths to a template's subscribers.

    Args:
        formula: What admits them, without constants inside.
        sources: What reads keys.
    """
    return tuple(_access(formula, sources))


def _access(formula: Formula, sources: Sources) -> list[Path]:
    if all(leaf.is_guard for leaf in leaves(formula)):
        return [Path(kind=Kind.FREE, guards=() if formula is True else (formula,))]
    match formula:
        case Leaf(atom):
            found = _paths(atom.condition, [], formula, sources)
            return found or [Path(kind=Kind.FREE, rest=formula)]
        case Some(parts):
            return [path for part in parts for path in _access(part, sources)]
        case All(parts):
            return _of_all(parts, sources)
        case bool():
            return []


_COMPOSED = 4
"""Sources of one key at most."""


def _of_all(parts: Sequence[Formula], sources: Sources) -> list[Path]:
    guards = tuple(part for part in parts if all(leaf.is_guard for leaf in leaves(part)))
    others = [part for part in parts if part not in guards]
    ways = [_access(part, sources) for part in others]
    keyed = _composable(ways)
    if keyed:
        chosen = [_composed([ways[at][0] for at in keyed])]
    else:
        keyed = [min(range(len(ways)), key=lambda at: _cost(ways[at]))]
        chosen = ways[keyed[0]]
    rest = [part for at, part in enumerate(others) if at not in keyed]
    return [
        replace(path, guards=path.guards + guards, rest=all_of(iter([path.rest, *rest])))
        for path in chosen
    ]


def _composable(ways: Sequence[Sequence[Path]]) -> list[int]:
    """Return which of the ways make one key together: of different columns, and not too many."""
    found: dict[RowSource, int] = {}
    for at, way in enumerate(ways):
        if _is_plain_key(way):
            found.setdefault(way[0].sources[0], at)
    return list(found.values())[:_COMPOSED]


def _cost(way: Sequence[Path]) -> int:
    return max((_SCAN_COST if path.is_scan else path.kind.value for path in way), default=0)


_SCAN_COST = 1000


def _is_plain_key(way: Sequence[Path]) -> bool:
    match way:
        case [Path(kind=Kind.KEY, rest=True, guards=(), sources=(source,))]:
            return source.is_single
        case _:
            return False


def _composed(keys: Sequence[Path]) -> Path:
    """Return one key of several, in an order that doesn't depend on the rule's."""
    ordered = sorted(keys, key=lambda path: path.sources[0].serial)
    return Path(
        kind=Kind.KEY,
        sources=tuple(path.sources[0] for path in ordered),
        keys=tuple(path.keys[0] for path in ordered),
    )


# --- within an atom


def _paths(
    condition: Condition, beside: Sequence[Condition], leaf: Leaf, sources: Sources
) -> list[Path] | None:
    """Return the paths that a part of an atom gives, None if it gives none.

    Args:
        condition: The part.
        beside: What is true together with it, all in the same joins.
        leaf: The atom, where its values are.
        sources: What reads keys.
    """
    match condition:
        case Comparison():
            path = (
                _local(condition, leaf, sources)
                if leaf.atom.test is not None
                else _remote(condition, beside, leaf, sources)
            )
            if path is None:
                return None
            is_whole = condition is leaf.atom.condition or (
                path.kind is Kind.REMOTE and not any(map(_has_free, beside)) and path.is_exact
            )
            if path.is_exact and is_whole:
                return [replace(path, proves=leaf)]
            return [replace(path, rest=leaf)]
        case Conjunction(parts):
            ways = [
                way
                for at, part in enumerate(parts)
                if (way := _paths(part, [*beside, *parts[:at], *parts[at + 1 :]], leaf, sources))
            ]
            return min(ways, key=_cost) if ways else None
        case Disjunction(parts):
            found: list[Path] = []
            for part in parts:
                way = _paths(part, beside, leaf, sources)
                if way is None:
                    return None
                found += (replace(path, rest=leaf, proves=None) for path in way)
            return found
        case Nested():
            return None


def _local(comparison: Comparison, leaf: Leaf, sources: Sources) -> Path | None:
    made = key(comparison, leaf.atom.ground)
    if made is None:
        return None
    is_single = not (is_multiple(comparison.left) or is_multiple(comparison.right))
    source = sources.of_row(leaf.atom, made, is_single=is_single)
    kind = {Op.EQ: Kind.KEY, Op.NE: Kind.NOT}.get(made.op, Kind.RANGE)
    return Path(
        kind=kind,
        sources=(source,),
        op=made.op,
        keys=(_key_of(leaf.picks, made.of_args),),
        rest=True if made.is_exact else leaf,
    )


def _key_of(
    picks: Sequence[int], of_args: Callable[[Values], Comparable]
) -> Callable[[Values], Comparable]:
    if len(picks) == 1:
        (at,) = picks
        return lambda values: of_args((values[at],))
    return lambda values: of_args([values[at] for at in picks])


def _remote(
    comparison: Comparison, beside: Sequence[Condition], leaf: Leaf, sources: Sources
) -> Path | None:
    atom = leaf.atom
    if comparison.op is not Op.EQ:
        return None
    term, other = comparison.left, comparison.right
    if isinstance(term, Constant):
        term, other = other, term
    if not isinstance(other, Constant) or other.parameter not in atom.free:
        return None
    place = place_of(term)
    if place is None or isinstance(place.origin, AuthRow):
        return None
    case = equality(traits(term, atom.shapes), traits(other, atom.shapes))
    form = _form(term, atom.shapes[other.parameter])
    if case is not Equality.PLAIN or form is None:
        return None
    given = [one for one in beside if not _has_free(one)]
    where = None if not given else given[0] if len(given) == 1 else Conjunction(tuple(given))
    at = leaf.picks[atom.free.index(other.parameter)]
    return Path(
        kind=Kind.REMOTE,
        remote=sources.of_postgres(atom, term, where, is_number=form is Form.NUMBER),
        keys=(lambda values: _key(values[at], form, is_double=is_double(term)),),
        rest=True if comparison.is_any or not is_multiple(term) else leaf,
    )


def _key(content: Scalar, form: Form, *, is_double: bool) -> Comparable:
    if form is Form.TEXT or content is None:
        return render(content, form)
    number = number_of(content)
    return as_double(number) if is_double else number


def _form(term: Term, shape: Shape) -> Form | None:
    """Return as what a value of the term equals a constant of that class, None if it never can."""
    rank = traits(term, {}).rank
    match term:
        case FieldValue(part=Part.LENGTH):
            return Form.NUMBER if shape.is_number else None
        case FieldValue(field=field_) if field_.is_multiple:
            return None
        case FieldValue(field=field_, part=Part.WHOLE | Part.EACH):
            is_number = field_.kind in {FieldKind.NUMBER, FieldKind.BOOL}
        case FieldValue() | Item():
            is_number = rank is Rank.NUMERIC
        case _:
            return None
    if is_number:
        wants = shape.is_number or (rank is Rank.NUMERIC and shape is Shape.NUMERIC)
        return Form.NUMBER if wants else None
    return Form.TEXT if rank is Rank.TEXT or not shape.is_number else None


def _has_free(condition: Condition) -> bool:
    """Whether it isn't the same for all subscribers."""
    return asks_own_row(condition) or any(
        not isinstance(p, (Literal, Macro)) for p in parameters(condition)
    )

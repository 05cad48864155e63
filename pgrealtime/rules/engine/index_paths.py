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
    AllOf,
    AnyOf,
    Formula,
    Test,
    TestCall,
    conjunction,
    each_test_call,
    reads_caller_row,
)
from pgrealtime.rules.language.comparison import (
    Affinity,
    Equality,
    equality,
    is_double,
    is_multiple,
    traits,
)
from pgrealtime.rules.language.parameter_values import to_sql_value
from pgrealtime.rules.language.parameters import (
    LiteralParameter,
    Macro,
    Parameter,
    ParameterClass,
    SqlForm,
)
from pgrealtime.rules.language.predicate import (
    CallerRow,
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    EachTerm,
    FieldValue,
    Modifier,
    NestedRule,
    ParameterTerm,
    Predicate,
    Term,
    condition_parameters,
    row_path_of,
)
from pgrealtime.rules.language.sqlite_values import Scalar, exact_number
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import SqliteValue, nearest_double, parse_numeric
from pgrealtime.rules.memory.index_key import KeyComparison, key_comparison

CallerValues: TypeAlias = Sequence[Scalar]


class RowKeyReader:
    """Reads what one key of an index is looked up by; shared by all rules that compare it.

    Attributes:
        read_keys: The row's values.
        columns: What is read of the row.
    """

    __slots__ = ("__weakref__", "columns", "has_single_key", "read_keys", "serial")

    def __init__(self, key_comparison: KeyComparison, serial: int, *, has_single_key: bool) -> None:
        self.read_keys: Callable[[Row], Sequence[SqliteValue]] = key_comparison.read_row_keys
        self.columns = key_comparison.columns
        self.serial = serial
        self.has_single_key = has_single_key


class RemoteKey:
    """A question about a row whose answers are the subscribers' values that satisfy it.

    The condition was ``where && term = value``, in joins of its own.

    Attributes:
        where: What else must be true of the joined rows, None if nothing; no free parameters.
        is_numeric: The values are numbers and not texts.
    """

    __slots__ = (
        "__weakref__",
        "collections",
        "is_numeric",
        "parameter_classes",
        "predicate",
        "term",
        "where",
    )

    def __init__(
        self,
        collections: Collections,
        predicate: Predicate,
        term: Term,
        where: Condition | None,
        parameter_classes: Mapping[Parameter, ParameterClass],
        *,
        is_numeric: bool,
    ) -> None:
        self.collections = collections
        self.predicate = predicate
        self.term = term
        self.where = where
        self.parameter_classes = parameter_classes
        self.is_numeric = is_numeric

    def parse_key(self, text: str) -> SqliteValue:
        """Return what members are found by, given a value as Postgres names it."""
        if not self.is_numeric:
            return text
        return float(text) if is_double(self.term) else parse_numeric(text)


class LookupKind(Enum):
    """How the subscribers of a path are found; the value is what finding them costs, roughly."""

    KEY = 1
    """Their key is among the row's."""
    REMOTE = 5
    """Their key is among those that Postgres names."""
    RANGE = 20
    """Their bound is on the right side of the row's value."""
    EXCEPT = 50
    """All but those whose key is the row's."""
    ALL = 100
    """All of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPath:
    """One way to some of a template's subscribers; together the paths lead to all."""

    kind: LookupKind
    row_key_readers: tuple[RowKeyReader, ...] = ()
    """Of KEY, perhaps several at once; of RANGE and NOT one."""
    remote_key: RemoteKey | None = None
    op: Op | None = None
    """Of RANGE: ``row op bound``."""
    caller_key_readers: tuple[Callable[[CallerValues], SqliteValue], ...] = ()
    """Make a subscriber's key of its values, one for each source."""
    guards: tuple[Formula, ...] = ()
    """What must be true too, and is the same for all subscribers."""
    residual: Formula = True
    """What must be asked of whom it finds; with it and the guards who is found is admitted."""
    implied_test_call: TestCall | None = None
    """What is true of everybody who is found."""

    @property
    def is_exact(self) -> bool:
        """Whether who is found, guards being true, is admitted."""
        return self.residual is True

    @property
    def entries_key(self) -> Hashable:
        """What an index keeps the path's subscribers by."""
        match self.kind:
            case LookupKind.KEY:
                return self.row_key_readers
            case LookupKind.REMOTE:
                return self.remote_key
            case LookupKind.RANGE:
                return (*self.row_key_readers, self.op)
            case LookupKind.EXCEPT:
                return self.row_key_readers[0]
            case LookupKind.ALL:
                return (self.guards, self.is_exact)

    def caller_key(self, values: CallerValues) -> Hashable | None:
        """Return what a subscriber is found by, None if nothing ever finds it."""
        if len(self.caller_key_readers) == 1:
            return self.caller_key_readers[0](values)
        made = tuple([make(values) for make in self.caller_key_readers])
        return None if None in made else made

    @property
    def is_scan(self) -> bool:
        """Whether subscribers are tried that may well not be admitted, however many there are."""
        return not self.is_exact and self.kind in {
            LookupKind.ALL,
            LookupKind.EXCEPT,
            LookupKind.RANGE,
        }


class KeyRegistry:
    """Makes a source once for all templates that live at the same time."""

    def __init__(self) -> None:
        self._row_key_readers: WeakValueDictionary[Hashable, RowKeyReader] = WeakValueDictionary()
        self._remote_keys: WeakValueDictionary[Hashable, RemoteKey] = WeakValueDictionary()
        self._serials = count()

    def row_key_reader(
        self, test: Test, key_comparison: KeyComparison, *, has_single_key: bool
    ) -> RowKeyReader:
        """Return the source of a key that is read from rows."""
        place = (test.collection.name, key_comparison.reader_identity)
        found = self._row_key_readers.get(place)
        if found is None:
            found = RowKeyReader(key_comparison, next(self._serials), has_single_key=has_single_key)
            self._row_key_readers[place] = found
        return found

    def remote_key(
        self, test: Test, term: Term, where: Condition | None, *, is_numeric: bool
    ) -> RemoteKey:
        """Return the source of a key that Postgres is asked for."""
        shapes = (
            {}
            if where is None
            else {p: test.parameter_classes[p] for p in condition_parameters(where)}
        )
        place = (test.collection.name, term, where, tuple(shapes.items()), is_numeric)
        found = self._remote_keys.get(place)
        if found is None:
            whole = Predicate(collection=test.collection.name, where=test.condition)
            found = RemoteKey(test.collections, whole, term, where, shapes, is_numeric=is_numeric)
            self._remote_keys[place] = found
        return found


def index_paths(formula: Formula, registry: KeyRegistry) -> tuple[IndexPath, ...]:
    """Return the paths to a template's subscribers.

    Args:
        formula: What admits them, without constants inside.
        registry: What reads keys.
    """
    return tuple(_index_paths(formula, registry))


def _index_paths(formula: Formula, registry: KeyRegistry) -> list[IndexPath]:
    if all(leaf.is_caller_independent for leaf in each_test_call(formula)):
        return [IndexPath(kind=LookupKind.ALL, guards=() if formula is True else (formula,))]
    match formula:
        case TestCall(atom):
            found = _paths_of_condition(atom.condition, [], formula, registry)
            return found or [IndexPath(kind=LookupKind.ALL, residual=formula)]
        case AnyOf(parts):
            return [path for part in parts for path in _index_paths(part, registry)]
        case AllOf(parts):
            return _paths_of_conjunction(parts, registry)
        case bool():
            return []


_MAX_COMPOSITE_KEYS = 4
"""Sources of one key at most."""


def _paths_of_conjunction(operands: Sequence[Formula], registry: KeyRegistry) -> list[IndexPath]:
    guards = tuple(
        part
        for part in operands
        if all(leaf.is_caller_independent for leaf in each_test_call(part))
    )
    others = [part for part in operands if part not in guards]
    ways = [_index_paths(part, registry) for part in others]
    keyed = _composite_key_candidates(ways)
    if keyed:
        chosen = [_composite_path([ways[at][0] for at in keyed])]
    else:
        keyed = [min(range(len(ways)), key=lambda at: _cost(ways[at]))]
        chosen = ways[keyed[0]]
    rest = [part for at, part in enumerate(others) if at not in keyed]
    return [
        replace(
            path, guards=path.guards + guards, residual=conjunction(iter([path.residual, *rest]))
        )
        for path in chosen
    ]


def _composite_key_candidates(alternatives: Sequence[Sequence[IndexPath]]) -> list[int]:
    """Return which of the ways make one key together: of different columns, and not too many."""
    found: dict[RowKeyReader, int] = {}
    for at, way in enumerate(alternatives):
        if _is_single_key_path(way):
            found.setdefault(way[0].row_key_readers[0], at)
    return list(found.values())[:_MAX_COMPOSITE_KEYS]


def _cost(paths: Sequence[IndexPath]) -> int:
    return max((_SCAN_COST if path.is_scan else path.kind.value for path in paths), default=0)


_SCAN_COST = 1000


def _is_single_key_path(paths: Sequence[IndexPath]) -> bool:
    match paths:
        case [IndexPath(kind=LookupKind.KEY, residual=True, guards=(), row_key_readers=(source,))]:
            return source.has_single_key
        case _:
            return False


def _composite_path(paths: Sequence[IndexPath]) -> IndexPath:
    """Return one key of several, in an order that doesn't depend on the rule's."""
    ordered = sorted(paths, key=lambda path: path.row_key_readers[0].serial)
    return IndexPath(
        kind=LookupKind.KEY,
        row_key_readers=tuple(path.row_key_readers[0] for path in ordered),
        caller_key_readers=tuple(path.caller_key_readers[0] for path in ordered),
    )


# --- within an atom


def _paths_of_condition(
    condition: Condition,
    other_conjuncts: Sequence[Condition],
    test_call: TestCall,
    registry: KeyRegistry,
) -> list[IndexPath] | None:
    """Return the paths that a part of an atom gives, None if it gives none.

    Args:
        condition: The part.
        other_conjuncts: What is true together with it, all in the same joins.
        test_call: The atom, where its values are.
        registry: What reads keys.
    """
    match condition:
        case Comparison():
            path = (
                _row_key_path(condition, test_call, registry)
                if test_call.test.in_process is not None
                else _remote_key_path(condition, other_conjuncts, test_call, registry)
            )
            if path is None:
                return None
            is_whole = condition is test_call.test.condition or (
                path.kind is LookupKind.REMOTE
                and not any(map(_is_caller_dependent, other_conjuncts))
                and path.is_exact
            )
            if path.is_exact and is_whole:
                return [replace(path, implied_test_call=test_call)]
            return [replace(path, residual=test_call)]
        case Conjunction(parts):
            ways = [
                way
                for at, part in enumerate(parts)
                if (
                    way := _paths_of_condition(
                        part, [*other_conjuncts, *parts[:at], *parts[at + 1 :]], test_call, registry
                    )
                )
            ]
            return min(ways, key=_cost) if ways else None
        case Disjunction(parts):
            found: list[IndexPath] = []
            for part in parts:
                way = _paths_of_condition(part, other_conjuncts, test_call, registry)
                if way is None:
                    return None
                found += (replace(path, residual=test_call, implied_test_call=None) for path in way)
            return found
        case NestedRule():
            return None


def _row_key_path(
    comparison: Comparison, test_call: TestCall, registry: KeyRegistry
) -> IndexPath | None:
    made = key_comparison(comparison, test_call.test.memory_context)
    if made is None:
        return None
    is_single = not (is_multiple(comparison.left) or is_multiple(comparison.right))
    source = registry.row_key_reader(test_call.test, made, has_single_key=is_single)
    kind = {Op.EQ: LookupKind.KEY, Op.NE: LookupKind.EXCEPT}.get(made.op, LookupKind.RANGE)
    return IndexPath(
        kind=kind,
        row_key_readers=(source,),
        op=made.op,
        caller_key_readers=(
            _caller_key_reader(test_call.argument_positions, made.read_caller_key),
        ),
        residual=True if made.is_exact else test_call,
    )


def _caller_key_reader(
    argument_positions: Sequence[int], read_key: Callable[[CallerValues], SqliteValue]
) -> Callable[[CallerValues], SqliteValue]:
    if len(argument_positions) == 1:
        (at,) = argument_positions
        return lambda values: read_key((values[at],))
    return lambda values: read_key([values[at] for at in argument_positions])


def _remote_key_path(
    comparison: Comparison,
    other_conjuncts: Sequence[Condition],
    test_call: TestCall,
    registry: KeyRegistry,
) -> IndexPath | None:
    atom = test_call.test
    if comparison.op is not Op.EQ:
        return None
    term, other = comparison.left, comparison.right
    if isinstance(term, ParameterTerm):
        term, other = other, term
    if not isinstance(other, ParameterTerm) or other.parameter not in atom.caller_parameters:
        return None
    place = row_path_of(term)
    if place is None or isinstance(place.root, CallerRow):
        return None
    case = equality(traits(term, atom.parameter_classes), traits(other, atom.parameter_classes))
    form = _key_form(term, atom.parameter_classes[other.parameter])
    if case is not Equality.PLAIN or form is None:
        return None
    given = [one for one in other_conjuncts if not _is_caller_dependent(one)]
    where = None if not given else given[0] if len(given) == 1 else Conjunction(tuple(given))
    at = test_call.argument_positions[atom.caller_parameters.index(other.parameter)]
    return IndexPath(
        kind=LookupKind.REMOTE,
        remote_key=registry.remote_key(atom, term, where, is_numeric=form is SqlForm.NUMBER),
        caller_key_readers=(lambda values: _to_key(values[at], form, is_double=is_double(term)),),
        residual=True if comparison.is_any or not is_multiple(term) else test_call,
    )


def _to_key(value: Scalar, form: SqlForm, *, is_double: bool) -> SqliteValue:
    if form is SqlForm.TEXT or value is None:
        return to_sql_value(value, form)
    number = exact_number(value)
    return nearest_double(number) if is_double else number


def _key_form(term: Term, parameter_class: ParameterClass) -> SqlForm | None:
    """Return as what a value of the term equals a constant of that class, None if it never can."""
    rank = traits(term, {}).affinity
    match term:
        case FieldValue(modifier=Modifier.LENGTH):
            return SqlForm.NUMBER if parameter_class.is_number else None
        case FieldValue(field=field_) if field_.is_multiple:
            return None
        case FieldValue(field=field_, modifier=Modifier.WHOLE | Modifier.EACH):
            is_number = field_.kind in {FieldKind.NUMBER, FieldKind.BOOL}
        case FieldValue() | EachTerm():
            is_number = rank is Affinity.NUMERIC
        case _:
            return None
    if is_number:
        wants = parameter_class.is_number or (
            rank is Affinity.NUMERIC and parameter_class is ParameterClass.NUMERIC_TEXT
        )
        return SqlForm.NUMBER if wants else None
    return SqlForm.TEXT if rank is Affinity.TEXT or not parameter_class.is_number else None


def _is_caller_dependent(condition: Condition) -> bool:
    """Whether it isn't the same for all subscribers."""
    return reads_caller_row(condition) or any(
        not isinstance(p, (LiteralParameter, Macro)) for p in condition_parameters(condition)
    )

"""How a row finds the callers that it may concern, without testing each of them.

``Plan`` computes the paths of a specialization's formula, ``PredicateIndex`` keeps members by
them. An equality with a caller's value is an index key. AND takes the paths of its cheapest
operand, OR those of all operands. Where there is no path, every caller is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from pgrealtime.collections.model import FieldKind
from pgrealtime.rules.engine.formula import (
    AllOf,
    AnyOf,
    Formula,
    TestCall,
    conjunction,
    is_caller_independent,
)
from pgrealtime.rules.engine.index_keys import KeyRegistry, RemoteKey, RowKeyReader, key_comparison
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.comparison import (
    Affinity,
    ComparisonKind,
    is_double,
    plan_values,
    traits,
)
from pgrealtime.rules.language.parameters import (
    LiteralParameter,
    Macro,
    ParameterClass,
    SqlForm,
    to_sql_value,
)
from pgrealtime.rules.language.predicate import Comparison, Condition, Conjunction, ParameterTerm
from pgrealtime.rules.language.sqlite_values import Scalar, exact_number
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import SqliteValue, nearest_double

CallerValues: TypeAlias = Sequence[Scalar]
"""The values that tell callers of a specialization apart."""
CallerKeyReader: TypeAlias = Callable[[CallerValues], SqliteValue]

_MAX_COMPOSITE_KEYS = 4
"""Keys that one composite key has at most."""
_SCAN_COST = 1000


class LookupKind(Enum):
    """How a path finds callers; the value is roughly what that costs."""

    KEY = 1
    """The caller's key is one of the row's keys."""
    REMOTE = 5
    """The caller's key is one of those that PostgreSQL names."""
    RANGE = 20
    """The caller's bound is on the right side of the row's key."""
    EXCEPT = 50
    """The caller's key is not the row's key."""
    ALL = 100
    """Every caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPath:
    """One way from a row to callers of a specialization; together the paths lead to all of them.

    A caller that a path finds matches if the guards and the residual are true.
    """

    kind: LookupKind
    row_key_readers: tuple[RowKeyReader, ...] = ()
    """Of KEY, several for a composite key; of RANGE and EXCEPT exactly one."""
    remote_key: RemoteKey | None = None
    """Of REMOTE."""
    op: Op | None = None
    """Of RANGE: ``row key op bound``."""
    caller_key_readers: tuple[CallerKeyReader, ...] = ()
    """Read a caller's key from its values, one for each part of the key."""
    guards: tuple[Formula, ...] = ()
    """What must be true and is the same for all callers."""
    residual: Formula = True
    """What must be true and depends on the caller."""
    implied_test_call: TestCall | None = None
    """A test that is known to be true for every caller that the path finds."""

    @property
    def is_exact(self) -> bool:
        """Whether a caller that the path finds matches if the guards are true."""
        return self.residual is True

    @property
    def entries_key(self) -> Hashable:
        """What the index keeps the path's entries by."""
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
        """Return the key that a caller is found by; None if no row ever finds it."""
        if len(self.caller_key_readers) == 1:
            return self.caller_key_readers[0](values)
        keys = tuple([read_key(values) for read_key in self.caller_key_readers])
        return None if None in keys else keys

    @property
    def is_scan(self) -> bool:
        """Whether a row tests callers that may not match, in proportion to their number."""
        return not self.is_exact and self.kind not in {LookupKind.KEY, LookupKind.REMOTE}


def index_paths(formula: Formula, registry: KeyRegistry) -> list[IndexPath]:
    """Return the paths to the callers for whom a row must satisfy the formula."""
    if is_caller_independent(formula):
        return [IndexPath(kind=LookupKind.ALL, guards=() if formula is True else (formula,))]
    return _paths_of_dependent(formula, registry)


def _paths_of_dependent(formula: Formula, registry: KeyRegistry) -> list[IndexPath]:
    match formula:
        case TestCall(test):
            paths = _paths_of_condition(test.condition, [], formula, registry)
            return paths or [IndexPath(kind=LookupKind.ALL, residual=formula)]
        case AnyOf(operands):
            return [path for operand in operands for path in index_paths(operand, registry)]
        case AllOf(operands):
            return _paths_of_conjunction(operands, registry)
        case bool():
            return []


def paths_by_entries_key(paths: Sequence[IndexPath], formula: Formula) -> dict[Hashable, IndexPath]:
    """Return by ``entries_key`` what is to be tested of the callers found in those entries.

    Where paths with different conditions share entries, that is the whole formula.
    """
    found: dict[Hashable, IndexPath] = {}
    for path in paths:
        key = path.entries_key
        known = found.setdefault(key, path)
        tested = path.guards, path.residual, path.implied_test_call
        if (known.guards, known.residual, known.implied_test_call) != tested:
            found[key] = replace(path, guards=(), residual=formula, implied_test_call=None)
    return found


def _paths_of_conjunction(operands: Sequence[Formula], registry: KeyRegistry) -> list[IndexPath]:
    """Return the paths of the cheapest operand, or of all that make one composite key."""
    guards = tuple(operand for operand in operands if is_caller_independent(operand))
    dependent = [operand for operand in operands if operand not in guards]
    alternatives = [_paths_of_dependent(operand, registry) for operand in dependent]
    used = _composite_key_parts(alternatives)
    if used:
        chosen = [_composite_path([alternatives[i][0] for i in used])]
    else:
        used = [min(range(len(alternatives)), key=lambda i: _cost(alternatives[i]))]
        chosen = alternatives[used[0]]
    rest = [operand for i, operand in enumerate(dependent) if i not in used]
    return [
        replace(path, guards=path.guards + guards, residual=conjunction([path.residual, *rest]))
        for path in chosen
    ]


def _composite_key_parts(alternatives: Sequence[Sequence[IndexPath]]) -> list[int]:
    """Return which operands make one key together: of different columns, and not too many."""
    index_by_reader: dict[RowKeyReader, int] = {}
    for index, paths in enumerate(alternatives):
        match paths:
            case [IndexPath(kind=LookupKind.KEY, residual=True, guards=(), row_key_readers=[key])]:
                if key.has_single_key:
                    index_by_reader.setdefault(key, index)
            case _:
                pass
    return list(index_by_reader.values())[:_MAX_COMPOSITE_KEYS]


def _composite_path(paths: Sequence[IndexPath]) -> IndexPath:
    """Return one path with the keys of several, in an order that does not depend on the rule."""
    ordered = sorted(paths, key=lambda path: path.row_key_readers[0].serial)
    return IndexPath(
        kind=LookupKind.KEY,
        row_key_readers=tuple(path.row_key_readers[0] for path in ordered),
        caller_key_readers=tuple(path.caller_key_readers[0] for path in ordered),
    )


def _cost(paths: Sequence[IndexPath]) -> int:
    return max((_SCAN_COST if path.is_scan else path.kind.value for path in paths), default=0)


# --- the paths of one test


def _paths_of_condition(
    condition: Condition,
    other_conjuncts: Sequence[Condition],
    test_call: TestCall,
    registry: KeyRegistry,
) -> list[IndexPath] | None:
    """Return the paths that a part of a test gives; None if it gives none.

    ``other_conjuncts`` must be true together with it in the same joins. Where a path is not exact,
    the call of the whole test is its residual.
    """
    match condition:
        case Comparison():
            return _paths_of_comparison(condition, other_conjuncts, test_call, registry)
        case Conjunction(parts):
            alternatives = []
            for i, part in enumerate(parts):
                others = [*other_conjuncts, *parts[:i], *parts[i + 1 :]]
                if paths := _paths_of_condition(part, others, test_call, registry):
                    alternatives.append(paths)
            return min(alternatives, key=_cost, default=None)
        case predicate.Disjunction(parts):
            part_paths: list[IndexPath] = []
            for part in parts:
                paths = _paths_of_condition(part, other_conjuncts, test_call, registry)
                if paths is None:
                    return None
                part_paths += [
                    replace(path, residual=test_call, implied_test_call=None) for path in paths
                ]
            return part_paths
        case predicate.NestedRule():
            return None


def _paths_of_comparison(
    comparison: Comparison,
    other_conjuncts: Sequence[Condition],
    test_call: TestCall,
    registry: KeyRegistry,
) -> list[IndexPath] | None:
    if test_call.test.in_process is not None:
        path = _row_key_path(comparison, test_call, registry)
    else:
        path = remote_key_path(comparison, other_conjuncts, test_call, registry)
    if path is None:
        return None
    is_whole_test = comparison is test_call.test.condition or (
        path.kind is LookupKind.REMOTE and not any(map(_is_caller_dependent, other_conjuncts))
    )
    if path.is_exact and is_whole_test:
        return [replace(path, implied_test_call=test_call)]
    return [replace(path, residual=test_call)]


def _row_key_path(
    comparison: Comparison, test_call: TestCall, registry: KeyRegistry
) -> IndexPath | None:
    key = key_comparison(comparison, test_call.test.memory_context)
    if key is None:
        return None
    reader = registry.row_key_reader(test_call.test, key)
    return IndexPath(
        kind={Op.EQ: LookupKind.KEY, Op.NE: LookupKind.EXCEPT}.get(key.op, LookupKind.RANGE),
        row_key_readers=(reader,),
        op=key.op,
        caller_key_readers=(_caller_key_reader(test_call.argument_positions, key.read_caller_key),),
        residual=True if key.is_exact else test_call,
    )


def _caller_key_reader(
    argument_positions: Sequence[int], read_key: CallerKeyReader
) -> CallerKeyReader:
    """Return the reader over a caller's values, given one over a test's arguments."""
    if len(argument_positions) == 1:
        (i,) = argument_positions
        return lambda values: read_key((values[i],))
    return lambda values: read_key([values[i] for i in argument_positions])


def remote_key_path(
    comparison: Comparison,
    other_conjuncts: Sequence[Condition],
    test_call: TestCall,
    registry: KeyRegistry,
) -> IndexPath | None:
    """Return the path by a key that PostgreSQL names for a row; None if the comparison gives none.

    ``other_conjuncts`` must be true together with it in the same joins.
    """
    test = test_call.test
    if comparison.op is not Op.EQ:
        return None
    term, other = comparison.left, comparison.right
    if isinstance(term, ParameterTerm):
        term, other = other, term
    if not isinstance(other, ParameterTerm) or other.parameter not in test.caller_parameters:
        return None
    path = predicate.row_path_of(term)
    if path is None or isinstance(path.root, predicate.CallerRow):
        return None
    plan = plan_values(Op.EQ, term, other, test.parameter_classes)
    form = _key_form(term, test.parameter_classes[other.parameter])
    if plan.kind is not ComparisonKind.EQUAL or form is None:
        return None
    shared = [conjunct for conjunct in other_conjuncts if not _is_caller_dependent(conjunct)]
    where = None if not shared else shared[0] if len(shared) == 1 else Conjunction(tuple(shared))
    i = test_call.argument_positions[test.caller_parameters.index(other.parameter)]
    return IndexPath(
        kind=LookupKind.REMOTE,
        remote_key=registry.remote_key(test, term, where, is_numeric=form is SqlForm.NUMBER),
        caller_key_readers=(lambda values: _to_key(values[i], form, is_double=is_double(term)),),
        residual=True if comparison.is_any or not predicate.is_multiple(term) else test_call,
    )


def _to_key(value: Scalar, form: SqlForm, *, is_double: bool) -> SqliteValue:
    """Return a caller's value as ``RemoteKey.parse_key`` returns equal ones."""
    if form is SqlForm.TEXT or value is None:
        return to_sql_value(value, form)
    number = exact_number(value)
    return nearest_double(number) if is_double else number


def _key_form(term: predicate.Term, parameter_class: ParameterClass) -> SqlForm | None:
    """Return how values of a term equal a parameter's: as texts or numbers; None if they never do.

    The parameter has that class.
    """
    affinity = traits(term, {}).affinity
    match term:
        case predicate.FieldValue(modifier=predicate.Modifier.LENGTH):
            return SqlForm.NUMBER if parameter_class.is_number else None
        case predicate.FieldValue(field=field_) if field_.is_multiple:
            return None
        case predicate.FieldValue(_, field_, predicate.Modifier.WHOLE | predicate.Modifier.EACH):
            is_number = field_.kind in {FieldKind.NUMBER, FieldKind.BOOL}
        case predicate.FieldValue() | predicate.EachTerm():
            is_number = affinity is Affinity.NUMERIC
        case _:
            return None
    if is_number:
        can_equal = parameter_class.is_number or (
            affinity is Affinity.NUMERIC and parameter_class is ParameterClass.NUMERIC_TEXT
        )
        return SqlForm.NUMBER if can_equal else None
    return SqlForm.TEXT if affinity is Affinity.TEXT or not parameter_class.is_number else None


def _is_caller_dependent(condition: Condition) -> bool:
    parameters = predicate.condition_parameters(condition)
    return predicate.reads_caller_row(condition) or any(
        not isinstance(parameter, (LiteralParameter, Macro)) for parameter in parameters
    )

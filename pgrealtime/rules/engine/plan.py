"""A rule with a filter, compiled; and what is left of it for callers that it treats alike.

``RuleCompiler`` makes a ``Plan`` for parameters of given classes. ``Plan.specialize`` evaluates all
that depends on the caller alone, which leaves a ``Specialization``: a formula, the index paths to
its callers, and which values tell them apart. With these values it is a ``BoundPredicate``, the
identity of a group.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from pgrealtime.collections.model import Collection
from pgrealtime.rules.engine.formula import (
    Formula,
    Test,
    TestCall,
    conjunction,
    decide_calls,
    each_test_call,
    number_arguments_from_zero,
    tests_of,
)
from pgrealtime.rules.engine.index_keys import KeyRegistry
from pgrealtime.rules.engine.index_paths import (
    IndexPath,
    LookupKind,
    index_paths,
    paths_by_entries_key,
)
from pgrealtime.rules.language.parameters import CallerColumn, Parameter
from pgrealtime.rules.language.sqlite_values import Scalar


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Specialization:
    """What a row must satisfy, for callers that differ in nothing but a few values."""

    collection: Collection
    """The rows' collection."""
    formula: Formula
    """What must be true; True for every row."""
    value_positions: tuple[int, ...]
    """Which of the plan's values tell callers apart."""
    column_names: frozenset[str]
    """Columns of the row that the plan reads."""
    paths: tuple[IndexPath, ...]
    """How a row finds callers."""
    paths_by_key: Mapping[Hashable, IndexPath]
    """The paths by what the index keeps entries by: what is to be tested of callers found there.
    Where paths with different conditions share entries, it is the whole formula."""
    filter_tests: frozenset[Test]
    """The tests that only the client's filter has."""
    has_remote_filter: bool
    """Whether PostgreSQL must be asked about some of these."""
    reads_caller: bool
    """Whether rule or filter read the caller's record: when a row is read later than its event was
    written, that record may be another one, or gone."""

    @property
    def reads_other_rows(self) -> bool:
        """Whether the verdict on a row depends on rows that are related to it or to the caller."""
        return any(test.reads_other_rows for test in tests_of(self.formula))

    @property
    def has_unindexed_filter(self) -> bool:
        """Whether a client's filter is tested for each changed row, matching or not."""
        return bool(self.filter_tests) and any(
            path.kind is LookupKind.ALL or path.is_scan for path in self.paths
        )


@dataclass(frozen=True, slots=True)
class BoundPredicate:
    """A specialization and a caller's values. Equal ones have the same verdict on every row."""

    specialization: Specialization
    values: tuple[Scalar, ...]
    """Those that tell callers apart."""


class Plan:
    """A rule with a filter, for parameters of given classes.

    A rule or filter that isn't there is True. ``parameters`` are what the argument positions of
    both number, and what ``specialize`` takes the values of.
    """

    def __init__(
        self,
        collection: Collection,
        rule: Formula,
        filter_: Formula,
        parameters: Sequence[Parameter | CallerColumn],
        registry: KeyRegistry,
        *,
        reads_caller: bool,
    ) -> None:
        self.parameters = tuple(parameters)
        self._collection = collection
        self._formula = conjunction((rule, filter_))
        calls = each_test_call(self._formula)
        tests = frozenset(call.test for call in calls)
        self._filter_tests = tests - tests_of(rule)
        self._columns = frozenset[str]().union(*(test.column_names for test in tests))
        self._reads_caller = reads_caller
        self._registry = registry
        self._row_independent_calls = [call for call in calls if call.test.is_row_independent]
        self._specializations: WeakValueDictionary[Hashable, Specialization] = WeakValueDictionary()

    def specialize(self, values: Sequence[Scalar]) -> BoundPredicate | None:
        """Return what is left for a caller's values of ``parameters``; None if no row can match."""
        calls = self._row_independent_calls
        verdicts = tuple([_row_independent_verdict(call, values) for call in calls])
        specialization = self._specializations.get(verdicts)
        if specialization is None:
            specialization = self._make_specialization(dict(zip(calls, verdicts, strict=True)))
            if specialization.formula is False:
                return None
            self._specializations[verdicts] = specialization
        own_values = tuple([values[i] for i in specialization.value_positions])
        return BoundPredicate(specialization, own_values)

    def _make_specialization(self, verdicts: Mapping[TestCall, bool | None]) -> Specialization:
        """Replace the calls that have a verdict, and number the values that are still used."""
        formula, positions = number_arguments_from_zero(decide_calls(self._formula, verdicts))
        filter_tests = self._filter_tests & tests_of(formula)
        paths = tuple(index_paths(formula, self._registry))
        return Specialization(
            collection=self._collection,
            formula=formula,
            value_positions=positions,
            column_names=self._columns,
            paths=paths,
            paths_by_key=paths_by_entries_key(paths, formula),
            filter_tests=filter_tests,
            has_remote_filter=any(test.in_process is None for test in filter_tests),
            reads_caller=self._reads_caller,
        )


def _row_independent_verdict(call: TestCall, values: Sequence[Scalar]) -> bool | None:
    """Return the verdict, which depends on no row; None if only PostgreSQL can decide."""
    in_process = call.test.in_process
    assert in_process is not None
    try:
        return in_process({}, [values[i] for i in call.argument_positions])
    except Exception:  # noqa: BLE001 (as in RowEvaluation: PostgreSQL decides)
        return None

"""A rule with a filter, compiled; and what is left of it for callers that it treats alike.

``RuleCompiler`` makes a ``Plan`` for parameters of given classes. ``Plan.specialize`` evaluates all
that depends on the caller alone, which leaves a ``Specialization``: a formula, the index paths to
its callers, and which values tell them apart. With these values it is a ``BoundPredicate``, the
identity of a group.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from pgrealtime.collections.model import Collection
from pgrealtime.rules.engine.formula import (
    Formula,
    TestCall,
    conjunction,
    each_test_call,
    map_test_calls,
)
from pgrealtime.rules.engine.index_keys import KeyRegistry
from pgrealtime.rules.engine.index_paths import IndexPath, LookupKind, index_paths
from pgrealtime.rules.engine.test import Test
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

    Attributes:
        parameters: What ``specialize`` takes the values of, in this order.

    Args:
        collection: The rows' collection.
        rule: The rule; True if there is none.
        filter_: The client's filter; True if there is none.
        parameters: What the formulas' argument positions number.
        registry: Makes index keys.
        reads_caller: Whether any of the two reads the caller's record.
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
        self._filter_tests = _tests_of(filter_) - _tests_of(rule)
        self._columns = frozenset[str]().union(*(t.column_names for t in _tests_of(self._formula)))
        self._reads_caller = reads_caller
        self._registry = registry
        self._row_independent_calls = [
            call for call in each_test_call(self._formula) if call.test.is_row_independent
        ]
        self._specializations: WeakValueDictionary[Hashable, Specialization] = WeakValueDictionary()

    def specialize(self, values: Sequence[Scalar]) -> BoundPredicate | None:
        """Return what is left for a caller; None if no row can match.

        Args:
            values: The caller's, of ``parameters``.
        """
        verdicts = tuple(
            [_row_independent_verdict(call, values) for call in self._row_independent_calls]
        )
        specialization = self._specializations.get(verdicts)
        if specialization is None:
            specialization = self._make_specialization(
                dict(zip(self._row_independent_calls, verdicts, strict=True))
            )
            if specialization.formula is False:
                return None
            self._specializations[verdicts] = specialization
        own_values = tuple([values[i] for i in specialization.value_positions])
        return BoundPredicate(specialization, own_values)

    def _make_specialization(self, verdicts: Mapping[TestCall, bool | None]) -> Specialization:
        """Replace the calls that have a verdict, and number the values that are still used."""

        def known_verdict(call: TestCall) -> Formula:
            verdict = verdicts.get(call)
            return call if verdict is None else verdict

        def renumbered(call: TestCall) -> Formula:
            return TestCall(call.test, tuple([renumbering[i] for i in call.argument_positions]))

        formula = map_test_calls(self._formula, known_verdict)
        used = sorted({i for call in each_test_call(formula) for i in call.argument_positions})
        renumbering = {i: number for number, i in enumerate(used)}
        formula = map_test_calls(formula, renumbered)
        filter_tests = self._filter_tests & _tests_of(formula)
        paths = tuple(index_paths(formula, self._registry))
        return Specialization(
            collection=self._collection,
            formula=formula,
            value_positions=tuple(used),
            column_names=self._columns,
            paths=paths,
            paths_by_key=_by_entries_key(paths, formula),
            filter_tests=filter_tests,
            has_remote_filter=any(test.in_process is None for test in filter_tests),
            reads_caller=self._reads_caller,
        )


def _by_entries_key(paths: Sequence[IndexPath], formula: Formula) -> dict[Hashable, IndexPath]:
    paths_by_key: dict[Hashable, IndexPath] = {}
    for path in paths:
        known = paths_by_key.setdefault(path.entries_key, path)
        if (known.guards, known.residual, known.implied_test_call) != (
            path.guards,
            path.residual,
            path.implied_test_call,
        ):
            paths_by_key[path.entries_key] = replace(
                path, guards=(), residual=formula, implied_test_call=None
            )
    return paths_by_key


def _tests_of(formula: Formula) -> frozenset[Test]:
    return frozenset(call.test for call in each_test_call(formula))


def _row_independent_verdict(call: TestCall, values: Sequence[Scalar]) -> bool | None:
    """Return the verdict, which depends on no row; None if only PostgreSQL can decide."""
    in_process = call.test.in_process
    assert in_process is not None
    try:
        return in_process({}, [values[i] for i in call.argument_positions])
    except Exception:  # noqa: BLE001 (as in RowEvaluation: PostgreSQL decides)
        return None

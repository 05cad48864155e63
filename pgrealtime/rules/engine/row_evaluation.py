"""One row being evaluated: the members that it matches, and what only PostgreSQL can decide.

``Evaluation`` makes one for each row of a batch. The index finds the members that the row may
concern; their formulas are evaluated in the process where that is exact. What remains are open
tests and open keys: ``Evaluation`` makes questions of them and brings the answers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, TypeAlias, TypeVar

from pgrealtime.changes import Row, TableName
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.formula import AllOf, AnyOf, Formula, Test, TestCall
from pgrealtime.rules.engine.index import KeyEntries, Member, PredicateIndex
from pgrealtime.rules.engine.index_keys import RemoteKey
from pgrealtime.rules.engine.index_paths import IndexPath
from pgrealtime.rules.engine.work_budget import MAX_RULE_WORK, FilterWorkBudget
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.memory.compare import WORK_BUDGET, SqliteValue
from pgrealtime.rules.memory.operands import Arguments
from pgrealtime.rules.sql.row_images import Overlay

M = TypeVar("M", bound=Member)

_MEMBERS_PER_STEP = 16
"""Members that are tested before the caller may let the event loop run."""
_MAX_KEYS_SCANNED = 1000
"""Keys whose members are all tested where the row's own key is unknown; of more, none is."""
_Guards: TypeAlias = tuple[Formula, ...]


class RowEvaluation(Generic[M]):
    """One row's verdicts so far.

    Attributes:
        missing_columns: Columns of the collection that the image lacks. A test that reads one stays
            UNKNOWN if ``is_missing_column_unknown``, and is FALSE otherwise.
        before_state: Related tables before the row's transaction; None is their present state.
        hits: Members that match; complete when no test and no key is open.
        answers: PostgreSQL's verdicts on tests, by test and arguments.
        open_keys: Keys of this row that PostgreSQL must name: all of them (True), or only those
            that the index has entries for (False).
        unreached_entries: Members that only a missing column leads to, where they have too many
            keys to test all of them.
        deferred_members: If not None, collects members whose filter only PostgreSQL can decide for
            this row, instead of leaving their tests open.
    """

    __slots__ = (
        "_guard_verdicts",
        "_open_guards",
        "_open_members",
        "_searched_indexes",
        "_undecided_in_process",
        "_untested_members",
        "_work_budget",
        "answers",
        "before_state",
        "deferred_members",
        "hits",
        "is_missing_column_unknown",
        "macro_values",
        "missing_columns",
        "open_keys",
        "row",
        "unreached_entries",
    )

    def __init__(
        self,
        row: Row,
        missing_columns: frozenset[str],
        macro_values: MacroValues,
        before_state: BeforeState | None = None,
        work_budget: FilterWorkBudget[M] | None = None,
        *,
        is_missing_column_unknown: bool = False,
    ) -> None:
        self.row = row
        self.missing_columns = missing_columns
        self.is_missing_column_unknown = is_missing_column_unknown
        self.macro_values = macro_values
        self.before_state = before_state
        self.hits: dict[M, None] = {}
        self.answers: dict[tuple[Test, Arguments], bool] = {}
        self.open_keys: dict[RemoteKey, bool] = {}
        self.unreached_entries: list[KeyEntries[M]] = []
        self.deferred_members: dict[M, None] | None = None
        self._work_budget: FilterWorkBudget[M] = work_budget or FilterWorkBudget()
        self._searched_indexes: tuple[PredicateIndex[M], ...] = ()
        self._untested_members: deque[tuple[Iterable[M], Hashable | None]] = deque()
        """Members found but not tested, with the key of the index entries that they were in."""
        self._open_members: dict[M, None] = {}
        self._open_guards: list[tuple[PredicateIndex[M], _Guards, bool]] = []
        """Unindexed members whose guards only PostgreSQL can decide."""
        self._guard_verdicts: dict[Test, bool] = {}
        """Verdicts on tests without a caller's arguments, which all members share."""
        self._undecided_in_process: set[tuple[Test, Arguments]] = set()
        """Tests that raised in the process: they are not run again, PostgreSQL decides them."""

    # --- finding members

    def evaluate_members(self, members: Iterable[M]) -> None:
        """Test members that were found without the index."""
        for member in members:
            self._evaluate_member(member, None)

    def evaluate_index(self, index: PredicateIndex[M]) -> None:
        """Search an index and test the members found. A row may be looked up in several."""
        self.add_candidates(index)
        for _ in self.test_in_steps():
            pass

    def add_candidates(self, index: PredicateIndex[M]) -> None:
        """Search an index; leave the members found to be tested, unless finding them decides.

        The index may change before they are tested: removed members are then tested as well.
        """
        hits, missing = self.hits, self.missing_columns
        self._searched_indexes += (index,)
        for entries_key, members in index.candidates(self.row, missing):
            if entries_key is None:
                self._untested_members.append((list(members), None))
                continue
            untested: list[M] = []
            for member in members:
                path = member.specialization.paths_by_key[entries_key]
                if path.residual is True and not path.guards and not missing:
                    hits[member] = None
                else:
                    untested.append(member)
            if untested:
                self._untested_members.append((untested, entries_key))
        for guards, is_exact in list(index.unindexed):
            self._evaluate_unindexed(index, guards, is_exact=is_exact)
        self._open_remote_keys(index)
        if missing and self.is_missing_column_unknown:
            self._add_unreached(index)

    def _open_remote_keys(self, index: PredicateIndex[M]) -> None:
        """Ask for the index's remote keys, except where no member's guards can hold."""
        missing = self.missing_columns
        for remote_key, remote in index.remote_entries.items():
            is_known = not missing or missing.isdisjoint(remote_key.sql_values.column_names)
            if is_known and any(
                self._guards_verdict(guards) is not False for guards in remote.guard_counts
            ):
                self.open_keys[remote_key] = True

    def _add_unreached(self, index: PredicateIndex[M]) -> None:
        for entries in index.entries_of_missing_columns(self.missing_columns):
            if len(entries) > _MAX_KEYS_SCANNED:
                self.unreached_entries.append(entries)
            else:
                self.add_untested(entries.all())

    def add_untested(self, members: Iterable[M]) -> None:
        """Add members that were found without the index, to be tested by ``test_in_steps``."""
        self._untested_members.append((list(members), None))

    @property
    def is_fully_tested(self) -> bool:
        """Whether no member is left to be tested."""
        return not self._untested_members

    def test_in_steps(self) -> Iterator[None]:
        """Test the members found; yield after every few, so that the event loop may run."""
        while self._untested_members:
            members, entries_key = self._untested_members.popleft()
            for count, member in enumerate(members, start=1):
                self._evaluate_member(member, entries_key)
                if not count % _MEMBERS_PER_STEP:
                    yield

    # --- testing members

    def _evaluate_member(self, member: M, entries_key: Hashable | None) -> None:
        """Test a member, within the work that a client's filter may do."""
        filter_tests = member.specialization.filter_tests
        if filter_tests and not self._work_budget.may_test(member):
            return
        WORK_BUDGET.units_left = (
            self._work_budget.work_per_filter if filter_tests else MAX_RULE_WORK
        )
        try:
            if entries_key is not None:
                self._recheck(member, member.specialization.paths_by_key[entries_key])
            elif self._has_columns_for(member):
                self._record_verdict(
                    member, self.evaluate(member.specialization.formula, member.values)
                )
            if filter_tests:
                self._record_filter_work(member)
        finally:
            WORK_BUDGET.units_left = math.inf

    def _record_filter_work(self, member: M) -> None:
        """Count the filter's work; withdraw a member that is late, or defer an undecided one."""
        if self._work_budget.record_work(member):
            self._open_members.pop(member, None)
            self.hits.pop(member, None)
        elif (
            self.deferred_members is not None
            and member in self._open_members
            and self._is_filter_undecided(member)
        ):
            del self._open_members[member]
            self.deferred_members[member] = None

    def _is_filter_undecided(self, member: M) -> bool:
        """Whether a test of the member's filter raised in the process and keeps it open."""
        specialization = member.specialization
        return bool(self._undecided_in_process) and any(
            call.test in specialization.filter_tests
            and (call.test, self.arguments_of(call, member.values)) in self._undecided_in_process
            for call in self.unknown_test_calls(specialization.formula, member.values)
        )

    def _recheck(self, member: M, path: IndexPath) -> None:
        """Test what the index entries that the member was found in leave undecided."""
        if not self._has_columns_for(member):
            return
        verdict = self._guards_verdict(path.guards) if path.guards else True
        if verdict is not False and path.residual is not True:
            residual = self.evaluate(path.residual, member.values)
            verdict = residual if residual is False or verdict else None
        self._record_verdict(member, verdict)

    def _evaluate_unindexed(
        self, index: PredicateIndex[M], guards: _Guards, *, is_exact: bool
    ) -> None:
        """Match or test the unindexed members that share guards, if those hold."""
        verdict = self._guards_verdict(guards)
        members = index.unindexed.get((guards, is_exact), {})
        if (
            verdict is None
            and self.deferred_members is not None
            and any(member.specialization.filter_tests for member in members)
        ):
            self._untested_members.append((list(members), None))
        elif verdict is None:
            self._open_guards.append((index, guards, is_exact))
        elif verdict and is_exact and not self.missing_columns:
            self.hits.update(members)
        elif verdict:
            self._untested_members.append((list(members), (guards, is_exact)))

    def _guards_verdict(self, guards: _Guards) -> bool | None:
        """Return whether all guards hold; None if only PostgreSQL can decide."""
        verdict: bool | None = True
        units_left, WORK_BUDGET.units_left = (
            WORK_BUDGET.units_left,
            min(WORK_BUDGET.units_left, MAX_RULE_WORK, self._work_budget.work_per_filter),
        )
        for guard in guards:
            guard_verdict = self.evaluate(guard, ())
            if guard_verdict is False:
                verdict = False
                break
            verdict = verdict and guard_verdict
        WORK_BUDGET.units_left = units_left
        return verdict

    def _has_columns_for(self, member: M) -> bool:
        """Whether the member may be tested: its columns are there, or a missing one is UNKNOWN."""
        missing = self.missing_columns
        return (
            not missing
            or self.is_missing_column_unknown
            or missing.isdisjoint(member.specialization.column_names)
        )

    def _record_verdict(self, member: M, verdict: bool | None) -> None:  # noqa: FBT001 (the result)
        if verdict:
            self.hits[member] = None
        elif verdict is None:
            self._open_members[member] = None

    # --- evaluating formulas

    def evaluate(self, formula: Formula, values: Sequence[Scalar]) -> bool | None:
        """Return the formula's verdict for a caller's values; None while a test is open."""
        match formula:
            case TestCall():
                return self._test_verdict(formula, values)
            case AllOf(operands):
                is_known = True
                for operand in operands:
                    # A conjunction of tests is the usual formula: this spares it a call for each.
                    if isinstance(operand, TestCall):
                        verdict = self._test_verdict(operand, values)
                    else:
                        verdict = self.evaluate(operand, values)
                    if verdict is False:
                        return False
                    is_known = is_known and verdict is not None
                return True if is_known else None
            case AnyOf(operands):
                is_known = True
                for operand in operands:
                    verdict = self.evaluate(operand, values)
                    if verdict:
                        return True
                    is_known = is_known and verdict is not None
                return False if is_known else None
            case bool():
                return formula

    def arguments_of(self, call: TestCall, values: Sequence[Scalar]) -> tuple[Scalar, ...]:
        """Return a test's arguments: those of the caller's values that it takes, then macros."""
        own = tuple([values[i] for i in call.argument_positions])
        macros = call.test.macros
        return own + tuple([self.macro_values[macro] for macro in macros]) if macros else own

    def _test_verdict(self, call: TestCall, values: Sequence[Scalar]) -> bool | None:
        test = call.test
        if call.argument_positions:
            return self._run_test(test, self.arguments_of(call, values))
        known = self._guard_verdicts.get(test)
        if known is None:
            known = self._run_test(test, self.arguments_of(call, values))
            if known is not None:
                self._guard_verdicts[test] = known
        return known

    def _run_test(self, test: Test, arguments: tuple[Scalar, ...]) -> bool | None:
        if self.missing_columns and not self.missing_columns.isdisjoint(test.column_names):
            return None if self.is_missing_column_unknown else False
        if test.in_process is not None and (test, arguments) not in self._undecided_in_process:
            try:
                return test.in_process(self.row, arguments)
            except Exception:  # noqa: BLE001 (PostgreSQL decides what can't be decided here)
                self._undecided_in_process.add((test, arguments))
        return self.answers.get((test, arguments)) if self.answers else None

    def unknown_test_calls(self, formula: Formula, values: Sequence[Scalar]) -> Iterator[TestCall]:
        """Yield the open tests that keep the formula undecided."""
        match formula:
            case TestCall():
                if self._test_verdict(formula, values) is None:
                    yield formula
            case AllOf(operands) | AnyOf(operands):
                for operand in operands:
                    if self.evaluate(operand, values) is None:
                        yield from self.unknown_test_calls(operand, values)
            case bool():
                return

    # --- what is open, and PostgreSQL's answers

    @property
    def has_open_tests(self) -> bool:
        """Whether a verdict depends on tests that only PostgreSQL can decide."""
        return bool(self._open_members or self._open_guards)

    def open_tests(self) -> Iterator[tuple[Test, Arguments]]:
        """Yield the tests that PostgreSQL must decide, with their arguments."""
        for guard in {guard: None for _, guards, _ in self._open_guards for guard in guards}:
            for call in self.unknown_test_calls(guard, ()):
                yield call.test, self.arguments_of(call, ())
        for member in self._open_members:
            for call in self.unknown_test_calls(member.specialization.formula, member.values):
                yield call.test, self.arguments_of(call, member.values)

    def can_be_answered(self, test: Test) -> bool:
        """Whether PostgreSQL can decide the test: the image has its columns, and it has SQL."""
        missing = self.missing_columns
        if missing and not missing.isdisjoint(test.column_names):
            return False
        try:
            return missing.isdisjoint(test.sql_predicate.column_names)
        except RuleError:
            return False

    def retry_open(self) -> None:
        """Evaluate open members again, now that there are answers."""
        open_guards, self._open_guards = self._open_guards, []
        for index, guards, is_exact in open_guards:
            self._evaluate_unindexed(index, guards, is_exact=is_exact)
        for _ in self.test_in_steps():
            pass
        open_members, self._open_members = self._open_members, {}
        self.evaluate_members(open_members)

    def accept_keys(self, remote_key: RemoteKey, keys: Iterable[SqliteValue]) -> None:
        """Test the members under the keys that PostgreSQL named for the row."""
        for entries in self._remote_entries(remote_key):
            for key in keys:
                for member in entries.get(key):
                    implied = member.specialization.paths_by_key[remote_key].implied_test_call
                    if implied is not None:
                        self.answers[implied.test, self.arguments_of(implied, member.values)] = True
                    self._evaluate_member(member, remote_key)

    def indexed_keys(self, remote_key: RemoteKey) -> Iterator[str]:
        """Yield the values of a remote key that the index has members for."""
        for entries in self._remote_entries(remote_key):
            yield from map(str, entries)

    def _remote_entries(self, remote_key: RemoteKey) -> list[KeyEntries[M]]:
        """Return the members under a remote key; they may have been removed since it was asked."""
        known = (index.remote_entries.get(remote_key) for index in self._searched_indexes)
        return [entries for entries in known if entries is not None]

    @property
    def undecided_members(self) -> Iterator[M]:
        """The members whose verdict, or whose being found at all, depends on open questions."""
        if any(self.can_be_answered(test) for test, _ in self.open_tests()):
            yield from self._members_with_open_tests()
        for remote_key in self.open_keys:
            for entries in self._remote_entries(remote_key):
                yield from entries.all()

    @property
    def members_missing_columns(self) -> AbstractSet[M]:
        """The members whose verdict depends on missing columns, once all questions are answered.

        Without those of ``unreached_entries``.
        """
        if not self.missing_columns or not self.is_missing_column_unknown:
            return frozenset()
        members = dict.fromkeys(self._members_with_open_tests())
        return members.keys() - self.hits.keys()

    def _members_with_open_tests(self) -> Iterator[M]:
        yield from self._open_members
        for index, guards, is_exact in self._open_guards:
            yield from index.unindexed.get((guards, is_exact), {})

    def overlays(self, tables: Iterable[TableName]) -> tuple[Overlay, ...]:
        """Return the former state of those tables that the row's transaction changed."""
        return () if self.before_state is None else self.before_state.overlays(tables)

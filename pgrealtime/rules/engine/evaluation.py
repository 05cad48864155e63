"""A batch of rows being decided: what the index finds, what is tested, what Postgres is asked.

Pure: ``inquiries`` says what must be known, whoever has a driver finds out, ``resume`` goes on.
After at most a few rounds there is nothing left to ask and ``hits`` is complete.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, TypeAlias, TypeVar

from pgrealtime.changes import TableName
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.batch_query import (
    ColumnTexts,
    KeyQuestion,
    PairQuestion,
    Question,
    column_texts,
    sql_values_of,
)
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.formula import Formula, MacroValues, RowVerdicts, Test
from pgrealtime.rules.engine.index import KeyEntries, Member, PredicateIndex
from pgrealtime.rules.engine.index_paths import RemoteKey
from pgrealtime.rules.engine.plan import RecheckCondition
from pgrealtime.rules.memory.compare import WORK_BUDGET, SqliteValue
from pgrealtime.rules.memory.operands import Arguments
from pgrealtime.rules.sql.row_images import Overlay

M = TypeVar("M", bound=Member)

_MAX_NAMED_KEYS_PER_ROW = 1000
"""Values of one row that Postgres names before it is told which ones matter."""
_MAX_PAIRS_PER_QUESTION = 2000
"""Pairs of one statement at most, so that each is short."""
_MAX_RULE_WORK = 20_000.0
"""Units of ``WORK_BUDGET`` that a rule may take for a row in the process; then Postgres takes less.
"""
_WORK_PER_TEST = 2.0
"""Units that any test takes."""
_MEMBERS_PER_STEP = 16
"""Members that are tested before others may have their turn."""


class FilterWorkBudget(Generic[M]):
    """What clients' filters may take in the process for the rows of a batch. Rules have no bound.

    Args:
        work_per_filter: Units of ``WORK_BUDGET`` that one filter may take for one row.
        total_work: Units that all filters may take together, for all rows.
        is_shared: Whether others wait. If so a filter that takes more is late: its members must
            be judged anew, apart. If not, Postgres is asked.

    Attributes:
        late_members: Members that took more, or were not tested since others had taken all.
        costly_members: Those of them that took more themselves.
        work_used: Units that were taken.
    """

    def __init__(
        self,
        *,
        work_per_filter: float = math.inf,
        total_work: float = math.inf,
        is_shared: bool = False,
    ) -> None:
        self.work_per_filter = work_per_filter
        self.total_work = total_work
        self.is_shared = is_shared
        self.late_members: dict[M, None] = {}
        self.costly_members: dict[M, None] = {}
        self.work_used = 0.0

    def may_test(self, member: M) -> bool:
        """Whether a member with a filter is tested; else it is late."""
        if self.work_used >= self.total_work:
            self.late_members[member] = None
        return member not in self.late_members

    def record_work(self, member: M) -> bool:
        """Take note of what its filter took; return whether that was too much."""
        self.work_used += (
            _WORK_PER_TEST + self.work_per_filter - WORK_BUDGET.units_left
            if self.work_per_filter < math.inf
            else _WORK_PER_TEST
        )
        if WORK_BUDGET.units_left >= 0 or not self.is_shared:
            return False
        self.late_members[member] = self.costly_members[member] = None
        return True


_MAX_KEYS_SCANNED = 1000
"""Keys under which members are tried one by one when the row's own key isn't known."""


class RowEvaluation(Generic[M]):
    """One row of the batch.

    Attributes:
        hits: The members that are admitted.
        open_keys: What Postgres is asked for to learn whom the row concerns: all that it names, or
            (False) only who is in the index.
        unreached_entries: Members to whom only columns lead that aren't known, and too many to try
            each.
    """

    __slots__ = (
        "_open_guards",
        "_open_members",
        "_searched_indexes",
        "_untested_members",
        "_work_budget",
        "before_state",
        "deferred_members",
        "hits",
        "open_keys",
        "unreached_entries",
        "verdicts",
    )

    def __init__(
        self,
        verdicts: RowVerdicts,
        before_state: BeforeState | None = None,
        work_budget: FilterWorkBudget[M] | None = None,
    ) -> None:
        self.verdicts = verdicts
        self.before_state = before_state
        self._work_budget: FilterWorkBudget[M] = work_budget or FilterWorkBudget()
        self._untested_members: deque[tuple[Iterable[M], Hashable | None]] = deque()
        """Members that were found and have yet to be tested, with what led there if anything."""
        self.deferred_members: dict[M, None] | None = None
        """If given, takes the members whose filters only Postgres can decide for this row."""
        self._searched_indexes: tuple[PredicateIndex[M], ...] = ()
        self.hits: dict[M, None] = {}
        self.open_keys: dict[RemoteKey, bool] = {}
        self.unreached_entries: list[KeyEntries[M]] = []
        self._open_members: dict[M, None] = {}
        self._open_guards: list[tuple[PredicateIndex[M], _Guards, bool]] = []
        """Members to whom nothing leads, with guards that only Postgres knows."""

    def overlays(self, tables: Iterable[TableName]) -> tuple[Overlay, ...]:
        """Return what stands in for tables that the row's transaction touched."""
        return () if self.before_state is None else self.before_state.overlays(tables)

    def evaluate_members(self, members: Iterable[M]) -> None:
        """Ask members that were found in some other way than by the index."""
        for member in members:
            self._evaluate_member(member, None)

    def evaluate_index(self, index: PredicateIndex[M]) -> None:
        """Look into an index, and test whom it finds; a row may concern several."""
        self.add_candidates(index)
        for _ in self.test_in_steps():
            pass

    def add_candidates(self, index: PredicateIndex[M]) -> None:
        """Look into an index, and leave whom it finds to be tested, unless found is admitted.

        The index may change in between: then what has gone is tested as well.
        """
        hits, missing = self.hits, self.verdicts.missing_columns
        self._searched_indexes += (index,)
        for lead, members in index.candidates(self.verdicts):
            if lead is None:
                self._untested_members.append((list(members), None))
                continue
            untested: list[M] = []
            for member in members:
                found = member.specialization.rechecks[lead]
                if found.residual is True and not found.guards and not missing:
                    hits[member] = None
                else:
                    untested.append(member)
            if untested:
                self._untested_members.append((untested, lead))
        for guards, is_exact in list(index.unindexed):
            self._evaluate_unindexed(index, guards, is_exact=is_exact)
        for source, asked in index.remote_entries.items():
            is_known = not missing or missing.isdisjoint(sql_values_of(source).columns)
            if is_known and any(
                self._guards_verdict(guards) is not False for guards in asked.guard_counts
            ):
                self.open_keys[source] = True
        if missing and self.verdicts.is_missing_column_unknown:
            self._add_unreached(index)

    @property
    def is_fully_tested(self) -> bool:
        """Whether nobody is left to be tested."""
        return not self._untested_members

    def _add_unreached(self, index: PredicateIndex[M]) -> None:
        """Have the members tested to whom a column would lead that isn't known."""
        for entries in index.entries_of_missing_columns(self.verdicts.missing_columns):
            if len(entries) > _MAX_KEYS_SCANNED:
                self.unreached_entries.append(entries)
            else:
                self.add_untested(entries.all())

    def test_in_steps(self) -> Iterator[None]:
        """Test those that were found, bit by bit."""
        while self._untested_members:
            members, lead = self._untested_members.popleft()
            for count, member in enumerate(members, start=1):
                self._evaluate_member(member, lead)
                if not count % _MEMBERS_PER_STEP:
                    yield

    def add_untested(self, members: Iterable[M]) -> None:
        """Have members tested that were found otherwise, when it is their turn."""
        self._untested_members.append((list(members), None))

    def _evaluate_member(self, member: M, entries_key: Hashable | None) -> None:
        """Test a member, within what a client's filter may take."""
        filtered = member.specialization.filter_tests
        if filtered and not self._work_budget.may_test(member):
            return
        WORK_BUDGET.units_left = self._work_budget.work_per_filter if filtered else _MAX_RULE_WORK
        try:
            if entries_key is not None:
                self._recheck(member, member.specialization.rechecks[entries_key])
            elif self._has_columns_for(member):
                self._record_verdict(
                    member, self.verdicts.evaluate(member.specialization.formula, member.values)
                )
            if filtered:
                self._record_filter_work(member)
        finally:
            WORK_BUDGET.units_left = math.inf

    def _record_filter_work(self, member: M) -> None:
        """Leave a member to others whose filter took too much, or isn't decided here."""
        if self._work_budget.record_work(member):
            self._open_members.pop(member, None)
            self.hits.pop(member, None)
        elif (
            self.deferred_members is not None
            and member in self._open_members
            and self.verdicts.is_undecided_in_process(
                member.specialization.formula, member.values, member.specialization.filter_tests
            )
        ):
            del self._open_members[member]
            self.deferred_members[member] = None

    def _guards_verdict(self, guards: _Guards) -> bool | None:
        verdict: bool | None = True
        left, WORK_BUDGET.units_left = (
            WORK_BUDGET.units_left,
            min(WORK_BUDGET.units_left, _MAX_RULE_WORK, self._work_budget.work_per_filter),
        )
        for guard in guards:
            holds = self.verdicts.evaluate(guard, ())
            if holds is False:
                verdict = False
                break
            verdict = verdict and holds
        WORK_BUDGET.units_left = left
        return verdict

    def _evaluate_unindexed(
        self, index: PredicateIndex[M], guards: _Guards, *, is_exact: bool
    ) -> None:
        """Take the members to whom nothing leads, if what they have in common is true."""
        holds = self._guards_verdict(guards)
        members = index.unindexed.get((guards, is_exact), {})
        if (
            holds is None
            and self.deferred_members is not None
            and any(m.specialization.filter_tests for m in members)
        ):
            self._untested_members.append((list(members), None))
        elif holds is None:
            self._open_guards.append((index, guards, is_exact))
        elif holds and is_exact and not self.verdicts.missing_columns:
            self.hits.update(members)
        elif holds:
            self._untested_members.append((list(members), (guards, is_exact)))

    def _recheck(self, member: M, condition: RecheckCondition) -> None:
        """Take a member to whom something led, if that is enough."""
        if not self._has_columns_for(member):
            return
        verdict = self._guards_verdict(condition.guards) if condition.guards else True
        if verdict is not False and condition.residual is not True:
            rest = self.verdicts.evaluate(condition.residual, member.values)
            verdict = rest if rest is False or verdict else None
        self._record_verdict(member, verdict)

    def _has_columns_for(self, member: M) -> bool:
        """Whether the row has all that the member's rule reads, or lacks it for the time being."""
        missing = self.verdicts.missing_columns
        return (
            not missing
            or self.verdicts.is_missing_column_unknown
            or missing.isdisjoint(member.specialization.columns)
        )

    def _record_verdict(self, member: M, verdict: bool | None) -> None:  # noqa: FBT001 (the result)
        if verdict:
            self.hits[member] = None
        elif verdict is None:
            self._open_members[member] = None

    # --- what Postgres says

    @property
    def has_open_tests(self) -> bool:
        """Whether Postgres has yet to say something of an atom."""
        return bool(self._open_members or self._open_guards)

    def accept_keys(self, remote_key: RemoteKey, keys: Iterable[SqliteValue]) -> None:
        """Take the values of subscribers that Postgres named for the row."""
        for entries in self._remote_entries(remote_key):
            for value in keys:
                for member in entries.get(value):
                    lead = member.specialization.rechecks[remote_key]
                    if lead.implied_test_call is not None:
                        args = self.verdicts.arguments(lead.implied_test_call, member.values)
                        self.verdicts.answers[lead.implied_test_call.test, args] = True
                    self._evaluate_member(member, remote_key)

    def _remote_entries(self, remote_key: RemoteKey) -> list[KeyEntries[M]]:
        """Return who is found by a source; members may have gone since it was asked."""
        found = (index.remote_entries.get(remote_key) for index in self._searched_indexes)
        return [asked.entries for asked in found if asked is not None]

    def indexed_keys(self, remote_key: RemoteKey) -> Iterator[str]:
        """Yield the values of a source that lead to somebody."""
        for entries in self._remote_entries(remote_key):
            yield from map(str, entries)

    def open_tests(self) -> Iterator[tuple[Test, Arguments]]:
        """Yield what Postgres must say of atoms."""
        facts = self.verdicts
        for guard in {guard: None for _, guards, _ in self._open_guards for guard in guards}:
            for leaf in facts.unknown_test_calls(guard, ()):
                yield leaf.test, facts.arguments(leaf, ())
        for member in self._open_members:
            for leaf in facts.unknown_test_calls(member.specialization.formula, member.values):
                yield leaf.test, facts.arguments(leaf, member.values)

    @property
    def members_missing_columns(self) -> AbstractSet[M]:
        """The members whose verdict depends on columns that aren't known, all else being said.

        Those of ``unreached`` aside.
        """
        if not self.verdicts.missing_columns or not self.verdicts.is_missing_column_unknown:
            return frozenset()
        found = dict(self._open_members)
        for index, guards, is_exact in self._open_guards:
            found.update(index.unindexed.get((guards, is_exact), {}))
        return found.keys() - self.hits.keys()

    @property
    def undecided_members(self) -> Iterator[M]:
        """The members for whom Postgres has yet to say something, be it only who they are."""
        if any(
            _is_answerable(atom, self.verdicts.missing_columns) for atom, _ in self.open_tests()
        ):
            yield from self._open_members
            for index, guards, is_exact in self._open_guards:
                yield from index.unindexed.get((guards, is_exact), {})
        for source in self.open_keys:
            for entries in self._remote_entries(source):
                yield from entries.all()

    def retry_open(self) -> None:
        """Settle what was open, now that Postgres has said something."""
        waiting, self._open_guards = self._open_guards, []
        for index, guards, is_exact in waiting:
            self._evaluate_unindexed(index, guards, is_exact=is_exact)
        for _ in self.test_in_steps():
            pass
        open_, self._open_members = self._open_members, {}
        self.evaluate_members(open_)


_Guards: TypeAlias = tuple[Formula, ...]


class Evaluation(Generic[M]):
    """A batch of cases, and the questions that are out."""

    def __init__(self, rows: Sequence[RowEvaluation[M]], macro_values: MacroValues) -> None:
        self._rows = rows
        self._macro_values = macro_values
        self._key_questions: list[tuple[KeyQuestion, list[list[RowEvaluation[M]]]]] = []
        self._pair_questions: list[tuple[PairQuestion, list[list[RowEvaluation[M]]]]] = []

    def questions(self) -> list[Question]:
        """Return what Postgres must be asked now; nothing if all is decided.

        Once they have been put, or given up, ``resume`` goes on.
        """
        self._key_questions = list(self._make_key_questions())
        self._pair_questions = list(self._make_pair_questions())
        inquiries: list[Question] = [values for values, _ in self._key_questions]
        inquiries += [pairs for pairs, _ in self._pair_questions]
        return inquiries

    def _make_key_questions(self) -> Iterator[tuple[KeyQuestion, list[list[RowEvaluation[M]]]]]:
        gathered: dict[_QuestionKey[tuple[RemoteKey, bool]], _KeyQuestionRows[M]] = {}
        for case in self._rows:
            for source, is_all in case.open_keys.items():
                lowered = sql_values_of(source)
                overlays = case.overlays(lowered.tables)
                place = (source, is_all), tuple(map(id, overlays))
                _, rows = gathered.setdefault(place, (overlays, {}))
                cells = column_texts(case.verdicts.row, lowered.columns)
                rows.setdefault(cells, []).append(case)
        for ((source, is_all), _), (overlays, rows) in gathered.items():
            values = KeyQuestion(
                remote_key=source,
                rows=list(rows),
                macro_values=self._macro_values,
                max_texts_per_row=_MAX_NAMED_KEYS_PER_ROW,
                wanted_keys=None if is_all else _indexed_keys(source, rows.values()),
                overlays=overlays,
            )
            yield values, list(rows.values())

    def _make_pair_questions(self) -> Iterator[tuple[PairQuestion, list[list[RowEvaluation[M]]]]]:
        gathered: dict[_QuestionKey[Test], _PairQuestionRows[M]] = {}
        for case in self._rows:
            if not case.has_open_tests:
                continue
            for atom, args in dict.fromkeys(case.open_tests()):
                if not _is_answerable(atom, case.verdicts.missing_columns):
                    if not (
                        case.verdicts.missing_columns and case.verdicts.is_missing_column_unknown
                    ):
                        case.verdicts.answers[atom, args] = False
                    continue
                overlays = case.overlays(atom.sql_predicate.tables)
                _, pairs = gathered.setdefault((atom, tuple(map(id, overlays))), (overlays, {}))
                cells = column_texts(case.verdicts.row, atom.sql_predicate.columns)
                pairs.setdefault((cells, args), []).append(case)
        for (atom, _), (overlays, pairs) in gathered.items():
            asked = list(pairs)
            for start in range(0, len(asked), _MAX_PAIRS_PER_QUESTION):
                part = asked[start : start + _MAX_PAIRS_PER_QUESTION]
                yield (
                    PairQuestion(test=atom, pairs=part, overlays=overlays),
                    [pairs[pair] for pair in part],
                )

    def resume(self) -> None:
        """Go on with the answers; what has none is denied, unless it was left."""
        self._accept_pair_answers()
        for case in self._rows:
            if case.open_keys:
                case.open_keys = {}
            if case.has_open_tests:
                case.retry_open()
        self._accept_key_answers()

    def _accept_pair_answers(self) -> None:
        for pairs, places in self._pair_questions:
            if pairs.is_postponed:
                continue
            for place, ((_, args), cases) in enumerate(zip(pairs.pairs, places, strict=True)):
                for case in cases:
                    case.verdicts.answers[pairs.test, args] = place in pairs.matching_positions

    def _accept_key_answers(self) -> None:
        for values, rows in self._key_questions:
            for found, cases in zip(values.keys_by_row, rows, strict=True):
                for case in cases:
                    if values.is_postponed:
                        case.open_keys[values.remote_key] = values.wanted_keys is None
                    elif not values.is_truncated(found):
                        case.accept_keys(values.remote_key, found)
                    else:
                        case.open_keys[values.remote_key] = False


def _is_answerable(test: Test, missing_columns: frozenset[str]) -> bool:
    """Whether Postgres can decide the atom about a row that lacks those columns."""
    if missing_columns and not missing_columns.isdisjoint(test.columns):
        return False
    try:
        return missing_columns.isdisjoint(test.sql_predicate.columns)
    except RuleError:
        return False


_T = TypeVar("_T")
_QuestionKey: TypeAlias = tuple[_T, tuple[int, ...]]
"""What is asked, and by which overlays, told apart by identity: a transaction has its own."""
_KeyQuestionRows: TypeAlias = tuple[tuple[Overlay, ...], dict[ColumnTexts, list[RowEvaluation[M]]]]
_PairQuestionRows: TypeAlias = tuple[
    tuple[Overlay, ...], dict[tuple[ColumnTexts, Arguments], list[RowEvaluation[M]]]
]


def _indexed_keys(remote_key: RemoteKey, rows: Iterable[Sequence[RowEvaluation[M]]]) -> list[str]:
    """Return the keys that matter to any of the cases."""
    return list(
        {key: None for some in rows for case in some for key in case.indexed_keys(remote_key)}
    )

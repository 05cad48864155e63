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
from pgrealtime.rules.engine.batch_query import Cells, Inquiry, Pairs, Values, cells_of, values_of
from pgrealtime.rules.engine.before_state import Past
from pgrealtime.rules.engine.formula import Atom, Facts, Formula, Moment
from pgrealtime.rules.engine.index import Entries, Index, Member
from pgrealtime.rules.engine.index_paths import RemoteSource
from pgrealtime.rules.engine.plan import Lead
from pgrealtime.rules.memory.compare import WORK, Comparable
from pgrealtime.rules.memory.conditions import Args
from pgrealtime.rules.sql.row_images import Overlay

M = TypeVar("M", bound=Member)

_VALUES = 1000
"""Values of one row that Postgres names before it is told which ones matter."""
_PAIRS = 2000
"""Pairs of one statement at most, so that each is short."""
_RULE = 20_000.0
"""Units of ``WORK`` that a rule may take for a row in the process; then Postgres takes less."""
_BASE = 2.0
"""Units that any test takes."""
_FEW = 16
"""Members that are tested before others may have their turn."""


class Testing(Generic[M]):
    """What clients' filters may take in the process for the rows of a batch. Rules have no bound.

    Args:
        each: Units of ``WORK`` that one filter may take for one row.
        left: Units that all filters may take together, for all rows.
        is_shared: Whether others wait. If so a filter that takes more is late: its members must
            be judged anew, apart. If not, Postgres is asked.

    Attributes:
        late: Members that took more, or were not tested since others had taken all.
        dear: Those of them that took more themselves.
        used: Units that were taken.
    """

    def __init__(
        self, *, each: float = math.inf, left: float = math.inf, is_shared: bool = False
    ) -> None:
        self.each = each
        self.left = left
        self.is_shared = is_shared
        self.late: dict[M, None] = {}
        self.dear: dict[M, None] = {}
        self.used = 0.0

    def may_test(self, member: M) -> bool:
        """Whether a member with a filter is tested; else it is late."""
        if self.used >= self.left:
            self.late[member] = None
        return member not in self.late

    def note(self, member: M) -> bool:
        """Take note of what its filter took; return whether that was too much."""
        self.used += _BASE + self.each - WORK.left if self.each < math.inf else _BASE
        if WORK.left >= 0 or not self.is_shared:
            return False
        self.late[member] = self.dear[member] = None
        return True


_TRIED = 1000
"""Keys under which members are tried one by one when the row's own key isn't known."""


class Case(Generic[M]):
    """One row of the batch.

    Attributes:
        hits: The members that are admitted.
        asked: What Postgres is asked for to learn whom the row concerns: all that it names, or
            (False) only who is in the index.
        unreached: Members to whom only columns lead that aren't known, and too many to try each.
    """

    __slots__ = (
        "_open",
        "_searched",
        "_testing",
        "_untested",
        "_waiting",
        "asked",
        "deferred",
        "facts",
        "hits",
        "past",
        "unreached",
    )

    def __init__(
        self, facts: Facts, past: Past | None = None, testing: Testing[M] | None = None
    ) -> None:
        self.facts = facts
        self.past = past
        self._testing: Testing[M] = testing or Testing()
        self._untested: deque[tuple[Iterable[M], Hashable | None]] = deque()
        """Members that were found and have yet to be tested, with what led there if anything."""
        self.deferred: dict[M, None] | None = None
        """If given, takes the members whose filters only Postgres can decide for this row."""
        self._searched: tuple[Index[M], ...] = ()
        self.hits: dict[M, None] = {}
        self.asked: dict[RemoteSource, bool] = {}
        self.unreached: list[Entries[M]] = []
        self._open: dict[M, None] = {}
        self._waiting: list[tuple[Index[M], _Guards, bool]] = []
        """Members to whom nothing leads, with guards that only Postgres knows."""

    def overlays(self, tables: Iterable[TableName]) -> tuple[Overlay, ...]:
        """Return what stands in for tables that the row's transaction touched."""
        return () if self.past is None else self.past.overlays(tables)

    def consider(self, members: Iterable[M]) -> None:
        """Ask members that were found in some other way than by the index."""
        for member in members:
            self._test(member, None)

    def search(self, index: Index[M]) -> None:
        """Look into an index, and test whom it finds; a row may concern several."""
        self.find(index)
        for _ in self.testing():
            pass

    def find(self, index: Index[M]) -> None:
        """Look into an index, and leave whom it finds to be tested, unless found is admitted.

        The index may change in between: then what has gone is tested as well.
        """
        hits, missing = self.hits, self.facts.missing
        self._searched += (index,)
        for lead, members in index.found(self.facts):
            if lead is None:
                self._untested.append((list(members), None))
                continue
            untested: list[M] = []
            for member in members:
                found = member.variant.leads[lead]
                if found.rest is True and not found.guards and not missing:
                    hits[member] = None
                else:
                    untested.append(member)
            if untested:
                self._untested.append((untested, lead))
        for guards, is_exact in list(index.free):
            self._meet(index, guards, is_exact=is_exact)
        for source, asked in index.asked.items():
            is_known = not missing or missing.isdisjoint(values_of(source).columns)
            if is_known and any(self._hold(guards) is not False for guards in asked.guards):
                self.asked[source] = True
        if missing and self.facts.is_missing_unknown:
            self._try_unreached(index)

    @property
    def is_tested(self) -> bool:
        """Whether nobody is left to be tested."""
        return not self._untested

    def _try_unreached(self, index: Index[M]) -> None:
        """Have the members tested to whom a column would lead that isn't known."""
        for entries in index.unreached(self.facts.missing):
            if len(entries) > _TRIED:
                self.unreached.append(entries)
            else:
                self.put_off(entries.all())

    def testing(self) -> Iterator[None]:
        """Test those that were found, bit by bit."""
        while self._untested:
            members, lead = self._untested.popleft()
            for count, member in enumerate(members, start=1):
                self._test(member, lead)
                if not count % _FEW:
                    yield

    def put_off(self, members: Iterable[M]) -> None:
        """Have members tested that were found otherwise, when it is their turn."""
        self._untested.append((list(members), None))

    def _test(self, member: M, lead: Hashable | None) -> None:
        """Test a member, within what a client's filter may take."""
        filtered = member.variant.filtered
        if filtered and not self._testing.may_test(member):
            return
        WORK.left = self._testing.each if filtered else _RULE
        try:
            if lead is not None:
                self._settle(member, member.variant.leads[lead])
            elif self._is_told(member):
                self._note(member, self.facts.decide(member.variant.formula, member.values))
            if filtered:
                self._note_filter(member)
        finally:
            WORK.left = math.inf

    def _note_filter(self, member: M) -> None:
        """Leave a member to others whose filter took too much, or isn't decided here."""
        if self._testing.note(member):
            self._open.pop(member, None)
            self.hits.pop(member, None)
        elif (
            self.deferred is not None
            and member in self._open
            and self.facts.is_undecided(
                member.variant.formula, member.values, member.variant.filtered
            )
        ):
            del self._open[member]
            self.deferred[member] = None

    def _hold(self, guards: _Guards) -> bool | None:
        verdict: bool | None = True
        left, WORK.left = WORK.left, min(WORK.left, _RULE, self._testing.each)
        for guard in guards:
            holds = self.facts.decide(guard, ())
            if holds is False:
                verdict = False
                break
            verdict = verdict and holds
        WORK.left = left
        return verdict

    def _meet(self, index: Index[M], guards: _Guards, *, is_exact: bool) -> None:
        """Take the members to whom nothing leads, if what they have in common is true."""
        holds = self._hold(guards)
        members = index.free.get((guards, is_exact), {})
        if holds is None and self.deferred is not None and any(m.variant.filtered for m in members):
            self._untested.append((list(members), None))
        elif holds is None:
            self._waiting.append((index, guards, is_exact))
        elif holds and is_exact and not self.facts.missing:
            self.hits.update(members)
        elif holds:
            self._untested.append((list(members), (guards, is_exact)))

    def _settle(self, member: M, lead: Lead) -> None:
        """Take a member to whom something led, if that is enough."""
        if not self._is_told(member):
            return
        verdict = self._hold(lead.guards) if lead.guards else True
        if verdict is not False and lead.rest is not True:
            rest = self.facts.decide(lead.rest, member.values)
            verdict = rest if rest is False or verdict else None
        self._note(member, verdict)

    def _is_told(self, member: M) -> bool:
        """Whether the row has all that the member's rule reads, or lacks it for the time being."""
        missing = self.facts.missing
        return (
            not missing
            or self.facts.is_missing_unknown
            or missing.isdisjoint(member.variant.columns)
        )

    def _note(self, member: M, verdict: bool | None) -> None:  # noqa: FBT001 (the result)
        if verdict:
            self.hits[member] = None
        elif verdict is None:
            self._open[member] = None

    # --- what Postgres says

    @property
    def is_open(self) -> bool:
        """Whether Postgres has yet to say something of an atom."""
        return bool(self._open or self._waiting)

    def name(self, source: RemoteSource, values: Iterable[Comparable]) -> None:
        """Take the values of subscribers that Postgres named for the row."""
        for entries in self._asking(source):
            for value in values:
                for member in entries.get(value):
                    lead = member.variant.leads[source]
                    if lead.proves is not None:
                        args = self.facts.args(lead.proves, member.values)
                        self.facts.answers[lead.proves.atom, args] = True
                    self._test(member, source)

    def _asking(self, source: RemoteSource) -> list[Entries[M]]:
        """Return who is found by a source; members may have gone since it was asked."""
        found = (index.asked.get(source) for index in self._searched)
        return [asked.entries for asked in found if asked is not None]

    def keys(self, source: RemoteSource) -> Iterator[str]:
        """Yield the values of a source that lead to somebody."""
        for entries in self._asking(source):
            yield from map(str, entries)

    def wanted(self) -> Iterator[tuple[Atom, Args]]:
        """Yield what Postgres must say of atoms."""
        facts = self.facts
        for guard in {guard: None for _, guards, _ in self._waiting for guard in guards}:
            for leaf in facts.open_leaves(guard, ()):
                yield leaf.atom, facts.args(leaf, ())
        for member in self._open:
            for leaf in facts.open_leaves(member.variant.formula, member.values):
                yield leaf.atom, facts.args(leaf, member.values)

    @property
    def unprovable(self) -> AbstractSet[M]:
        """The members whose verdict depends on columns that aren't known, all else being said.

        Those of ``unreached`` aside.
        """
        if not self.facts.missing or not self.facts.is_missing_unknown:
            return frozenset()
        found = dict(self._open)
        for index, guards, is_exact in self._waiting:
            found.update(index.free.get((guards, is_exact), {}))
        return found.keys() - self.hits.keys()

    @property
    def undecided(self) -> Iterator[M]:
        """The members for whom Postgres has yet to say something, be it only who they are."""
        if any(_may_be_asked(atom, self.facts.missing) for atom, _ in self.wanted()):
            yield from self._open
            for index, guards, is_exact in self._waiting:
                yield from index.free.get((guards, is_exact), {})
        for source in self.asked:
            for entries in self._asking(source):
                yield from entries.all()

    def reconsider(self) -> None:
        """Settle what was open, now that Postgres has said something."""
        waiting, self._waiting = self._waiting, []
        for index, guards, is_exact in waiting:
            self._meet(index, guards, is_exact=is_exact)
        for _ in self.testing():
            pass
        open_, self._open = self._open, {}
        self.consider(open_)


_Guards: TypeAlias = tuple[Formula, ...]


class Deciding(Generic[M]):
    """A batch of cases, and the questions that are out."""

    def __init__(self, cases: Sequence[Case[M]], moment: Moment) -> None:
        self._cases = cases
        self._moment = moment
        self._values: list[tuple[Values, list[list[Case[M]]]]] = []
        self._pairs: list[tuple[Pairs, list[list[Case[M]]]]] = []

    def inquiries(self) -> list[Inquiry]:
        """Return what Postgres must be asked now; nothing if all is decided.

        Once they have been put, or given up, ``resume`` goes on.
        """
        self._values = list(self._name_values())
        self._pairs = list(self._name_pairs())
        inquiries: list[Inquiry] = [values for values, _ in self._values]
        inquiries += [pairs for pairs, _ in self._pairs]
        return inquiries

    def _name_values(self) -> Iterator[tuple[Values, list[list[Case[M]]]]]:
        gathered: dict[_Place[tuple[RemoteSource, bool]], _Rows[M]] = {}
        for case in self._cases:
            for source, is_all in case.asked.items():
                lowered = values_of(source)
                overlays = case.overlays(lowered.tables)
                place = (source, is_all), tuple(map(id, overlays))
                _, rows = gathered.setdefault(place, (overlays, {}))
                cells = cells_of(case.facts.row, lowered.columns)
                rows.setdefault(cells, []).append(case)
        for ((source, is_all), _), (overlays, rows) in gathered.items():
            values = Values(
                source=source,
                rows=list(rows),
                moment=self._moment,
                limit=_VALUES,
                wanted=None if is_all else _keys(source, rows.values()),
                overlays=overlays,
            )
            yield values, list(rows.values())

    def _name_pairs(self) -> Iterator[tuple[Pairs, list[list[Case[M]]]]]:
        gathered: dict[_Place[Atom], _PairsOf[M]] = {}
        for case in self._cases:
            if not case.is_open:
                continue
            for atom, args in dict.fromkeys(case.wanted()):
                if not _may_be_asked(atom, case.facts.missing):
                    if not (case.facts.missing and case.facts.is_missing_unknown):
                        case.facts.answers[atom, args] = False
                    continue
                overlays = case.overlays(atom.lowered.tables)
                _, pairs = gathered.setdefault((atom, tuple(map(id, overlays))), (overlays, {}))
                cells = cells_of(case.facts.row, atom.lowered.columns)
                pairs.setdefault((cells, args), []).append(case)
        for (atom, _), (overlays, pairs) in gathered.items():
            asked = list(pairs)
            for start in range(0, len(asked), _PAIRS):
                part = asked[start : start + _PAIRS]
                yield (
                    Pairs(atom=atom, asked=part, overlays=overlays),
                    [pairs[pair] for pair in part],
                )

    def resume(self) -> None:
        """Go on with the answers; what has none is denied, unless it was left."""
        self._take_pairs()
        for case in self._cases:
            if case.asked:
                case.asked = {}
            if case.is_open:
                case.reconsider()
        self._take_values()

    def _take_pairs(self) -> None:
        for pairs, places in self._pairs:
            if pairs.is_left:
                continue
            for place, ((_, args), cases) in enumerate(zip(pairs.asked, places, strict=True)):
                for case in cases:
                    case.facts.answers[pairs.atom, args] = place in pairs.admitted

    def _take_values(self) -> None:
        for values, rows in self._values:
            for found, cases in zip(values.found, rows, strict=True):
                for case in cases:
                    if values.is_left:
                        case.asked[values.source] = values.wanted is None
                    elif not values.is_cut(found):
                        case.name(values.source, found)
                    else:
                        case.asked[values.source] = False


def _may_be_asked(atom: Atom, missing: frozenset[str]) -> bool:
    """Whether Postgres can decide the atom about a row that lacks those columns."""
    if missing and not missing.isdisjoint(atom.columns):
        return False
    try:
        return missing.isdisjoint(atom.lowered.columns)
    except RuleError:
        return False


_T = TypeVar("_T")
_Place: TypeAlias = tuple[_T, tuple[int, ...]]
"""What is asked, and by which overlays, told apart by identity: a transaction has its own."""
_Rows: TypeAlias = tuple[tuple[Overlay, ...], dict[Cells, list[Case[M]]]]
_PairsOf: TypeAlias = tuple[tuple[Overlay, ...], dict[tuple[Cells, Args], list[Case[M]]]]


def _keys(source: RemoteSource, cases: Iterable[Sequence[Case[M]]]) -> list[str]:
    """Return the keys that matter to any of the cases."""
    return list({key: None for some in cases for case in some for key in case.keys(source)})

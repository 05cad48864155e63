"""A batch of rows being evaluated: their verdicts, and the questions that PostgreSQL must answer.

Pure. The matcher, the renderer, ``expand`` and ``reads`` add rows; ``rule_queries`` asks what
``questions`` returns and calls ``resume``, until no question is left. Each round decides tests or
finds further members, so there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, TypeAlias, TypeVar

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.lsn import Xid
from pgrealtime.rules.engine.batch_query import ColumnTexts, KeyQuestion, PairQuestion, Question
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.formula import Test
from pgrealtime.rules.engine.index import KeyEntries, Member
from pgrealtime.rules.engine.index_keys import RemoteKey
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.memory.operands import Arguments
from pgrealtime.rules.sql.row_images import Overlay

K = TypeVar("K", bound=Hashable)
"""What the caller tells rows apart by."""
M = TypeVar("M", bound=Member)

_MAX_KEYS_PER_ROW = 1000
"""Keys of one row that PostgreSQL names before only those are asked for that the index has."""
_MAX_PAIRS_PER_QUESTION = 2000
"""Pairs of one statement at most, so that each is short."""


class Evaluation(Generic[K, M]):
    """Rows, each evaluated against members, and the questions that are open.

    Attributes:
        xids: Transactions that must be visible where the questions are answered.
        rows: The rows, by the caller's key.
        steps: Work that ``run_in_process`` does; adds rows and tests members.
    """

    def __init__(self, macro_values: MacroValues, xids: Iterable[Xid] = ()) -> None:
        self.macro_values = macro_values
        self.xids = set(xids)
        self.rows: dict[K, RowEvaluation[M]] = {}
        self.steps: Iterator[None] = iter(())
        self._key_questions: list[tuple[KeyQuestion, _RowsByImage[M]]] = []
        self._pair_questions: list[tuple[PairQuestion, _RowsByImage[M]]] = []

    def add(
        self,
        row_key: K,
        collection: Collection,
        row: Row,
        members: Iterable[M],
        before_state: BeforeState | None = None,
    ) -> None:
        """Evaluate a row against given members, without an index.

        The same row may be added again, for other members. A test that reads a column missing from
        the row is FALSE. Without ``before_state`` related tables are read as they are at present.
        """
        evaluated = self.rows.get(row_key)
        if evaluated is None:
            missing = collection.column_names.difference(row)
            evaluated = RowEvaluation(row, missing, self.macro_values, before_state)
            self.rows[row_key] = evaluated
        evaluated.evaluate_members(members)

    def run_in_process(self, should_yield: Callable[[], bool]) -> bool:
        """Continue with ``steps`` until the event loop is to run; return whether all are done.

        It must have returned True before questions are asked.
        """
        return not any(should_yield() for _ in self.steps)

    # --- results

    def hits(self, row_key: K) -> AbstractSet[M]:
        """Return the members that match the row; complete when no question is left."""
        row = self.rows.get(row_key)
        return frozenset() if row is None else row.hits.keys()

    @property
    def deferred_members(self) -> dict[K, dict[M, None]]:
        """By row, the members whose filters only PostgreSQL can decide, where rows collect them."""
        return {key: row.deferred_members for key, row in self.rows.items() if row.deferred_members}

    @property
    def undecided_members(self) -> frozenset[M]:
        """The members for which some question has no answer."""
        return frozenset(member for row in self.rows.values() for member in row.undecided_members)

    def members_missing_columns(self) -> tuple[list[K], frozenset[M]]:
        """Return the rows whose missing columns leave verdicts UNKNOWN, and those members."""
        row_keys: list[K] = []
        members: set[M] = set()
        unreached: dict[int, KeyEntries[M]] = {}
        for row_key, row in self.rows.items():
            affected = row.members_missing_columns
            if affected or row.unreached_entries:
                row_keys.append(row_key)
                members.update(affected)
                unreached.update((id(entries), entries) for entries in row.unreached_entries)
        return row_keys, frozenset(members.union(*(remote.all() for remote in unreached.values())))

    # --- questions and answers

    def questions(self) -> list[Question]:
        """Return what PostgreSQL must be asked now; nothing if all verdicts are final.

        ``resume`` continues once they have been answered, abandoned or postponed.
        """
        if not any(row.open_keys or row.has_open_tests for row in self.rows.values()):
            self._key_questions, self._pair_questions = [], []
            return []
        self._key_questions = list(self._make_key_questions())
        self._pair_questions = list(self._make_pair_questions())
        questions: list[Question] = [question for question, _ in self._key_questions]
        questions += [question for question, _ in self._pair_questions]
        return questions

    def _make_key_questions(self) -> Iterator[tuple[KeyQuestion, _RowsByImage[M]]]:
        """Ask for open keys: one question per remote key and before state."""
        images_by_topic: dict[_Topic[tuple[RemoteKey, bool]], _Gathered[ColumnTexts, M]] = {}
        for row in self.rows.values():
            for remote_key, is_all in row.open_keys.items():
                sql_values = remote_key.sql_values
                overlays = row.overlays(sql_values.tables)
                topic = (remote_key, is_all), tuple(map(id, overlays))
                _, images = images_by_topic.setdefault(topic, (overlays, {}))
                images.setdefault(_column_texts(row.row, sql_values.column_names), []).append(row)
        for ((remote_key, is_all), _), (overlays, images) in images_by_topic.items():
            question = KeyQuestion(
                remote_key=remote_key,
                rows=list(images),
                macro_values=self.macro_values,
                max_texts_per_row=_MAX_KEYS_PER_ROW,
                wanted_keys=None if is_all else _indexed_keys(remote_key, images.values()),
                overlays=overlays,
            )
            yield question, list(images.values())

    def _make_pair_questions(self) -> Iterator[tuple[PairQuestion, _RowsByImage[M]]]:
        """Ask for open tests: one question per test, before state and so many pairs."""
        pairs_by_topic: dict[_Topic[Test], _Gathered[tuple[ColumnTexts, Arguments], M]] = {}
        for row in self.rows.values():
            if not row.has_open_tests:
                continue
            for test, arguments in dict.fromkeys(row.open_tests()):
                if not row.can_be_answered(test):
                    if not (row.missing_columns and row.is_missing_column_unknown):
                        row.answers[test, arguments] = False
                    continue
                overlays = row.overlays(test.sql_predicate.tables)
                topic = test, tuple(map(id, overlays))
                _, pairs = pairs_by_topic.setdefault(topic, (overlays, {}))
                image = _column_texts(row.row, test.sql_predicate.column_names)
                pairs.setdefault((image, arguments), []).append(row)
        for (test, _), (overlays, pairs) in pairs_by_topic.items():
            distinct = list(pairs)
            for start in range(0, len(distinct), _MAX_PAIRS_PER_QUESTION):
                chunk = distinct[start : start + _MAX_PAIRS_PER_QUESTION]
                question = PairQuestion(test=test, pairs=chunk, overlays=overlays)
                yield question, [pairs[pair] for pair in chunk]

    def resume(self) -> None:
        """Continue with the answers. What has none is denied, unless its question was postponed."""
        self._accept_pair_answers()
        for row in self.rows.values():
            if row.open_keys:
                row.open_keys = {}
            if row.has_open_tests:
                row.retry_open()
        self._accept_key_answers()

    def _accept_pair_answers(self) -> None:
        for question, rows_by_pair in self._pair_questions:
            if question.is_postponed:
                continue
            for position, ((_, arguments), rows) in enumerate(
                zip(question.pairs, rows_by_pair, strict=True)
            ):
                for row in rows:
                    row.answers[question.test, arguments] = position in question.matching_positions

    def _accept_key_answers(self) -> None:
        for question, rows_by_image in self._key_questions:
            for keys, rows in zip(question.keys_by_row, rows_by_image, strict=True):
                for row in rows:
                    if question.is_postponed:
                        row.open_keys[question.remote_key] = question.wanted_keys is None
                    elif not question.is_truncated(keys):
                        row.accept_keys(question.remote_key, keys)
                    else:
                        row.open_keys[question.remote_key] = False


_T = TypeVar("_T")
_Topic: TypeAlias = tuple[_T, tuple[int, ...]]
"""What is asked, and the identities of the overlays: each transaction has its own."""
_Gathered: TypeAlias = tuple[tuple[Overlay, ...], dict[_T, list[RowEvaluation[M]]]]
_RowsByImage: TypeAlias = list[list[RowEvaluation[M]]]
"""For each item of a question, the rows that have it: equal images are asked about once."""


def _column_texts(row: Row, columns: Sequence[str]) -> ColumnTexts:
    return tuple([row[name] for name in columns])


def _indexed_keys(remote_key: RemoteKey, rows: Iterable[Sequence[RowEvaluation[M]]]) -> list[str]:
    keys = (key for equal in rows for row in equal for key in row.indexed_keys(remote_key))
    return list(dict.fromkeys(keys))

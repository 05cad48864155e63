"""The rule engine driven by a plain connection, without the hub: index, tests, inquiries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from pgrealtime.changes import Row
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.evaluation import Evaluation, RowEvaluation
from pgrealtime.rules.engine.formula import RowVerdicts
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import Specialization, macro_values_at
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Scalar


@dataclass(eq=False)
class Asker:
    """A subscriber as a member of the index."""

    request: RuleRequest
    specialization: Specialization
    values: tuple[Scalar, ...]


def put(connection: psycopg.Connection, inquiry: Question) -> None:
    """Ask it, or its parts if it fails."""
    question = inquiry.sql_query()
    if question is None:
        return
    try:
        inquiry.accept(connection.execute(question.sql.encode(), question.params).fetchall())
    except psycopg.Error:
        for part in inquiry.split():
            put(connection, part)


def decided(
    connection: psycopg.Connection,
    index: PredicateIndex[Asker],
    rows: Sequence[Row],
    now: datetime,
    *,
    among: Sequence[Asker] | None = None,
    past: BeforeState | None = None,
) -> list[set[Asker]]:
    """Return, per row, whom the engine admits.

    Args:
        connection: Where Postgres is asked.
        index: The askers.
        rows: Images of one collection.
        now: What macros mean.
        among: Those to consider without the index; None is all, by the index.
        past: What was before the transaction that deleted the rows.
    """
    at = macro_values_at(now)
    cases: list[RowEvaluation[Asker]] = [
        RowEvaluation(RowVerdicts(row, frozenset(), at), past) for row in rows
    ]
    for case in cases:
        if among is None:
            case.evaluate_index(index)
        else:
            case.evaluate_members(among)
    deciding = Evaluation(cases, at)
    while inquiries := deciding.questions():
        for inquiry in inquiries:
            put(connection, inquiry)
        deciding.resume()
    return [set(case.hits) for case in cases]

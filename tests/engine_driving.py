"""The rule engine driven by a plain connection, without the hub: index, tests, inquiries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from pgrealtime.changes import Row
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language.parameter_values import macro_values_at
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
    evaluation: Evaluation[int, Asker] = Evaluation(macro_values_at(now))
    for number, row in enumerate(rows):
        evaluated: RowEvaluation[Asker] = RowEvaluation(
            row, frozenset(), evaluation.macro_values, past
        )
        evaluation.rows[number] = evaluated
        if among is None:
            evaluated.evaluate_index(index)
        else:
            evaluated.evaluate_members(among)
    while questions := evaluation.questions():
        for question in questions:
            put(connection, question)
        evaluation.resume()
    return [set(evaluation.hits(number)) for number in range(len(rows))]

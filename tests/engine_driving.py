"""Drives the rule engine with a plain connection, without the hub: index, tests, questions."""

from __future__ import annotations

from collections.abc import Collection as Sized
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from pgrealtime.changes import Row
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.sql.nodes import all_of
from pgrealtime.rules.sql.reference import ReferenceQuery, SqlQuery
from pgrealtime.rules.sql.row_images import Overlay, matching_rows_sql, with_overlays


@dataclass(eq=False)
class CallerMember:
    """A caller as a member of the index."""

    request: RuleRequest
    specialization: Specialization
    values: tuple[Scalar, ...]


def put(connection: psycopg.Connection, question: Question) -> None:
    """Answer a question, or its parts if the statement fails."""
    query = question.sql_query()
    if query is None:
        return
    try:
        question.accept(connection.execute(query.sql.encode(), query.params).fetchall())
    except psycopg.Error:
        for part in question.split():
            put(connection, part)


def query_before(
    query: ReferenceQuery, rows: Sequence[Row], now: datetime, overlays: Sequence[Overlay]
) -> SqlQuery | None:
    """Return the query on related tables as they were before a transaction.

    None if an old image lacks a column that is read: then nothing is admitted.
    """
    params = query.sql_query(rows, now).params
    made = with_overlays([part.condition for part in query.sql_predicates], overlays, params)
    if made is None:
        return None
    redirected, ctes = made
    table, columns = query.collection.table, query.column_names
    return SqlQuery(matching_rows_sql(table, columns, all_of(*redirected), ctes), params)


def evaluate_rows(
    connection: psycopg.Connection,
    index: PredicateIndex[CallerMember],
    rows: Sequence[Row],
    now: datetime,
    *,
    among: Sequence[CallerMember] | None = None,
    before_state: BeforeState | None = None,
) -> list[set[CallerMember]]:
    """Return, per row, the members that match.

    Args:
        connection: Answers the questions.
        index: The members.
        rows: Images of one collection.
        now: The time for macros.
        among: The members to test without the index; None is all, by the index.
        before_state: Related tables before the transaction that deleted the rows.
    """
    evaluation: Evaluation[int, CallerMember] = Evaluation(MacroValues(now))
    for number, row in enumerate(rows):
        evaluated: RowEvaluation[CallerMember] = RowEvaluation(
            row, frozenset(), evaluation.macro_values, before_state
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


def evaluate_in_process(
    matcher: Matcher,
    events: Sequence[Event],
    now: datetime,
    only_groups: Sized[Group] | None = None,
    *,
    has_remote_filter: bool = False,
) -> Evaluation[int, Group]:
    """Return an evaluation of events whose steps in the process are all done."""
    evaluation = matcher.start_evaluation(
        events, now, only_groups, has_remote_filter=has_remote_filter
    )
    evaluation.run_in_process(lambda: False)
    return evaluation

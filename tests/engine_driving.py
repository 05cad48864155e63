"""The rule engine driven by a plain connection, without the hub: index, tests, inquiries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from pgrealtime.changes import Row
from pgrealtime.rules.engine.batch_query import Inquiry
from pgrealtime.rules.engine.before_state import Past
from pgrealtime.rules.engine.evaluation import Case, Deciding
from pgrealtime.rules.engine.formula import Facts
from pgrealtime.rules.engine.index import Index
from pgrealtime.rules.engine.plan import Variant, moment
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.memory.compare import Scalar


@dataclass(eq=False)
class Asker:
    """A subscriber as a member of the index."""

    request: Request
    variant: Variant
    values: tuple[Scalar, ...]


def put(connection: psycopg.Connection, inquiry: Inquiry) -> None:
    """Ask it, or its parts if it fails."""
    question = inquiry.question()
    if question is None:
        return
    try:
        inquiry.take(connection.execute(question.sql.encode(), question.params).fetchall())
    except psycopg.Error:
        for part in inquiry.split():
            put(connection, part)


def decided(
    connection: psycopg.Connection,
    index: Index[Asker],
    rows: Sequence[Row],
    now: datetime,
    *,
    among: Sequence[Asker] | None = None,
    past: Past | None = None,
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
    at = moment(now)
    cases: list[Case[Asker]] = [Case(Facts(row, frozenset(), at), past) for row in rows]
    for case in cases:
        if among is None:
            case.search(index)
        else:
            case.consider(among)
    deciding = Deciding(cases, at)
    while inquiries := deciding.inquiries():
        for inquiry in inquiries:
            put(connection, inquiry)
        deciding.resume()
    return [set(case.hits) for case in cases]

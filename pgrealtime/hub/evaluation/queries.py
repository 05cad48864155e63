"""The interface through which the hub queries PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.hub.events.event import Event
from pgrealtime.rule_queries.live_rows import LiveRow
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.session import ReadSessionFactory
from pgrealtime.rule_queries.slow_queries import TimeBudget


class HubQueries(ReadSessionFactory, Protocol):
    """The queries of the hub, its evaluator and its enricher (``rule_queries.executor``)."""

    async def fetch_snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``."""
        ...

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        """Answer an evaluation's questions, round by round, until none is left or the budget spent.

        Returns the names of the collections whose questions could not be asked at all.
        """
        ...

    async def verify_assumptions(self, assumptions: CatalogAssumptions) -> bool:
        """Return whether the catalogue still confirms what rows of the stream are taken for.

        Raises ``DatabaseUnreachableError``.
        """
        ...

    async def fetch_live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return the columns that the events' rows lack, as the tables hold them now.

        By collection name and id; and the names of the collections that could not be read.
        """
        ...

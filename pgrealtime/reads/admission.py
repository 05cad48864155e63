"""Decides whether the user of a token is admitted by the collection's ``auth_rule``.

``auth.authenticator`` calls it for each request with a token of a user who has a row.
"""

from datetime import UTC, datetime

import psycopg
from psycopg_pool import PoolTimeout

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.rule_queries.session import ReadSessionFactory
from pgrealtime.rules.engine.admission import AdmissionRules
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameters import MacroValues


class Admission:
    """Evaluates the rules, with PostgreSQL where a rule reads other rows."""

    def __init__(self, sessions: ReadSessionFactory, collections: Collections) -> None:
        self._sessions = sessions
        self.rules = AdmissionRules(collections)

    def replace_collections(self, collections: Collections) -> None:
        """Use other collections from now on."""
        self.rules = AdmissionRules(collections)

    def columns_of(self, collection: Collection) -> tuple[str, ...]:
        """Return the columns that a row must have to be decided about."""
        return self.rules.columns_of(collection)

    async def admits(self, collection: Collection, row: Row) -> bool:
        """Return whether a user is admitted.

        Raises:
            DatabaseUnreachableError: The rule can't be evaluated now.
        """
        rules = self.rules
        verdict = rules.verdict(collection, row)
        if verdict is not None:
            return verdict
        predicate = rules.predicate_of(collection)
        if predicate is None:  # pragma: no cover (decided above)
            return False
        evaluation: Evaluation[str, BoundPredicate] = Evaluation(MacroValues(datetime.now(UTC)))
        evaluation.add("", collection, row, [predicate])
        try:
            async with self._sessions.read_session(frozenset()) as session:
                await session.answer_questions(evaluation)
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            raise DatabaseUnreachableError("the rule can't be evaluated now") from error
        return predicate in evaluation.hits("")

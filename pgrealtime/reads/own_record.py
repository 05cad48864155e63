"""Whether somebody may sign in, and the record that they are answered with.

The record is made of a row as an event's record is.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from pgrealtime.auth.principal import Caller
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.errors import DatabaseUnreachableError, RuleError
from pgrealtime.expand.load import RelatedRecordLoader
from pgrealtime.expand.node import RecordNode, RecordVersion
from pgrealtime.expand.plan import ExpandCompiler
from pgrealtime.records.encode import View, compile_encoder
from pgrealtime.rule_queries.session import ReadSessionFactory
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameter_values import macro_values_at
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest

log = structlog.get_logger(__name__)

_MAX_PLANS = 64
"""Kept texts of ``expand``: in an URL they can be long."""


class OwnRecordRenderer:
    """Makes people's own records, with the related ones they ask for and may see.

    Args:
        sessions: Where to ask.
        collections: What there is.
        nulls: How NULL is shown.
        hidden: Who may expand a hidden relation.
    """

    def __init__(
        self,
        sessions: ReadSessionFactory,
        collections: Collections,
        *,
        nulls: Literal["null", "zero"],
        hidden: HiddenFieldsMode = "strict",
    ) -> None:
        self._sessions = sessions
        self._hidden: HiddenFieldsMode = hidden
        self._nulls: Literal["null", "zero"] = nulls
        self.replace_collections(collections)

    def replace_collections(self, collections: Collections) -> None:
        """Take other collections."""
        self._collections = collections
        self._compiler = RuleCompiler(collections)
        self._expand_compiler = ExpandCompiler(
            collections, self._compiler, hidden=self._hidden, max_plans=_MAX_PLANS
        )
        self._related_loader = RelatedRecordLoader(self._sessions, collections, self._render_node)

    async def may_sign_in(
        self,
        collection: Collection,
        row: Row,
        caller: Caller,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        context: str,
    ) -> bool:
        """Return whether the collection's ``auth_rule`` of now lets somebody in.

        Args:
            collection: Of the record; another may have come while the password was checked.
            row: The whole row.
            caller: Who asks for it, as the request's own token says.
            query: Of the request's URL.
            headers: Of the request, their names in snake case.
            context: What rules call such a request: ``password``, or ``default`` for a refresh.

        Raises:
            DatabaseUnreachableError: The rule can't be asked now.
        """
        current = self._collections.get(collection.name)
        if current is None or current.auth_rule == "":
            return current is not None
        asked = RuleRequest(
            principal=caller.principal, query=query, headers=headers, context=context, method="POST"
        )
        try:
            bound = self._compiler.bind_caller(
                current, current.auth_rule, asked, caller.own_row, is_filtered=False
            )
        except RuleError as error:
            reason = error.message
            log.error("rule.error", collection=current.name, reason=reason)  # noqa: TRY400 (the rule's fault, not ours)
            return False
        if isinstance(bound, DenyAll):
            return False
        place: RecordVersion = current.name, "", 0
        looking: Evaluation[RecordVersion, BoundPredicate] = Evaluation(
            macro_values_at(datetime.now(UTC))
        )
        looking.add(place, current, row, [bound])
        try:
            async with self._sessions.read_session(frozenset()) as reading:
                await reading.answer_questions(looking)
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            raise DatabaseUnreachableError("the rule can't be asked now") from error
        return bound in looking.hits(place)

    async def render_record(
        self,
        collection: Collection,
        row: Row,
        owner: Caller,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str],
    ) -> bytes:
        """Return the JSON of somebody's record, the e-mail address in it whatever its visibility.

        Unlike in PocketBase the body of the login isn't there for rules to see.

        Args:
            collection: Of the record.
            row: The whole row.
            owner: Whose it is, and who looks at what ``query["expand"]`` asks for.
            query: Of the request's URL.
            headers: Of the request, their names in snake case.
        """
        view = View(sees_email=True)
        if self._collections.get(collection.name) is not collection:
            # Other collections came while the password was checked.
            return compile_encoder(collection, nulls=self._nulls, view=view)(row)
        request = RuleRequest(
            principal=owner.principal, query=query, headers=headers, method="POST"
        )
        is_expanded = "expand" in query
        viewer = (
            self._expand_compiler.compile_expand(collection, request, owner.own_row)
            if is_expanded
            else None
        )
        related, expand = await self._related_loader.load_for_row(collection, row, viewer)
        return compile_encoder(collection, nulls=self._nulls, view=view)(row, related, expand)

    def _render_node(self, node: RecordNode, view: View, expand: bytes | None) -> bytes:
        show = compile_encoder(node.collection, nulls=self._nulls, view=view)
        return show(node.row, node.junction_ids, expand)

"""Decides whether an account may sign in, and renders the record that the answer holds.

The login routes call it. The record is rendered from its row as an event's record is.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from pgrealtime.auth.principal import Caller
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.errors import DatabaseUnreachableError, RuleError
from pgrealtime.expand.load import RelatedRecordLoader
from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import ExpandCompiler
from pgrealtime.records.encode import Nulls, View, compile_encoder
from pgrealtime.rule_queries.session import ReadSessionFactory
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest

log = structlog.get_logger(__name__)


class OwnRecordRenderer:
    """Renders accounts' own records, with the related records that they expand and may see.

    ``nulls`` says how NULL is shown, ``hidden`` whether clients may expand a hidden relation.
    """

    def __init__(
        self,
        sessions: ReadSessionFactory,
        collections: Collections,
        *,
        nulls: Nulls,
        hidden: HiddenFieldsMode = "strict",
    ) -> None:
        self._sessions = sessions
        self._hidden: HiddenFieldsMode = hidden
        self._nulls: Nulls = nulls
        self.replace_collections(collections)

    def replace_collections(self, collections: Collections) -> None:
        """Use other collections from now on."""
        self._collections = collections
        self._compiler = RuleCompiler(collections)
        self._expand_compiler = ExpandCompiler(collections, self._compiler, hidden=self._hidden)
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
        """Return whether the collection's present ``auth_rule`` admits an account.

        Args:
            collection: The account's; it may have been replaced while the password was checked.
            row: The account's whole row.
            caller: The caller by the request's own token.
            query: The URL's query.
            headers: Their names in snake case.
            context: ``@request.context``: ``password``, or ``default`` for a refresh.

        Raises:
            DatabaseUnreachableError: The rule can't be evaluated now.
        """
        current = self._collections.get(collection.name)
        if current is None or current.auth_rule == "":
            return current is not None
        request = RuleRequest(
            principal=caller.principal, query=query, headers=headers, context=context, method="POST"
        )
        try:
            bound = self._compiler.bind_caller(
                current, current.auth_rule, request, caller.own_row, is_filtered=False
            )
        except RuleError as error:
            reason = error.message
            log.error("rule.error", collection=current.name, reason=reason)  # noqa: TRY400 (the rule's fault, not ours)
            return False
        return not isinstance(bound, DenyAll) and await self._matches(current, row, bound)

    async def _matches(self, collection: Collection, row: Row, bound: BoundPredicate) -> bool:
        version, macro_values = collection.name, MacroValues(datetime.now(UTC))
        evaluation: Evaluation[str, BoundPredicate] = Evaluation(macro_values)
        evaluation.add(version, collection, row, [bound])
        try:
            async with self._sessions.read_session(frozenset()) as session:
                await session.answer_questions(evaluation)
        except (psycopg.Error, PoolTimeout, TimeoutError) as error:
            raise DatabaseUnreachableError("the rule can't be evaluated now") from error
        return bound in evaluation.hits(version)

    async def render_record(
        self,
        collection: Collection,
        row: Row,
        owner: Caller,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str],
    ) -> bytes:
        """Return the JSON of an account's record, with its e-mail address whatever its visibility.

        ``query["expand"]`` shows what the account may see; ``owner`` is the account as a caller.
        Unlike in PocketBase, rules of expanded records can't read the body of the login.
        """
        encode = compile_encoder(collection, nulls=self._nulls, view=View(sees_email=True))
        if self._collections.get(collection.name) is not collection:
            return encode(row)  # the collections were replaced while the password was checked
        request = RuleRequest(
            principal=owner.principal, query=query, headers=headers, method="POST"
        )
        viewer = self._expand_compiler.compile_expand(collection, request, owner.own_row)
        related, expand = await self._related_loader.load_for_row(collection, row, viewer)
        return encode(row, related, expand)

    def _render_node(self, node: RecordNode, view: View, expand: bytes | None) -> bytes:
        show = compile_encoder(node.collection, nulls=self._nulls, view=view)
        return show(node.row, node.junction_ids, expand)

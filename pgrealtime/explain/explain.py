"""Explains whether a caller would receive an event of a record on a topic, and why.

``cli.explain`` calls it. The verdict is the rule engine's, as in the service, and must equal that
of the reference query. Each part of a rule is also evaluated as a rule of its own. All statements
run in one read-only snapshot. ``read`` explains whether the caller would find the record.
"""

from contextlib import suppress
from dataclasses import dataclass

import psycopg

from pgrealtime.auth.principal import Guest
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.load import read_configured_catalog
from pgrealtime.collections.model import Collection
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError, RuleError
from pgrealtime.explain import text
from pgrealtime.explain.caller import CallerSpec, resolve_caller
from pgrealtime.explain.parts import RuleOutcome, labelled_lines
from pgrealtime.explain.read import ReadExplainer
from pgrealtime.explain.record import RecordExplainer
from pgrealtime.explain.session import open_explain_session
from pgrealtime.explain.text import ConditionVerdict
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.resolve import filter_text, resolve_filter
from pgrealtime.rules.rule_set import rule_problems
from pgrealtime.rules.sql.reference import ReferenceQuery, auth_collection_of, reference_query


@dataclass(frozen=True, slots=True)
class Explanation:
    """The verdict and the lines that explain it."""

    is_delivered: bool
    """Of a read: whether the record is found."""
    lines: tuple[str, ...]
    """Safe to print on a terminal; the last one is the verdict."""


async def explain_delivery(
    config: Config,
    caller_spec: CallerSpec,
    topic: str,
    record_id: str | None,
    *,
    with_sql: bool = False,
) -> Explanation:
    """Evaluate a record as it is now for a caller's subscription.

    The topic is as submitted, with its options; the id is None if it names the record. ``with_sql``
    adds the statements to the lines, without the values of hidden fields.

    Raises:
        ConfigError: The configuration is invalid.
        DatabaseUnreachableError: The database doesn't answer.
        AuthError: Code ``user_unknown``: the collection or the user does not exist.
        SetupError: A table can't be read.
    """
    return await _explain(config, caller_spec, topic, record_id, is_read=False, with_sql=with_sql)


async def explain_read(
    config: Config,
    caller_spec: CallerSpec,
    topic: str,
    record_id: str | None,
    *,
    with_sql: bool = False,
) -> Explanation:
    """Look for a record as it is now in a caller's list; if the topic names it, view it.

    The topic's options are the query of the request. Raises as ``explain_delivery``.
    """
    return await _explain(config, caller_spec, topic, record_id, is_read=True, with_sql=with_sql)


async def _explain(
    config: Config,
    caller_spec: CallerSpec,
    topic: str,
    record_id: str | None,
    *,
    is_read: bool,
    with_sql: bool,
) -> Explanation:
    # A command must fail at once where the service would wait for its database.
    changed = {"wait_for": 0.0}
    if is_read:
        changed["statement_timeout"] = config.reads.statement_timeout
    database = config.database.model_copy(update=changed)
    async with open_query_pool(database) as pool:
        catalog = await read_configured_catalog(config, pool)
        collections = build_collections(
            config.collections,
            catalog,
            config.auth.claim_names,
            is_strict=config.records.hidden == "strict",
        )
        if problems := tuple(rule_problems(collections)):
            raise ConfigError(problems)
        with suppress(psycopg.Error):  # reading the record reports it
            await pool.configure_row_security(reachable_tables(collections).values())
        caller, caller_lines = await resolve_caller(config, collections, pool, caller_spec)
        parsed_topic = parse_topic(topic)
        wanted_id = parsed_topic.record_id if record_id is None else record_id
        lines = [*labelled_lines("caller", *caller_lines)]
        if isinstance(caller.principal, Guest) and not config.auth.allow_guests:
            refused = "read" if is_read else "subscribe"
            reason = f"guests may not {refused} (auth.allow_guests)"
        elif is_read and not config.reads.enabled:
            reason = "nothing can be read (reads.enabled)"
        else:
            make_explainer = ReadExplainer if is_read else _DeliveryExplainer
            async with open_explain_session(pool) as session:
                explainer = make_explainer(
                    session, collections, caller, parsed_topic, lines, with_sql=with_sql
                )
                reason = await explainer.explain_record(wanted_id or "")
    positive = "found" if is_read else "delivered"
    verdict = f"not {positive}: {reason}" if reason else positive
    return Explanation(not reason, tuple(map(text.escape_unprintable, (*lines, verdict))))


class _DeliveryExplainer(RecordExplainer):
    """Explains whether the caller receives events of the record on the topic."""

    label = topic_noun = "topic"
    rule_context = "realtime"

    def _find_collection(self, name_or_id: str) -> Collection | None:
        return self._collections.find(name_or_id)

    def _no_collection(self, name: str) -> tuple[list[str], str]:
        del name
        accepted = "such a subscription is accepted and receives nothing, as in PocketBase"
        return [accepted], "the topic names no collection"

    def _collection_refusal(self, collection: Collection) -> str:
        if collection.is_streamed:
            return ""
        return f'"{collection.name}" can only be read (stream: false)'

    async def _explain_row(self, collection: Collection, row: Row, record_id: str) -> str:
        """Evaluate by parts, with the reference query and with the engine; report a difference."""
        del record_id  # the engine gets the row
        is_whole = self._topic.record_id is None
        key = "list_rule" if is_whole else "view_rule"
        rule = collection.list_rule if is_whole else collection.view_rule
        made = reference_query(self._collections, collection, rule, self._request)
        self._parts.add_lines("record", *text.row_lines(collection, row, made))
        rule_verdict, rule_reason = await self._parts.explain_rule(collection, row, key, rule)
        filter_verdict, filter_reason = await self._explain_filter(collection, row)
        plain = await self._reference_verdict(made, row)
        engine = await self._is_delivered_by_engine(collection, row)
        self._parts.add_lines("note", text.CAVEAT)
        parts = bool(rule_verdict.value and filter_verdict.value)
        failure = plain.failure or rule_verdict.failure or filter_verdict.failure
        if not failure and {bool(plain.value), parts} != {engine}:
            lines = text.disagreement_lines(plain=bool(plain.value), engine=engine, parts=parts)
            self._parts.add_lines("BUG", *lines)
        if engine:
            return ""
        reasons = filter(None, (rule_reason, filter_reason))
        return "; ".join(reasons) or plain.failure or "see BUG above"

    async def _explain_filter(self, collection: Collection, row: Row) -> RuleOutcome:
        wanted = self._topic.query.get("filter", "")
        if not wanted:
            return ConditionVerdict(True), ""
        self._parts.add_lines("filter", *wanted.splitlines())
        auth = auth_collection_of(self._collections, self._request)
        try:
            filter_text(self._topic.query, is_superuser=self._is_superuser)
            resolve_filter(
                wanted, self._collections, collection, auth, is_superuser=self._is_superuser
            )
        except RuleError as error:
            self._lines += text.refusal_lines(wanted, error)
            return ConditionVerdict(False), f"the filter is refused: {error.message}"
        return await self._parts.explain_parts(collection, row, wanted, is_filter=True)

    async def _reference_verdict(
        self, compiled: AdmitAll | DenyAll | ReferenceQuery, row: Row
    ) -> ConditionVerdict:
        """Return the reference query's verdict on rule and filter together."""
        match compiled:
            case AdmitAll():
                return ConditionVerdict(True)
            case DenyAll():
                return ConditionVerdict(False)
            case ReferenceQuery():
                question = compiled.sql_query([row], self._parts.now)
                if self._with_sql:
                    self._parts.add_lines("sql", *text.sql_lines(question, compiled))
                rows = await self._session.fetch_rows(question)
                return rows if isinstance(rows, ConditionVerdict) else ConditionVerdict(bool(rows))

    async def _is_delivered_by_engine(self, collection: Collection, row: Row) -> bool:
        """Return the rule engine's verdict, which decides in the service."""
        bound = Matcher(self._collections).bind_topic(
            collection, self._topic, self._caller.principal, self._caller.own_row
        )
        if isinstance(bound, DenyAll):
            return False
        is_whole = self._topic.record_id is None
        evaluation: Evaluation[int, BoundPredicate] = Evaluation(MacroValues(self._parts.now))
        evaluation.add(0, collection, row, () if is_whole else [bound])
        if is_whole:
            index: PredicateIndex[BoundPredicate] = PredicateIndex()
            index.add(bound)
            evaluation.rows[0].evaluate_index(index)
        await self._session.answer_questions(evaluation)
        return bound in evaluation.hits(0)

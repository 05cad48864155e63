"""Explains whether a caller would receive an event of a record on a topic, and why.

``cli.explain`` calls ``explain``. The verdict is the rule engine's, as in the service, and must
equal that of the reference query. Each part of a rule is also evaluated as a rule of its own. All
statements run in one read-only snapshot.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

import psycopg

from pgrealtime.auth.principal import Caller, Guest, Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.load import read_configured_catalog
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError, RuleError
from pgrealtime.explain import text
from pgrealtime.explain.caller import CallerSpec, resolve_caller
from pgrealtime.explain.session import ExplainSession, open_explain_session
from pgrealtime.explain.text import ConditionVerdict, EvaluatedFragment
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.protocol.topic import Topic, parse_topic
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import filter_text, resolve_filter
from pgrealtime.rules.rule_set import rule_problems
from pgrealtime.rules.sql.breakdown import Clause, RuleFragment, fragment_queries, split_rule
from pgrealtime.rules.sql.reference import ReferenceQuery, auth_collection_of, reference_query
from pgrealtime.spelling import nearest_name


@dataclass(frozen=True, slots=True)
class Explanation:
    """The verdict and the lines that explain it."""

    is_delivered: bool
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
    # A command must fail at once where the service would wait for its database.
    database = config.database.model_copy(update={"wait_for": 0.0})
    async with open_query_pool(database) as pool:
        catalog = await read_configured_catalog(config, pool)
        collections = build_collections(
            config.collections,
            catalog,
            config.auth.claim_names,
            hides_addresses=config.records.hidden == "strict",
        )
        if problems := tuple(rule_problems(collections)):
            raise ConfigError(problems)
        with suppress(psycopg.Error):  # reading the record reports it
            await pool.configure_row_security(reachable_tables(collections).values())
        caller, caller_lines = await resolve_caller(config, collections, pool, caller_spec)
        parsed_topic = parse_topic(topic)
        wanted_id = parsed_topic.record_id if record_id is None else record_id
        lines = [*_labelled_lines("caller", *caller_lines)]
        if isinstance(caller.principal, Guest) and not config.auth.allow_guests:
            reason = "guests may not subscribe (auth.allow_guests)"
        else:
            async with open_explain_session(pool) as session:
                explainer = _Explainer(
                    session, collections, caller, parsed_topic, lines, with_sql=with_sql
                )
                reason = await explainer.explain_record(wanted_id or "")
    verdict = f"not delivered: {reason}" if reason else "delivered"
    return Explanation(not reason, tuple(map(text.escape_unprintable, (*lines, verdict))))


def _labelled_lines(label: str, *lines: str) -> Iterator[str]:
    for n, line in enumerate(lines):
        yield f"{'' if n else label:<10}{line}"


_RuleOutcome: TypeAlias = tuple[ConditionVerdict, str]
"""The verdict of the rule or the filter, evaluated by parts; why it isn't TRUE, or empty."""


class _Explainer:
    """Explains whether one caller receives events of one record on one topic, in lines."""

    def __init__(
        self,
        session: ExplainSession,
        collections: Collections,
        caller: Caller,
        topic: Topic,
        lines: list[str],
        *,
        with_sql: bool,
    ) -> None:
        self._session = session
        self._lines = lines
        self._collections = collections
        self._caller = caller
        self._topic = topic
        self._with_sql = with_sql
        self._now = datetime.now(UTC)
        self._request = RuleRequest(
            principal=caller.principal, query=topic.query, headers=topic.headers
        )

    async def explain_record(self, record_id: str) -> str:
        """Return why the caller doesn't receive the record's events; empty if it does."""
        topic = self._topic
        collection = self._collections.find(topic.collection_name_or_id)
        if collection is None:
            return self._explain_no_collection()
        self._add_lines("topic", *text.topic_lines(topic, collection))
        row = await self._session.fetch_row_by_id(collection, record_id)
        if row is None:
            missing = f'there is no row whose {collection.key.name} is "{record_id}" now'
            self._add_lines("record", missing)
            return f'"{collection.name}" has no record "{record_id}"'
        found_id = row[collection.key.name]
        if topic.record_id not in {None, found_id}:
            self._add_lines("record", f"{collection.name}/{found_id}")
            return f'the topic is for record "{topic.record_id}", not for "{found_id}"'
        return await self._explain_row(collection, row)

    def _explain_no_collection(self) -> str:
        name = self._topic.collection_name_or_id
        suggestion = nearest_name(name, self._collections)
        self._add_lines(
            "topic",
            f'there is no collection "{name}"'
            + (f'; perhaps "{suggestion}"' if suggestion else ""),
            "such a subscription is accepted and receives nothing, as in PocketBase",
        )
        return "the topic names no collection"

    async def _explain_row(self, collection: Collection, row: Row) -> str:
        """Evaluate by parts, with the reference query and with the engine; report a difference."""
        is_whole = self._topic.record_id is None
        key = "list_rule" if is_whole else "view_rule"
        rule = collection.list_rule if is_whole else collection.view_rule
        made = reference_query(self._collections, collection, rule, self._request)
        self._add_lines("record", *text.row_lines(collection, row, made))
        rule_verdict, rule_reason = await self._explain_rule(collection, row, key, rule)
        filter_verdict, filter_reason = await self._explain_filter(collection, row)
        plain = await self._reference_verdict(made, row)
        engine = await self._is_delivered_by_engine(collection, row)
        self._add_lines("note", text.CAVEAT)
        parts = bool(rule_verdict.value and filter_verdict.value)
        failure = plain.failure or rule_verdict.failure or filter_verdict.failure
        if not failure and {bool(plain.value), parts} != {engine}:
            lines = text.disagreement_lines(plain=bool(plain.value), engine=engine, parts=parts)
            self._add_lines("BUG", *lines)
        if engine:
            return ""
        reasons = filter(None, (rule_reason, filter_reason))
        return "; ".join(reasons) or plain.failure or "see BUG above"

    async def _explain_rule(
        self, collection: Collection, row: Row, key: str, rule: str | None
    ) -> _RuleOutcome:
        passes = isinstance(self._caller.principal, Superuser)
        self._add_lines(key, *text.rule_lines(rule, is_superuser=passes))
        if passes or rule == "":
            return ConditionVerdict(True), ""
        if rule is None:
            return ConditionVerdict(False), f"{key} is missing: superusers only"
        return await self._explain_parts(collection, row, rule, is_filter=False)

    async def _explain_filter(self, collection: Collection, row: Row) -> _RuleOutcome:
        wanted = self._topic.query.get("filter", "")
        if not wanted:
            return ConditionVerdict(True), ""
        self._add_lines("filter", *wanted.splitlines())
        is_superuser = isinstance(self._caller.principal, Superuser)
        auth = auth_collection_of(self._collections, self._request)
        try:
            filter_text(self._topic.query, is_superuser=is_superuser)
            resolve_filter(wanted, self._collections, collection, auth, is_superuser=is_superuser)
        except RuleError as error:
            self._lines += text.refusal_lines(wanted, error)
            return ConditionVerdict(False), f"the filter is refused: {error.message}"
        return await self._explain_parts(collection, row, wanted, is_filter=True)

    async def _explain_parts(
        self, collection: Collection, row: Row, rule: str, *, is_filter: bool
    ) -> _RuleOutcome:
        whole = split_rule(rule)
        evaluated = await self._evaluate_fragment(collection, row, whole, is_filter=is_filter)
        self._lines += text.fragment_lines(evaluated, "  ")
        if evaluated.verdict.value:
            return evaluated.verdict, ""
        deciding = text.describe_fragments(text.deciding_fragments(evaluated))
        return evaluated.verdict, f"the filter: {deciding}" if is_filter else deciding

    async def _evaluate_fragment(
        self, collection: Collection, row: Row, fragment: RuleFragment, *, is_filter: bool
    ) -> EvaluatedFragment:
        """Evaluate a part by itself, and the fragments that it consists of."""
        sides: tuple[tuple[str, str], ...] = ()
        try:
            made = fragment_queries(
                fragment,
                self._collections,
                collection,
                request=self._request,
                row=row,
                now=self._now,
                is_filter=is_filter,
            )
        except RuleError as error:
            truth = ConditionVerdict(None, f"can't be evaluated for this caller: {error.message}")
        else:
            truth_query = made.reference_query.truth_query(row, self._now)
            truth = await self._session.fetch_verdict(truth_query)
            sides = tuple(
                [(s.text, await self._session.format_operand(s)) for s in made.operand_values]
            )
        if isinstance(fragment, Clause):
            return EvaluatedFragment(
                display_text=fragment.text(" "), verdict=truth, operand_values=sides
            )
        parts = [
            await self._evaluate_fragment(collection, row, part, is_filter=is_filter)
            for part in fragment.fragments
        ]
        return EvaluatedFragment(
            display_text=fragment.text(" "),
            verdict=truth,
            is_conjunction=fragment.is_conjunction,
            fragments=tuple(parts),
        )

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
                question = compiled.sql_query([row], self._now)
                if self._with_sql:
                    self._add_lines("sql", *text.sql_lines(question, compiled))
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
        evaluation: Evaluation[int, BoundPredicate] = Evaluation(MacroValues(self._now))
        evaluation.add(0, collection, row, () if is_whole else [bound])
        if is_whole:
            index: PredicateIndex[BoundPredicate] = PredicateIndex()
            index.add(bound)
            evaluation.rows[0].evaluate_index(index)
        await self._session.answer_questions(evaluation)
        return bound in evaluation.hits(0)

    def _add_lines(self, label: str, *lines: str) -> None:
        self._lines += _labelled_lines(label, *lines)

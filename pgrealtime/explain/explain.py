"""Explains whether a caller would receive an event of a record on a topic, and why.

``cli.explain`` calls ``explain``. The verdict is the rule engine's, as in the service, and must
equal that of the reference query. Each part of a rule is also evaluated as a rule of its own. All
statements run in one read-only snapshot.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from pgrealtime.auth.principal import Caller, Guest, Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.load import read_configured_catalog
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError, RuleError
from pgrealtime.explain.caller import CallerSpec, resolve_caller
from pgrealtime.explain.session import ExplainSession, open_explain_session
from pgrealtime.explain.text import (
    CAVEAT,
    ConditionVerdict,
    EvaluatedFragment,
    deciding_fragments,
    describe_fragments,
    disagreement_lines,
    escape_unprintable,
    fragment_lines,
    refusal_lines,
    row_lines,
    rule_lines,
    sql_lines,
    topic_lines,
)
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.protocol.topic import Topic, parse_topic
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import filter_text, resolve_filter
from pgrealtime.rules.language.sqlite_values import Scalar
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

    Args:
        config: Configuration of the service.
        caller_spec: The subscriber.
        topic: As submitted, with its options.
        record_id: Id of the record; None if the topic names it.
        with_sql: Whether the lines include the statements, without the values of hidden fields.

    Raises:
        ConfigError: The configuration is invalid.
        DatabaseUnreachableError: The database doesn't answer.
        AuthError: Code ``user_unknown``: the collection or the user does not exist.
        SetupError: A table can't be read.
    """
    # A command must fail at once where the service would wait for its database.
    database = config.database.model_copy(update={"wait_for": 0.0})
    async with open_query_pool(database) as pool:
        collections = build_collections(
            config.collections, await read_configured_catalog(config, pool)
        )
        if problems := tuple(rule_problems(collections)):
            raise ConfigError(problems)
        with suppress(psycopg.Error):  # reading the record reports it
            await pool.configure_row_security(reachable_tables(collections).values())
        caller, lines = await resolve_caller(config, collections, pool, caller_spec)
        parsed_topic = parse_topic(topic)
        wanted_id = parsed_topic.record_id if record_id is None else record_id
        explainer = _Explainer(collections, caller, parsed_topic, with_sql=with_sql)
        explainer.lines = list(_labelled_lines("caller", *lines))
        if isinstance(caller.principal, Guest) and not config.auth.allow_guests:
            reason = "guests may not subscribe (auth.allow_guests)"
        else:
            async with open_explain_session(pool) as session:
                reason = await explainer.explain_record(session, wanted_id or "")
    verdict = f"not delivered: {reason}" if reason else "delivered"
    return Explanation(not reason, tuple(map(escape_unprintable, (*explainer.lines, verdict))))


def _labelled_lines(label: str, *lines: str) -> Iterator[str]:
    for n, line in enumerate(lines):
        yield f"{'' if n else label:<10}{line}"


@dataclass(frozen=True, eq=False)
class _IndexMember:
    """The subscriber as a member of the index."""

    specialization: Specialization
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class _RuleOutcome:
    """The verdict of the rule or the filter, evaluated by parts."""

    verdict: ConditionVerdict
    reason: str = ""
    """Why the verdict is not TRUE; empty if it is."""


def _rule_outcome(evaluated: EvaluatedFragment, prefix: str = "") -> _RuleOutcome:
    admits = evaluated.verdict.value
    return _RuleOutcome(
        evaluated.verdict,
        "" if admits else prefix + describe_fragments(deciding_fragments(evaluated)),
    )


class _Explainer:
    """Explains whether one caller receives events of one record on one topic.

    Attributes:
        lines: The lines so far.
    """

    def __init__(
        self, collections: Collections, caller: Caller, topic: Topic, *, with_sql: bool
    ) -> None:
        self.lines: list[str] = []
        self._collections = collections
        self._caller = caller
        self._topic = topic
        self._with_sql = with_sql
        self._now = datetime.now(UTC)
        self._request = RuleRequest(
            principal=caller.principal, query=topic.query, headers=topic.headers
        )

    async def explain_record(self, session: ExplainSession, record_id: str) -> str:
        """Return why the caller doesn't receive the record's events; empty if it does."""
        topic = self._topic
        collection = self._collections.find(topic.collection_name_or_id)
        if collection is None:
            return self._explain_no_collection()
        self._add_lines("topic", *topic_lines(topic, collection))
        row = await session.fetch_row_by_id(collection, record_id)
        if row is None:
            self._add_lines(
                "record", f'there is no row whose {collection.key.name} is "{record_id}" now'
            )
            return f'"{collection.name}" has no record "{record_id}"'
        found_id = row[collection.key.name]
        if topic.record_id not in {None, found_id}:
            self._add_lines("record", f"{collection.name}/{found_id}")
            return f'the topic is for record "{topic.record_id}", not for "{found_id}"'
        return await self._explain_row(session, collection, row)

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

    async def _explain_row(self, session: ExplainSession, collection: Collection, row: Row) -> str:
        """Evaluate by parts, with the reference query and with the engine; report a difference."""
        is_whole = self._topic.record_id is None
        key = "list_rule" if is_whole else "view_rule"
        rule = collection.list_rule if is_whole else collection.view_rule
        made = reference_query(self._collections, collection, rule, self._request)
        self._add_lines("record", *row_lines(collection, row, made))
        by_parts = [
            await self._explain_rule(session, collection, row, key, rule),
            await self._explain_filter(session, collection, row),
        ]
        plain = await self._reference_verdict(session, made, row)
        engine = await self._is_delivered_by_engine(session, collection, row)
        self._add_lines("note", CAVEAT)
        verdicts = [
            plain,
            ConditionVerdict(engine),
            *(part.verdict for part in by_parts if part.verdict.failure),
        ]
        parts = all(part.verdict.value for part in by_parts)
        if not any(verdict.failure for verdict in verdicts) and {bool(plain.value), parts} != {
            engine
        }:
            self._add_lines(
                "BUG", *disagreement_lines(plain=bool(plain.value), engine=engine, parts=parts)
            )
        if engine:
            return ""
        return "; ".join(p.reason for p in by_parts if p.reason) or plain.failure or "see BUG above"

    async def _explain_rule(
        self, session: ExplainSession, collection: Collection, row: Row, key: str, rule: str | None
    ) -> _RuleOutcome:
        """Evaluate the collection's rule by its parts."""
        passes = isinstance(self._caller.principal, Superuser)
        self._add_lines(key, *rule_lines(rule, is_superuser=passes))
        if passes or rule == "":
            return _RuleOutcome(ConditionVerdict(True))
        if rule is None:
            return _RuleOutcome(ConditionVerdict(False), f"{key} is missing: superusers only")
        evaluated = await self._evaluate_fragment(
            session, collection, row, split_rule(rule), is_filter=False
        )
        self.lines += fragment_lines(evaluated, "  ")
        return _rule_outcome(evaluated)

    async def _explain_filter(
        self, session: ExplainSession, collection: Collection, row: Row
    ) -> _RuleOutcome:
        """Evaluate the client's filter by its parts."""
        text = self._topic.query.get("filter", "")
        if not text:
            return _RuleOutcome(ConditionVerdict(True))
        self._add_lines("filter", *text.splitlines())
        is_superuser = isinstance(self._caller.principal, Superuser)
        auth = auth_collection_of(self._collections, self._request)
        try:
            filter_text(self._topic.query, is_superuser=is_superuser)
            resolve_filter(text, self._collections, collection, auth, is_superuser=is_superuser)
        except RuleError as error:
            self.lines += refusal_lines(text, error)
            return _RuleOutcome(ConditionVerdict(False), f"the filter is refused: {error.message}")
        evaluated = await self._evaluate_fragment(
            session, collection, row, split_rule(text), is_filter=True
        )
        self.lines += fragment_lines(evaluated, "  ")
        return _rule_outcome(evaluated, "the filter: ")

    async def _evaluate_fragment(
        self,
        session: ExplainSession,
        collection: Collection,
        row: Row,
        fragment: RuleFragment,
        *,
        is_filter: bool,
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
            truth = await session.fetch_verdict(made.reference_query.truth_query(row, self._now))
            sides = tuple(
                [(side.text, await session.format_operand(side)) for side in made.operand_values]
            )
        if isinstance(fragment, Clause):
            return EvaluatedFragment(
                display_text=fragment.text(" "), verdict=truth, operand_values=sides
            )
        parts = [
            await self._evaluate_fragment(session, collection, row, part, is_filter=is_filter)
            for part in fragment.fragments
        ]
        return EvaluatedFragment(
            display_text=fragment.text(" "),
            verdict=truth,
            is_conjunction=fragment.is_conjunction,
            fragments=tuple(parts),
        )

    async def _reference_verdict(
        self, session: ExplainSession, compiled: AdmitAll | DenyAll | ReferenceQuery, row: Row
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
                    self._add_lines("sql", *sql_lines(question, compiled))
                rows = await session.fetch_rows(question)
                return rows if isinstance(rows, ConditionVerdict) else ConditionVerdict(bool(rows))

    async def _is_delivered_by_engine(
        self, session: ExplainSession, collection: Collection, row: Row
    ) -> bool:
        """Return the rule engine's verdict, which decides in the service."""
        own = self._caller.own_row
        bound = Matcher(self._collections).bind_topic(
            collection, self._topic, self._caller.principal, own
        )
        if isinstance(bound, DenyAll):
            return False
        member = _IndexMember(bound.specialization, bound.values)
        evaluation: Evaluation[int, _IndexMember] = Evaluation(MacroValues(self._now))
        evaluated: RowEvaluation[_IndexMember] = RowEvaluation(
            row, frozenset(), evaluation.macro_values
        )
        evaluation.rows[0] = evaluated
        if self._topic.record_id is None:
            index: PredicateIndex[_IndexMember] = PredicateIndex()
            index.add(member)
            evaluated.evaluate_index(index)
        else:
            evaluated.evaluate_members([member])
        await session.answer_questions(evaluation)
        return member in evaluation.hits(0)

    def _add_lines(self, label: str, *lines: str) -> None:
        self.lines += _labelled_lines(label, *lines)

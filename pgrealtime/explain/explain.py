"""``pgrealtime explain``: would this caller hear of this record on this topic, and why.

The verdict is that of the service's own engine, and must be the reference query's too. What the
parts of a rule mean is asked of Postgres likewise, each part as a rule of its own. All of it is
asked of one snapshot, read only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from pgrealtime.auth.principal import Caller, Guest, Superuser
from pgrealtime.changes import Row
from pgrealtime.cli.check.check import rely_on_policies, rule_problems
from pgrealtime.collections.build import build
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import Config
from pgrealtime.errors import (
    ConfigError,
    RuleError,
)
from pgrealtime.explain.caller import Who, introduced
from pgrealtime.explain.session import Asking, snapshot
from pgrealtime.explain.text import (
    NOTE,
    Truth,
    Weighed,
    decided_by,
    disagreement,
    lines_of,
    named,
    printable,
    refusal_lines,
    row_lines,
    rule_lines,
    sql_lines,
    topic_lines,
)
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.protocol.topic import Topic, parse_topic
from pgrealtime.rules.engine.evaluation import Case, Deciding
from pgrealtime.rules.engine.formula import Facts
from pgrealtime.rules.engine.index import Index
from pgrealtime.rules.engine.plan import Variant, moment
from pgrealtime.rules.language.parameters import Scalar
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.language.resolve import filter_text, resolve_filter
from pgrealtime.rules.sql.breakdown import Clause, Piece, asked, split
from pgrealtime.rules.sql.reference import Everyone, Nobody, Reference, auth_collection, reference
from pgrealtime.service.build import catalog_of, query_pool
from pgrealtime.spelling import nearest


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found out."""

    is_delivered: bool
    lines: tuple[str, ...]
    """For people and their terminals; the last one is the verdict."""


async def explain(
    config: Config, who: Who, topic: str, record_id: str | None, *, with_sql: bool = False
) -> Explanation:
    """Judge a record as it is now.

    Args:
        config: Of the service.
        who: The subscriber.
        topic: As submitted, with its options.
        record_id: Of the record; None if the topic names it.
        with_sql: Tell the statements too, without the values of hidden fields.

    Raises:
        ConfigError: The service wouldn't start with this configuration.
        DatabaseUnreachableError: Nobody answers.
        AuthError: Code ``user_unknown``: there is no such user.
        SetupError: A table can't be read.
    """
    # A person waits here, not a service for its database.
    database = config.database.model_copy(update={"wait_for": 0.0})
    async with query_pool(database) as pool:
        collections = build(config.collections, await catalog_of(config, pool))
        if problems := tuple(rule_problems(collections)):
            raise ConfigError(problems)
        with suppress(psycopg.Error):  # said where the record is read
            await rely_on_policies(pool, collections)
        caller, lines = await introduced(config, collections, pool, who)
        told = parse_topic(topic)
        about = told.record_id if record_id is None else record_id
        judging = _Judging(collections, caller, told, with_sql=with_sql)
        judging.lines = list(_entry("who", *lines))
        if isinstance(caller.principal, Guest) and not config.auth.allow_guests:
            reason = "guests may not subscribe here (auth.allow_guests)"
        else:
            async with snapshot(pool) as asking:
                reason = await judging.judge(asking, about or "")
    verdict = f"not delivered: {reason}" if reason else "delivered"
    return Explanation(not reason, tuple(map(printable, (*judging.lines, verdict))))


def _entry(label: str, *lines: str) -> Iterator[str]:
    for n, line in enumerate(lines):
        yield f"{'' if n else label:<10}{line}"


@dataclass(frozen=True, eq=False)
class _Member:
    """The subscriber as the index has it."""

    variant: Variant
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class _Said:
    """What the rule or the filter says, by its parts."""

    truth: Truth
    reason: str = ""
    """Why it doesn't admit the row."""


def _said(weighed: Weighed, what: str = "") -> _Said:
    admits = weighed.truth.value
    return _Said(weighed.truth, "" if admits else what + named(decided_by(weighed)))


class _Judging:
    """One caller, one topic, one record.

    Attributes:
        lines: What was found out so far.
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
        self._request = Request(
            principal=caller.principal, query=topic.query, headers=topic.headers
        )

    async def judge(self, asking: Asking, record_id: str) -> str:
        """Return why the caller doesn't hear of the record; empty if it does."""
        topic = self._topic
        collection = self._collections.find(topic.collection)
        if collection is None:
            return self._no_collection()
        self._say("topic", *topic_lines(topic, collection))
        row = await asking.row(collection, record_id)
        if row is None:
            self._say("record", f'there is no row whose {collection.key.name} is "{record_id}" now')
            return f'"{collection.name}" has no record "{record_id}"'
        found_id = row[collection.key.name]
        if topic.record_id not in {None, found_id}:
            self._say("record", f"{collection.name}/{found_id}")
            return f'the topic is about "{topic.record_id}", the record is "{found_id}"'
        return await self._weigh(asking, collection, row)

    def _no_collection(self) -> str:
        name = self._topic.collection
        meant = nearest(name, self._collections)
        self._say(
            "topic",
            f'there is no collection "{name}"' + (f'; perhaps "{meant}"' if meant else ""),
            "such a subscription is accepted and stays silent, as in PocketBase",
        )
        return "the topic names nothing"

    async def _weigh(self, asking: Asking, collection: Collection, row: Row) -> str:
        """Ask everybody who has a say."""
        is_whole = self._topic.record_id is None
        key = "list_rule" if is_whole else "view_rule"
        rule = collection.list_rule if is_whole else collection.view_rule
        made = reference(self._collections, collection, rule, self._request)
        self._say("record", *row_lines(collection, row, made))
        by_parts = [
            await self._rule(asking, collection, row, key, rule),
            await self._filter(asking, collection, row),
        ]
        plain = await self._plain(asking, made, row)
        engine = await self._engine(asking, collection, row)
        self._say("note", NOTE)
        said = [plain, Truth(engine), *(part.truth for part in by_parts if part.truth.fault)]
        parts = all(part.truth.value for part in by_parts)
        if not any(one.fault for one in said) and {bool(plain.value), parts} != {engine}:
            self._say("BUG", *disagreement(plain=bool(plain.value), engine=engine, parts=parts))
        if engine:
            return ""
        return "; ".join(p.reason for p in by_parts if p.reason) or plain.fault or "see BUG above"

    async def _rule(
        self, asking: Asking, collection: Collection, row: Row, key: str, rule: str | None
    ) -> _Said:
        """Weigh the collection's rule."""
        passes = isinstance(self._caller.principal, Superuser)
        self._say(key, *rule_lines(rule, is_superuser=passes))
        if passes or rule == "":
            return _Said(Truth(True))
        if rule is None:
            return _Said(Truth(False), f"{key} is missing: superusers only")
        weighed = await self._part(asking, collection, row, split(rule), is_filter=False)
        self.lines += lines_of(weighed, "  ")
        return _said(weighed)

    async def _filter(self, asking: Asking, collection: Collection, row: Row) -> _Said:
        """Weigh the client's filter."""
        text = self._topic.query.get("filter", "")
        if not text:
            return _Said(Truth(True))
        self._say("filter", *text.splitlines())
        is_superuser = isinstance(self._caller.principal, Superuser)
        auth = auth_collection(self._collections, self._request)
        try:
            filter_text(self._topic.query, is_superuser=is_superuser)
            resolve_filter(text, self._collections, collection, auth, is_superuser=is_superuser)
        except RuleError as error:
            self.lines += refusal_lines(text, error)
            return _Said(Truth(False), f"the filter is refused: {error.message}")
        weighed = await self._part(asking, collection, row, split(text), is_filter=True)
        self.lines += lines_of(weighed, "  ")
        return _said(weighed, "the filter: ")

    async def _part(
        self, asking: Asking, collection: Collection, row: Row, piece: Piece, *, is_filter: bool
    ) -> Weighed:
        """Ask what a part is by itself, and what it is made of."""
        sides: tuple[tuple[str, str], ...] = ()
        try:
            made = asked(
                piece,
                self._collections,
                collection,
                request=self._request,
                row=row,
                now=self._now,
                is_filter=is_filter,
            )
        except RuleError as error:
            truth = Truth(None, f"can't be used by this caller: {error.message}")
        else:
            truth = await asking.truth(made.reference.truth(row, self._now))
            sides = tuple([(side.text, await asking.told(side)) for side in made.sides])
        if isinstance(piece, Clause):
            return Weighed(text=piece.text, truth=truth, sides=sides)
        parts = [
            await self._part(asking, collection, row, part, is_filter=is_filter)
            for part in piece.parts
        ]
        return Weighed(text=piece.text, truth=truth, is_all=piece.is_all, parts=tuple(parts))

    async def _plain(self, asking: Asking, made: Everyone | Nobody | Reference, row: Row) -> Truth:
        """Return what the reference query says to rule and filter."""
        match made:
            case Everyone():
                return Truth(True)
            case Nobody():
                return Truth(False)
            case Reference():
                question = made.question([row], self._now)
                if self._with_sql:
                    self._say("sql", *sql_lines(question, made))
                found = await asking.rows(question)
                return found if isinstance(found, Truth) else Truth(bool(found))

    async def _engine(self, asking: Asking, collection: Collection, row: Row) -> bool:
        """Return what the service does."""
        own = self._caller.own_row
        bound = Matcher(self._collections).bind(
            collection, self._topic, self._caller.principal, own
        )
        if isinstance(bound, Nobody):
            return False
        at, member = moment(self._now), _Member(bound.variant, bound.values)
        case: Case[_Member] = Case(Facts(row, frozenset(), at))
        if self._topic.record_id is None:
            index: Index[_Member] = Index()
            index.add(member)
            case.search(index)
        else:
            case.consider([member])
        deciding = Deciding([case], at)
        while inquiries := deciding.inquiries():
            for inquiry in inquiries:
                await asking.put(inquiry)
            deciding.resume()
        return member in case.hits

    def _say(self, label: str, *lines: str) -> None:
        self.lines += _entry(label, *lines)

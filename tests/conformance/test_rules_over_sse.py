"""The running service sends its subscribers what PocketBase was recorded to send.

Rules are replaced under connections that stay open. For every rule each subscriber of its cases is
connected at once, with a topic per case; then every record is updated, and the event of a row that
every connection receives marks the end.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import jwt
import psycopg
import pytest
from psycopg import sql

from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.service.build import RunningService, run_service
from tests.config_values import parse_config
from tests.conformance.http_client import Address
from tests.conformance.rules_corpus import CORPUS, Case, Report, cases, configured, expected
from tests.e2e.listener import Listener, listener

OTHER = os.environ.get("PGREALTIME_RULES_CORPUS")
"""Another folder with a ``cases.json`` over the same data."""

REFUSED: frozenset[str] = frozenset()
"""Cases whose rules may be refused although PocketBase decides them: none."""

SECRETS = {name: f"a secret of thirty-two bytes or more: {name}" for name in ("users", "staff")}
SENTINEL = "sentinels/*"
DEADLINE = 30.0

Rules: TypeAlias = Mapping[str, str | None]
"""Rules by collection; the others are readable by every caller."""


@dataclass(frozen=True, slots=True)
class Round:
    """Rules that are in force together, and the cases that they decide."""

    rules: Rules
    asked: Sequence[Case]


def rounds(asked: Sequence[Case]) -> Iterator[Round]:
    """Group the cases that can be evaluated at once: one rule per collection.

    Cases that define the rules of other collections have rounds of their own.
    """
    alone: defaultdict[str, list[Case]] = defaultdict(list)
    by_rule: defaultdict[str, defaultdict[str | None, list[Case]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for case in asked:
        if "others" in case:
            alone[json.dumps([case["collection"], case["rule"], case["others"]])].append(case)
        else:
            by_rule[case["collection"]][case["rule"]].append(case)
    for group in alone.values():
        first = group[0]
        yield Round({**first["others"], first["collection"]: first["rule"]}, group)
    for groups in zip_longest(*(per_rule.values() for per_rule in by_rule.values())):
        together = [group for group in groups if group is not None]
        rules = {group[0]["collection"]: group[0]["rule"] for group in together}
        yield Round(rules, [case for group in together for case in group])


def topic(case: Case) -> str:
    """Return the case's subscription.

    Different cases have different options, so different topics.
    """
    options = {key: case[key] for key in ("query", "headers") if case[key]}
    text = quote(json.dumps(options, ensure_ascii=False))
    return f"{case['collection']}/*" + (f"?options={text}" if options else "")


TOPICS_AT_ONCE = 50
"""Topics of one connection: as many filters as may need PostgreSQL."""


@dataclass
class Subscriber:
    """The connections of all cases with one ``auth``."""

    open: Callable[[], Awaitable[Listener]]
    token: str
    listeners: list[Listener] = field(default_factory=list)
    shares: list[list[str]] = field(default_factory=list)
    """The topics of each connection, and the sentinel's."""

    async def listen(self, topics: Sequence[str]) -> None:
        names = list(dict.fromkeys(topics))
        shares = [
            [*names[first : first + TOPICS_AT_ONCE], SENTINEL]
            for first in range(0, max(1, len(names)), TOPICS_AT_ONCE)
        ]
        while len(self.listeners) < len(shares):
            self.listeners.append(await self.open())
            self.shares.append([])
        for place, one in enumerate(self.listeners):
            wanted = shares[place] if place < len(shares) else [SENTINEL]
            if wanted != self.shares[place]:
                self.shares[place] = wanted
                assert await one.subscribe(*wanted, token=self.token) == 204

    async def received(self) -> dict[str, list[str]]:
        """Return the ids of the records that came before the sentinel, by topic."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for one in self.listeners:
            async for name, record_id in self._received_by(one):
                found[name].append(record_id)
        return found

    async def _received_by(self, one: Listener) -> AsyncIterator[tuple[str, str]]:
        while True:
            messages = await one.take(1, DEADLINE)
            assert messages, "the connection ended, or a sentinel didn't come"
            if messages[0].event == SENTINEL:
                return
            data = messages[0].data
            assert data["action"] == "update"
            yield messages[0].event, data["record"]["id"]


class RunningCorpus:
    """The running service over the corpus's data, its rules, and all subscribers."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._described = json.loads((CORPUS / "schema.json").read_text(encoding="utf-8"))
        self.config = self._with_rules({})
        self.service: RunningService
        self.subscribers: dict[str, Subscriber] = {}

    def reading(self) -> ParsedConfig:
        return ParsedConfig(config=self.config, locations=ConfigLocations(source="corpus"))

    def _with_rules(self, rules: Rules) -> Config:
        collections = {one["name"]: configured(one) for one in self._described["collections"]}
        shown = {
            name: one.model_copy(
                update=dict.fromkeys(("list_rule", "view_rule"), rules.get(name, ""))
            )
            for name, one in collections.items()
        }
        whole = parse_config(
            {
                "database": {"url": self._url},
                "server": {"host": "127.0.0.1", "port": 0},
                "realtime": {"heartbeat": "1h"},
                "records": {"hidden": "pocketbase"},
                "auth": {"issuers": [_issuer(name) for name in SECRETS]},
                "collections": {"sentinels": {"table": "sentinels", "list_rule": ""}},
            }
        )
        return whole.model_copy(update={"collections": {**whole.collections, **shown}})

    async def use(self, rules: Rules) -> bool:
        """Put rules into force; return False if they are refused."""
        self.config = self._with_rules(rules)
        return await self.service.reloader.reload()


def _issuer(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "secret": SECRETS[name],
        "collection": name,
        "superuser_when": {"role": "superuser"},
    }


def token(auth: str) -> str:
    if auth == "guest":
        return ""
    collection, _, record_id = auth.partition("/")
    claims = {"sub": record_id, "exp": time.time() + 3600}
    if auth == "superuser":
        collection, claims = "users", {"role": "superuser"}
    return jwt.encode(claims, SECRETS[collection], algorithm="HS256")


@asynccontextmanager
async def open_room(database_url: str, auths: Sequence[str]) -> AsyncIterator[RunningCorpus]:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as loading:
        await loading.execute((CORPUS / "schema.sql").read_bytes())
        await loading.execute("CREATE TABLE sentinels (id text PRIMARY KEY)")
    room = RunningCorpus(database_url)
    async with AsyncExitStack() as stack:
        room.service = await stack.enter_async_context(
            run_service(room.config, read_config=room.reading)
        )
        address = Address(host="127.0.0.1", port=room.service.port)

        async def opened() -> Listener:
            return await stack.enter_async_context(listener(address))

        for auth in auths:
            room.subscribers[auth] = Subscriber(opened, token(auth))
        yield room


async def ask(
    room: RunningCorpus, connection: psycopg.AsyncConnection[Any], one: Round
) -> list[str]:
    """Evaluate all cases of a round; return what is wrong, one line each."""
    asked: defaultdict[str, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in one.asked:
        asked[case["auth"]][topic(case)].append(case)
    for auth, subscriber in room.subscribers.items():
        await subscriber.listen(list(asked[auth]))
    updated = {case["collection"] for case in one.asked}
    statement = sql.SQL(";").join(
        [
            *(sql.SQL("UPDATE {} SET id = id").format(sql.Identifier(c)) for c in sorted(updated)),
            sql.SQL("INSERT INTO sentinels VALUES (gen_random_uuid()::text)"),
        ]
    )
    await connection.execute(statement)
    wrong = []
    for auth, subscriber in room.subscribers.items():
        received = await subscriber.received()
        for name, group in asked[auth].items():
            got = tuple(sorted(received[name]))
            wrong += [
                f"{case['id']} {case['rule']!r} as {auth} wanted {expected(case)}, got {got}"
                for case in group
                if got != expected(case)
            ]
        assert received.keys() <= asked[auth].keys()
    return wrong


@pytest.mark.timeout(600)
async def test_every_recorded_case_reaches_its_subscriber_over_sse(database_url: str) -> None:
    """Every record is updated; each subscriber receives exactly the recorded ids."""
    began = time.monotonic()
    asked = [case for case in cases(Path(OTHER) if OTHER else CORPUS) if case.get("sse")]
    auths = sorted({case["auth"] for case in asked})
    wrong: list[str] = []
    refused: list[str] = []
    async with (
        open_room(database_url, auths) as room,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection,
    ):
        for together in rounds(asked):
            if await room.use(together.rules):
                wrong += await ask(room, connection, together)
                continue
            for one in rounds_of_one(together):
                if await room.use(one.rules):
                    wrong += await ask(room, connection, one)
                else:
                    refused += [case["id"] for case in one.asked]
    right = len(asked) - len(wrong) - len(refused)
    report = Report(("",) * right, tuple(refused), tuple(wrong))
    print(f"\nrules over SSE in {time.monotonic() - began:.0f} s: {report}")  # noqa: T201 (the counts are wanted even when all is well)

    assert asked
    assert wrong == []
    assert OTHER is not None or set(refused) == REFUSED


def rounds_of_one(together: Round) -> Iterator[Round]:
    """Yield the same cases with one rule at a time, to find out which is refused."""
    for name in {case["collection"] for case in together.asked}:
        own = [case for case in together.asked if case["collection"] == name]
        others = together.rules if "others" in own[0] else {name: own[0]["rule"]}
        yield Round(others, own)

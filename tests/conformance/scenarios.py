"""Random worlds and scenarios: pure, and the same for the same seed.

A world is a schema with rules and rows; a scenario is a few connections and a sequence of actions.
The scenarios of a world run one after another on the same data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from string import ascii_lowercase
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from tests.conformance.fixtures import (
    SUPERUSERS,
    Account,
    FixtureCollection,
    FixtureField,
    FixtureRow,
    Fixtures,
    SuperuserAccount,
)
from tests.conformance.transcript import Write

BEACON = "beacon"
"""A collection that every connection receives.

Its event marks that all earlier ones were delivered.
"""

BEACON_ID = "beaconrecord001"

BOOKS = ("books0", "books1", "books2")
"""Collections of one shape, each with rules of its own."""

PEOPLE = ("anna", "ben", "cleo", "dora")

STRANGER = "evan"
"""A user that no record references, so that deleting it deletes one row and no more."""


class Ability(Enum):
    """An optional feature that a world may use."""

    AUTH_PATHS = "rules read other fields of the caller's record than the six plain ones"
    ACCOUNT_CHANGES = "records of people change and go while they listen"
    NEW_PASSWORDS = "people get new passwords while they listen"
    EXPAND = "subscriptions ask for related records"
    MANAGE_RULE = "a rule shows hidden e-mail addresses"
    CASCADES = "a rule asks about the parent that goes in the same transaction"


ALL = frozenset(Ability)

ROOT = SuperuserAccount(email="root@example.com", password="rootpass1234")

PASSWORD = "password-1"

_TEXTS = ("", "Alpha", "alpha", "beta", "Ünï", "a%b", "a_b", "100", "5", 'say "hi"', "back\\slash")
_NUMBERS = (0, 1, 2.5, -3, 100, 5)
_DATES = ("", "2020-01-01 00:00:00.000Z", "2024-02-03 04:05:06.789Z", "2090-12-31 23:59:59.999Z")
_JSON: tuple[Any, ...] = (None, 1, "a", [1, 2], {"a": 1}, {"a": "x", "b": {"c": [1, "z"]}}, True)
_PLACES = ({"lon": 0, "lat": 0}, {"lon": 12.5, "lat": -5}, {"lon": -100, "lat": 45.25})
_KINDS = ("", "news", "blog")
_TAGS = ("red", "green", "blue")
_ROLES = ("", "admin", "writer")
_RELATIONS = {
    "books0": (
        ("author", "people"),
        ("editors", "people"),
        ("team", "teams"),
        ("notes_via_book", "notes"),
        ("title", ""),
        ("nope", ""),
    ),
    "people": (
        ("teams_via_members", "teams"),
        ("books0_via_author", "books0"),
        ("books1_via_editors", "books1"),
        ("books2_via_title", ""),
        ("BOOKS0_via_author", "books0"),
        ("pbc_books100000_via_author", "books1"),
        ("role", ""),
    ),
    "teams": (("members", "people"), ("books2_via_team", "books2"), ("people_via_teams", "")),
    "notes": (("book", "books0"), ("author", "")),
}
"""Names that a path may continue with, and their targets."""
_QUERY_VALUES = ("", "alpha", "a", "5", "100", "red")


# -- actions


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """A subscribe call; ``account`` None is a guest, any other unknown name a broken token."""

    conn: str
    account: str | None
    topics: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnect:
    """The client leaves and opens a new connection, which has no subscriptions."""

    conn: str


Action: TypeAlias = Subscribe | Reconnect | Write


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Actions in order."""

    connections: tuple[str, ...]
    actions: tuple[Action, ...]


# -- rules


@dataclass(slots=True)
class RuleMaker:
    """Makes rules and filters that PocketBase accepts, over the fields of ``books``."""

    random: Random
    abilities: frozenset[Ability] = ALL
    is_filter: bool = False
    """Filters may not name ``@request``, ``@collection`` or hidden fields."""

    def rule(self, depth: int = 2) -> str:
        """A random expression with at most 2 to the ``depth`` comparisons."""
        if depth == 0 or self.random.random() < 0.35:
            return self._comparison()
        join = self.random.choice(("&&", "||", "||"))
        left, right = self.rule(depth - 1), self.rule(depth - 1)
        text = f"{left} {join} {right}"
        return f"({text})" if self.random.random() < 0.5 else text

    def _comparison(self) -> str:
        makers = list(_OWN)
        if not self.is_filter:
            makers += _FOREIGN
            makers += _AUTH_PATHS if Ability.AUTH_PATHS in self.abilities else ()
        return self.random.choice(makers)(self.random)


def _text(random: Random) -> str:
    return json.dumps(random.choice(_TEXTS), ensure_ascii=False)


def _op(random: Random, operators: str) -> str:
    return random.choice(operators.split())


_Maker: TypeAlias = Callable[[Random], str]

_OWN: tuple[_Maker, ...] = (
    lambda r: f"title {_op(r, '= != ~ !~ > <= ?= ?~')} {_text(r)}",
    lambda r: f"title:lower {_op(r, '= ~')} 'alpha'",
    lambda r: f"kind {_op(r, '= !=')} '{r.choice(_KINDS)}'",
    lambda r: f"views {_op(r, '= != > >= < <=')} {r.choice(_NUMBERS)}",
    lambda r: f"views {_op(r, '= > <')} '{r.choice(('5', 'abc', ''))}'",
    lambda r: f"active {_op(r, '= !=')} {r.choice(('true', 'false', '1'))}",
    lambda r: f"published {_op(r, '= != > <')} '{r.choice((*_DATES, '2024', '2024-02'))}'",
    lambda r: f"published {_op(r, '> < >= <=')} {r.choice(('@now', '@yearStart', '@todayEnd'))}",
    lambda r: f"tags:each {_op(r, '= != ?= ?!= ?~')} '{r.choice(_TAGS)}'",
    lambda r: f"tags:length {_op(r, '= > <')} {r.choice((0, 1, 2))}",
    lambda r: f"tags {_op(r, '~ !~')} '\"{r.choice(_TAGS)}\"'",
    lambda r: f"editors:length {_op(r, '= > <=')} {r.choice((0, 1, 2))}",
    lambda r: f"author {_op(r, '= !=')} '{r.choice(('', person_id('anna'), person_id('ben')))}'",
    lambda r: f"author.name {_op(r, '= != ~')} '{r.choice(('anna', 'Ben', 'x', ''))}'",
    lambda r: f"editors.name {_op(r, '= != ?= ?~ ?!=')} '{r.choice(('anna', 'ben', ''))}'",
    lambda r: (
        f"meta.a {_op(r, '= != > <')} {r.choice(('1', '0', chr(39) + 'x' + chr(39), 'null'))}"
    ),
    lambda r: f"meta.b.c.0 {_op(r, '= !=')} {r.choice(('1', 'null'))}",
    lambda r: f"loc.lon {_op(r, '> < =')} {r.choice((0, 12.5, -50))}",
    lambda r: f"team.open {_op(r, '= !=')} {r.choice(('true', 'false'))}",
    lambda r: f"title {_op(r, '= != ~')} kind",
)
"""Terms that a rule and a filter may contain."""

_FOREIGN: tuple[_Maker, ...] = (
    lambda r: f"author {_op(r, '= !=')} @request.auth.id",
    lambda r: f"editors.id {_op(r, '= != ?= ?!=')} @request.auth.id",
    lambda r: f"editors ~ @request.auth.id && @request.auth.id {_op(r, '!= =')} ''",
    lambda r: f"@request.auth.id {_op(r, '= !=')} ''",
    lambda r: f"@request.auth.email {_op(r, '~ =')} '{r.choice(('anna', 'example', ''))}'",
    lambda r: f"@request.auth.verified {_op(r, '= !=')} {r.choice(('true', 'false'))}",
    lambda r: f"@request.auth.collectionName {_op(r, '= !=')} 'people'",
    lambda r: f"@request.query.q {_op(r, '= != ~')} {r.choice(('title', 'kind', _text(r)))}",
    lambda r: f"@request.query.q:isset = {r.choice(('true', 'false'))}",
    lambda r: f"title {_op(r, '= ~ !~')} @request.query.q",
    lambda r: f"views {_op(r, '= > <')} @request.query.n",
    lambda r: f"@request.headers.x_key {_op(r, '= !=')} '{r.choice(_QUERY_VALUES)}'",
    lambda r: f"@request.context {_op(r, '= !=')} 'realtime'",
    lambda r: f"@request.method {_op(r, '= !=')} 'GET'",
    lambda r: f"secret {_op(r, '= !=')} 'hush'",
    lambda r: f"team.members.id {_op(r, '?= ?!=')} @request.auth.id",
    lambda r: f"@collection.teams.members.id {_op(r, '?= ?!=')} @request.auth.id",
    lambda r: f"@collection.teams.name {_op(r, '?= ?~')} {_text(r)}",
    lambda r: f"notes_via_book.text {_op(r, '= ?= ?~ !=')} {r.choice(('', _text(r))) or _text(r)}",
)
"""Terms that only a rule may contain."""

_AUTH_PATHS: tuple[_Maker, ...] = (
    lambda r: f"@request.auth.role {_op(r, '= != ~')} '{r.choice(_ROLES)}'",
    lambda r: f"@request.auth.role {_op(r, '= !=')} kind",
    lambda r: f"@request.auth.teams_via_members.name {_op(r, '?= ?~')} {_text(r)}",
)
"""Terms that read the caller's record in the database."""


# -- worlds


def person_id(name: str) -> str:
    """Return the record id of a user."""
    return f"person{name}0000000000"[:15]


def account_of(name: str) -> Account:
    """Return the account of a user or of ``root``."""
    if name == "root":
        return Account(collection=SUPERUSERS, identity=ROOT.email, password=ROOT.password)
    return Account(collection="people", identity=f"{name}@example.com", password=PASSWORD)


def _plain(name: str, **kind: Any) -> FixtureField:
    return FixtureField(name=name, **kind)


CREATED = _plain("created", type="autodate", on_create=True, hidden=True)
"""Decides the order of back relations; visible to superusers, with each server's own time."""

_BOOK_FIELDS = (
    _plain("title", type="text"),
    _plain("views", type="number"),
    _plain("active", type="bool"),
    _plain("published", type="date"),
    _plain("meta", type="json"),
    _plain("loc", type="geoPoint"),
    _plain("kind", type="select", values=_KINDS[1:]),
    _plain("tags", type="select", values=_TAGS, max_select=3),
    _plain("author", type="relation", collection_id="pbc_people00001"),
    _plain("editors", type="relation", collection_id="pbc_people00001", max_select=9),
    _plain("team", type="relation", collection_id="pbc_teams000001"),
    _plain("secret", type="text", hidden=True),
    CREATED,
)


@dataclass(slots=True)
class World:
    """Rules and rows, and the records that exist while scenarios run."""

    random: Random
    abilities: frozenset[Ability] = ALL
    fixtures: Fixtures = field(init=False)
    _books: dict[str, list[str]] = field(init=False, default_factory=dict)
    _is_stranger_there: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        collections = self._collections()
        rows = [*self._people(), *self._teams()]
        for name in BOOKS:
            self._books[name] = []
            for _ in range(4):
                data = {"id": self._new_id(), **self._book()}
                self._books[name].append(data["id"])
                rows.append(FixtureRow(collection=name, data=data))
        rows += [
            FixtureRow(
                collection="notes",
                data={"id": self._new_id(), "text": text, "book": self._books["books0"][place]},
            )
            for place, text in enumerate(("Alpha", "beta", ""))
        ]
        rows.append(FixtureRow(collection=BEACON, data={"id": BEACON_ID, "count": 0}))
        self.fixtures = Fixtures(
            superuser=ROOT,
            accounts={name: account_of(name) for name in (*PEOPLE, STRANGER, "root")},
            collections=tuple(collections),
            rows=tuple(rows),
        )

    def scenario(self, length: int = 16) -> Scenario:
        """Return the next scenario, on the data that the earlier ones left."""
        connections = tuple("ABCD"[: self.random.randint(2, 4)])
        accounts = {name: self._account() for name in connections}
        actions: list[Action] = [
            self._subscribe(conn, account) for conn, account in accounts.items()
        ]
        for _ in range(length):
            chance = self.random.random()
            conn = self.random.choice(connections)
            if chance < 0.75:
                actions.append(self._write())
            elif chance < 0.85:
                actions.append(self._subscribe(conn, self._account()))
            elif chance < 0.93:
                actions.append(self._subscribe(conn, accounts[conn]))
            else:
                accounts[conn] = self._account()
                actions += [Reconnect(conn=conn), self._subscribe(conn, accounts[conn])]
        return Scenario(connections=connections, actions=tuple(actions))

    # -- the world as it begins

    def _collections(self) -> list[FixtureCollection]:
        people = FixtureCollection(
            id="pbc_people00001",
            name="people",
            type="auth",
            list_rule=self._simple_rule("name", "id = @request.auth.id"),
            view_rule=self._simple_rule("name", "id = @request.auth.id"),
            manage_rule=self._manage_rule(),
            fields=(
                _plain("name", type="text"),
                _plain("role", type="text"),
                _plain("score", type="number"),
            ),
        )
        teams = FixtureCollection(
            id="pbc_teams000001",
            name="teams",
            type="base",
            list_rule=self._simple_rule("name", "members.id ?= @request.auth.id"),
            view_rule=self._simple_rule("name", "open = true"),
            fields=(
                _plain("name", type="text"),
                _plain("open", type="bool"),
                _plain("members", type="relation", collection_id="pbc_people00001", max_select=9),
            ),
        )
        books = [
            FixtureCollection(
                id=f"pbc_{name}000000"[:15],
                name=name,
                type="base",
                list_rule=self._rule(name),
                view_rule=self._rule(name),
                fields=_BOOK_FIELDS,
            )
            for name in BOOKS
        ]
        notes = FixtureCollection(
            id="pbc_notes000001",
            name="notes",
            type="base",
            list_rule=self.random.choice(
                ("book.active = true", "book.views > 1 || text = 'Alpha'", "book.title != ''")
                if Ability.CASCADES in self.abilities
                else ("text = 'Alpha'", "text != ''")
            ),
            view_rule="",
            fields=(
                _plain("text", type="text"),
                _plain(
                    "book", type="relation", collection_id="pbc_books000000", cascade_delete=True
                ),
                CREATED,
            ),
        )
        beacon = FixtureCollection(
            id="pbc_beacon00001",
            name=BEACON,
            type="base",
            list_rule="",
            view_rule="",
            fields=(_plain("count", type="number"),),
        )
        return [people, teams, *books, notes, beacon]

    def _simple_rule(self, name: str, own: str) -> str | None:
        rules = ["", None, own, f"{own} || {name} = 'anna'"]
        if Ability.EXPAND in self.abilities:
            rules += ["", "@request.context = 'expand'", f"@request.query.q:isset = true || {own}"]
        return self.random.choice(rules)

    def _manage_rule(self) -> str | None:
        if Ability.MANAGE_RULE not in self.abilities:
            return None
        return self.random.choice(
            (None, "@request.auth.verified = true", "@request.auth.id != id", "score > 1")
        )

    def _rule(self, collection: str) -> str | None:
        chance = self.random.random()
        if chance < 0.15:
            return "" if chance < 0.1 else None
        while True:
            rule = RuleMaker(self.random, self.abilities).rule()
            if collection == "books0" or "notes_via_book" not in rule:
                return rule

    def _people(self) -> list[FixtureRow]:
        return [
            FixtureRow(
                collection="people",
                data={
                    "id": person_id(name),
                    "email": f"{name}@example.com",
                    "emailVisibility": self.random.random() < 0.5,
                    "verified": self.random.random() < 0.5,
                    "name": name,
                    "role": self.random.choice(_ROLES),
                    "score": self.random.choice(_NUMBERS),
                    "password": PASSWORD,
                },
            )
            for name in (*PEOPLE, STRANGER)
        ]

    def _teams(self) -> list[FixtureRow]:
        return [
            FixtureRow(
                collection="teams",
                data={
                    "id": f"team{number}0000000000"[:15],
                    "name": self.random.choice(_TEXTS),
                    "open": self.random.random() < 0.5,
                    "members": self._some([person_id(name) for name in PEOPLE]),
                },
            )
            for number in range(2)
        ]

    def _book(self) -> dict[str, Any]:
        choice = self.random.choice
        return {
            "title": choice(_TEXTS),
            "views": choice(_NUMBERS),
            "active": choice((True, False)),
            "published": choice(_DATES),
            "meta": choice(_JSON),
            "loc": choice(_PLACES),
            "kind": choice(_KINDS),
            "tags": self._some(_TAGS),
            "author": choice(("", *map(person_id, PEOPLE))),
            "editors": self._some([person_id(name) for name in PEOPLE]),
            "team": choice(("", "team00000000000", "team10000000000")),
            "secret": choice(("", "hush")),
        }

    def _some(self, values: Sequence[str]) -> list[str]:
        return self.random.sample(values, self.random.randint(0, len(values)))

    def _new_id(self) -> str:
        """Return an id that reveals nothing of its time of creation."""
        return "".join(self.random.choices(ascii_lowercase, k=15))

    # -- what happens

    def _account(self) -> str | None:
        return self.random.choice((None, *PEOPLE, *PEOPLE, STRANGER, "root", "broken"))

    def _subscribe(self, conn: str, account: str | None) -> Subscribe:
        topics = {self._topic() for _ in range(self.random.randint(2, 8))}
        return Subscribe(conn=conn, account=account, topics=(f"{BEACON}/*", *sorted(topics)))

    def _topic(self) -> str:
        name = self.random.choice((*BOOKS, *BOOKS, "people", "teams", "notes"))
        collection = self.fixtures.collection(name)
        spelt = self.random.choice((name, name, collection.id))
        forms = [f"{spelt}/*", f"{spelt}/*", spelt]
        if books := self._books.get(name):
            forms.append(f"{spelt}/{self.random.choice(books)}")
        topic = self.random.choice(forms)
        options = self._options() if name in BOOKS else self._expand_options(name)
        return f"{topic}?options={quote(json.dumps(options))}" if options else topic

    def _options(self) -> dict[str, dict[str, str]]:
        query: dict[str, str] = {}
        headers: dict[str, str] = {}
        chance = self.random.random
        if chance() < 0.4:
            query["q"] = self.random.choice(_QUERY_VALUES)
        if chance() < 0.3:
            query["n"] = self.random.choice(("1", "2.5", "abc", ""))
        if chance() < 0.25:
            query["filter"] = RuleMaker(self.random, self.abilities, is_filter=True).rule(depth=1)
        if chance() < 0.15:
            query["fields"] = self.random.choice(
                ("id", "id,title", "title,meta.a", "*", "title:excerpt(3,true)", "loc,tags,nope")
            )
        if Ability.EXPAND in self.abilities and chance() < 0.25:
            query["expand"] = self._expand("books0")
            if chance() < 0.3:
                query["fields"] = self.random.choice(
                    ("id,expand", "expand.author.name,id", "*,expand.team.members.id", "title")
                )
        if chance() < 0.3:
            headers[self.random.choice(("X-Key", "xKey", "x_key"))] = self.random.choice(
                _QUERY_VALUES
            )
        return {name: part for name, part in (("query", query), ("headers", headers)) if part}

    def _expand_options(self, name: str) -> dict[str, dict[str, str]]:
        if Ability.EXPAND not in self.abilities or self.random.random() > 0.4:
            return {}
        query = {"expand": self._expand(name)}
        if self.random.random() < 0.3:
            query["q"] = "a"
        return {"query": query}

    def _expand(self, name: str) -> str:
        """Return a few paths, some of which lead nowhere."""
        paths: list[str] = []
        for _ in range(self.random.randint(1, 3)):
            at = name
            path: list[str] = []
            while at and len(path) < 4 and (not path or self.random.random() < 0.6):
                step, at = self.random.choice(_RELATIONS.get(at, _RELATIONS["books0"]))
                path.append(step)
            paths.append(".".join(path))
        return ", ".join(paths) if self.random.random() < 0.1 else ",".join(paths)

    def _write(self) -> Write:
        chance = self.random.random()
        if chance < 0.1:
            return self._team_write()
        if chance < 0.3 and Ability.ACCOUNT_CHANGES in self.abilities:
            return self._person_write()
        return self._book_write()

    def _team_write(self) -> Write:
        team = self.random.choice(self._teams()).data
        key = self.random.choice(("name", "open", "members"))
        return Write(op="update", collection="teams", id=team["id"], data={key: team[key]})

    def _person_write(self) -> Write:
        chance = self.random.random()
        if chance < 0.1 and self._is_stranger_there:
            self._is_stranger_there = False
            return Write(op="delete", collection="people", id=person_id(STRANGER))
        name = self.random.choice(PEOPLE)
        if chance < 0.2 and Ability.NEW_PASSWORDS in self.abilities:
            return Write(
                op="set_password", collection="people", id=person_id(name), password=PASSWORD
            )
        data = {
            "role": self.random.choice(_ROLES),
            "score": self.random.choice(_NUMBERS),
            "verified": self.random.random() < 0.5,
            "emailVisibility": self.random.random() < 0.5,
        }
        key = self.random.choice(sorted(data))
        return Write(op="update", collection="people", id=person_id(name), data={key: data[key]})

    def _book_write(self) -> Write:
        name = self.random.choice(BOOKS)
        there = self._books[name]
        op: Literal["create", "update", "delete"] = self.random.choice(
            ("create", "update", "update", "update", "delete")
        )
        if op == "create" or not there:
            there.append(self._new_id())
            return Write(op="create", collection=name, id=there[-1], data=self._book())
        record = self.random.choice(there)
        if op == "delete":
            there.remove(record)
            return Write(op="delete", collection=name, id=record)
        book = self._book()
        changed = self.random.sample(sorted(book), self.random.randint(0, 4))
        return Write(
            op="update", collection=name, id=record, data={key: book[key] for key in changed}
        )

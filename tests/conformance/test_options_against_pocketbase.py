"""Each option of subscriptions, for a guest, a user and a superuser: the events are PocketBase's.

Random scenarios draw combinations (``test_live_differential``); here are the special cases of
protocol 5.6 and 6.5 that random draws rarely reach.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from tests.conformance.differential import Duel, Side
from tests.conformance.fixtures import Fixtures
from tests.conformance.natural_schema import Style
from tests.conformance.pgrealtime_server import Setting, running
from tests.conformance.pocketbase_server import PocketBaseTemplate
from tests.conformance.scenarios import BEACON, Action, Scenario, Subscribe, World, person_id
from tests.conformance.transcript import Write

RULES: dict[str, dict[str, str | None]] = {
    "books0": {"list_rule": "", "view_rule": ""},
    "books1": {"list_rule": "@request.query.q = 'x' || @request.headers.x_key = 'k'"},
    "people": {
        "list_rule": "verified = true || id = @request.auth.id",
        "view_rule": "name != 'ben' || @request.auth.id != ''",
        "manage_rule": "@request.auth.name = 'anna' && @request.query.q:isset = false",
    },
    "teams": {"list_rule": None, "view_rule": "open = true || @request.query.filter ~ 'anna'"},
}

FILTERS = [
    *(
        "title = 'Alpha'",
        "title = 'alpha'",
        "title ~ 'ALPHA'",
        "",
        " ",
        "title",
        "title =",
        "1 = 1",
    ),
    *("nope = 1", "secret = 'hush'", "secret:isset = true", "id != ''", "true", "(title = 'Alpha'"),
    *("@request.auth.id = ''", "@request.context = 'realtime'", "title = '@request.'"),
    *("@collection.teams.name ?= 'x'", "title != '@collection.x'", "author.name = 'anna'"),
    *("author.email ~ 'example'", "author.email != ''", "team.name != 'x'", "team = ''"),
    *("notes_via_book.text ?= 'Alpha'", "editors:length > 0", "meta.a = 1", "loc.lon > 0"),
    *("@now > published", "title = 'Alpha' // more", "title = 'Alpha' && author.tokenKey = ''"),
    *("author.password = ''", "collectionName = 'books0'", "collectionId != ''", "expand = ''"),
    *("geoDistance(loc.lon, loc.lat, 0, 0) < 99999999", "tags:each ~ 'r'", "title ?= 'Alpha'"),
]
SORTS = ["title", "@request.auth.id", "-@collection.teams.name", "@random", "nope", "@request."]
FIELDS = [
    *(
        "",
        "id",
        "id,title",
        "*",
        "nope",
        "secret",
        "*,secret",
        "title:excerpt(2)",
        "collectionName",
    ),
    *("title:excerpt(2,true)", "title:excerpt(", "title:nope(1)", "title:excerpt(0)", "id title"),
    *("meta.a", "meta.b.c", "loc.lon", "loc", "tags", "tags.x", "expand", "record.id", "a.b.c"),
    *(" id , title ", "id,,title", ",", "id,*", "*:excerpt(1)", "title,title:excerpt(1)", "ID"),
    *("meta.*", "meta.b.*", "loc.*", "tags.*", "*.id", "**", ".title", "title.", "expand.*"),
]
EXPANDS = [
    *("author", "author,team", "team", "editors", "nope", "author.nope", " author ", "author,"),
    *("author.teams_via_members", "team.members", "notes_via_book", "books0_via_author", "title"),
    *("author.books0_via_author.author.books0_via_author.author.books0_via_author.author",),
    *("notes_via_book.book.author", "AUTHOR", ".author", "author.", "author..team", "secret"),
    *("notes_via_Book", "Notes_via_book", "pbc_notes000001_via_book", "books0_via_", "_via_author"),
    *("auth or", "\u00a0author", "author\t", "author:each", "*", "%61uthor", "id", "collectionId"),
]
OTHERS: list[dict[str, Any]] = [
    {"query": {"expand": "author", "fields": "id,expand.author.name"}},
    {"query": {"expand": "author", "fields": "expand.author.email"}},
    {"query": {"expand": "author", "q": "x"}},
    {"query": {"expand": "author", "filter": "author.name = 'anna'"}},
    {"query": {"expand": "team", "filter": "author.name = 'anna'"}},
    {"query": {"expand": "team", "filter": "author.name != ''"}},
    {"query": {"filter": "title != ''", "fields": "id"}},
    {"query": {"page": 2, "perPage": 1, "skipTotal": True}},
    {"query": None, "headers": None},
    {"query": {"filter": None}},
    {"query": {"filter": ["title = 'Alpha'"]}},
    {"query": {"fields": 1}},
    {"Query": {"filter": "title = 'Alpha'"}},
    {"headers": {"Authorization": "x"}},
    *({"query": {"filter": "title != 'zz'", "sort": sort}} for sort in SORTS),
    *({"query": {"sort": sort}} for sort in SORTS),
]
FOR_BOOKS1: list[dict[str, Any]] = [
    {"query": {"q": "x"}},
    {"query": {"q": "y"}},
    {"query": {"Q": "x"}},
    {"headers": {"X-Key": "k"}},
    {"headers": {"x key": "k"}},
    {"headers": {"xKey": "k"}},
    {"headers": {"XKey": "k"}},
    {"query": {"q": "x", "filter": "@request.query.q = 'x'"}},
    {"query": {"q": "x", "filter": "title != 'zz'", "sort": "@request.query.q"}},
]
FOR_PEOPLE: list[dict[str, Any]] = [
    {},
    {"query": {"q": "x"}},
    {"query": {"filter": "name = 'anna'"}},
    {"query": {"filter": "email ~ 'example'"}},
    {"query": {"filter": "email != ''"}},
    {"query": {"filter": "tokenKey != ''"}},
    {"query": {"filter": "password = ''"}},
    {"query": {"filter": "emailVisibility = true"}},
    {"query": {"fields": "email,emailVisibility,tokenKey,password"}},
    {"query": {"expand": "teams_via_members,books0_via_author"}},
    {"query": {"expand": "teams_via_members.members"}},
]


def _topics() -> tuple[str, ...]:
    for_books: list[dict[str, Any]] = [
        *({"query": {"filter": text}} for text in FILTERS),
        *({"query": {"fields": text}} for text in FIELDS),
        *({"query": {"expand": text}} for text in EXPANDS),
        *OTHERS,
    ]
    wanted = [
        *(("books0/*", options) for options in for_books),
        *(("books1/*", options) for options in FOR_BOOKS1),
        *((f"people/{form}", o) for form in ("*", person_id("ben")) for o in FOR_PEOPLE),
        ("teams/*", {"query": {"expand": "members"}}),
        ("teams/team00000000000", {"query": {"expand": "members"}}),
    ]
    texts = [f"{topic}?options={quote(json.dumps(options))}" for topic, options in wanted]
    return (f"{BEACON}/*", *dict.fromkeys(texts))


def _fixtures() -> Fixtures:
    fixtures = World(Random(7)).fixtures
    return msgspec.structs.replace(
        fixtures,
        collections=tuple(
            msgspec.structs.replace(one, **RULES.get(one.name, {})) for one in fixtures.collections
        ),
    )


BOOK: dict[str, Any] = {
    "title": "Alpha",
    "views": 3,
    "meta": {"a": 1, "b": {"c": [1]}},
    "loc": {"lon": 12.5, "lat": 4},
    "tags": ["red", "blue"],
    "author": person_id("ben"),
    "editors": [person_id("anna"), person_id("cleo")],
    "team": "team00000000000",
    "secret": "hush",
}


WRITTEN = "awrittenlast001"
"""Written last, since the other records reference it."""


def _writes() -> list[Action]:
    def write(op: Any, collection: str, id_: str, **data: Any) -> Write:
        return Write(op=op, collection=collection, id=id_, data=data)

    team = "team00000000000"
    ben = person_id("ben")
    return [
        write("update", "teams", team, open=True, name="T", members=[ben, person_id("anna")]),
        write("create", "books0", WRITTEN, **BOOK),
        write("update", "books0", WRITTEN, title="alpha", author=person_id("anna")),
        write("update", "books0", WRITTEN),
        write("update", "teams", team, open=False),
        write("update", "books0", WRITTEN, title="Beta"),
        write("update", "books0", WRITTEN, title="", author="", editors=[], meta=None),
        write("delete", "books0", WRITTEN),
        write("create", "books1", "writtenlast0002", **BOOK),
        write("update", "people", ben, verified=True, emailVisibility=False),
        write("update", "people", ben, emailVisibility=True),
        write("update", "people", person_id("anna"), emailVisibility=False),
    ]


FIELDS_ID = quote(json.dumps({"query": {"fields": "id"}}))

SPELLINGS = [
    *(
        "books0",
        "books0/",
        "books0/*/",
        "books0//*",
        "/books0/*",
        "books0/**",
        "*",
        "*/*",
        "/",
        "?",
    ),
    *("books0/*?", "books0?", "books0/?", "books0/*??", "books0/*#", "books0#x", "books0/%2A"),
    *("books%30/*", "BOOKS0/*", "pbc_books000000/*", "PBC_books000000/*", " books0/*", "books0/* "),
    *("books0/*\t", "books0/*\0", "books0/*?\0", "books0/*?é", "books0/*?\u2028", "books0/*?😀"),
    *("books0/*&x", "books0/*;x", "books0.*", "//books0/*", "http://x/books0/*", "\ufeffbooks0/*"),
    *(f"books0/{WRITTEN}{end}" for end in ("", "/", "?", "?x", "x", "#", "/*", "%20")),
    *(f"books0/{id_}" for id_ in (WRITTEN.upper(), WRITTEN[:-1], f" {WRITTEN}", quote("w") + "x")),
    *(f"pbc_books000000/{WRITTEN}", f"books0.{WRITTEN}", f"books0/*/{WRITTEN}", "books0/@oauth2"),
    *(f"books0/*?{before}options={FIELDS_ID}" for before in ("", "x&", "?", "a?", "%zz&", "a;b&")),
    *(f"books0/*?{before}options={FIELDS_ID}" for before in ("#", "\x7f&", " &", "\\&", '<">&')),
    *(f"books0/*?options={FIELDS_ID}{end}" for end in ("?x", "#x", "#%zz", "&%zz", ";x", "&x=]")),
    *(f"books0/*{end}?options={FIELDS_ID}" for end in ("%", "#", "%zz", ":", "\x01")),
    *(f"books0/*?{name}={FIELDS_ID}" for name in ("Options", "o%70tions", "options[]", "query")),
    *(
        f"books0/*?options={text}"
        for text in (
            *(
                "",
                "{}",
                "[]",
                "null",
                "1",
                "{",
                '{"query":{"fields":"id"}',
                '{"query":"fields=id"}',
            ),
            *(
                '{"QUERY":{"fields":"id"}}',
                '{"query":{"FIELDS":"id"}}',
                '{"query":{" fields":"id"}}',
            ),
            *(
                '{"query":{"fields":"id","fields":"title"}}',
                '{"query":{"fields":"id"},"headers":1}',
            ),
            *('{"headers":1,"query":{"fields":"id"}}', '{"x":01,"query":{"fields":"id"}}'),
            *('\ufeff{"query":{"fields":"id"}}', '{"query":{"fields":"\\u0069d"}} more'),
        )
    ),
]
"""Spellings of topics: which ones name a collection, and whose options are read."""


def _spellings() -> tuple[str, ...]:
    return (f"{BEACON}/*", *dict.fromkeys(SPELLINGS))


@pytest.mark.parametrize("topics", [_topics(), _spellings()], ids=["options", "spellings"])
async def test_every_option_does_what_it_does_in_pocketbase(
    database_url: str, tmp_path: Path, topics: tuple[str, ...]
) -> None:
    """To the byte, except for the order of picked members, which is random in PocketBase."""
    fixtures = _fixtures()
    for directory in ("template", "ours"):
        (tmp_path / directory).mkdir()
    template = await PocketBaseTemplate.build(fixtures, tmp_path / "template")
    accounts = {"A": None, "B": "anna", "C": "root", "D": "ben"}
    subscribing = [
        Subscribe(conn=conn, account=account, topics=topics) for conn, account in accounts.items()
    ]
    async with (
        template.running(tmp_path / "original") as original,
        running(
            fixtures,
            [collection.name for collection in fixtures.collections],
            database_url=database_url,
            directory=tmp_path / "ours",
            style=Style(empty="zero", json_type="json"),
            setting=Setting(),
        ) as ours,
    ):
        duel = Duel(
            await Side.of("PocketBase", original, fixtures),
            await Side.of("pgrealtime", ours, fixtures),
        )
        events = await duel.run(
            Scenario(connections=tuple(accounts), actions=(*subscribing, *_writes()))
        )

    assert events > len(topics)

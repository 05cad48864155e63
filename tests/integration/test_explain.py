"""``pgrealtime explain`` reports whether a caller receives an event, and which clause decided."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psycopg
import pytest
import yaml

from pgrealtime.auth.principal import GUEST, Superuser
from pgrealtime.errors import AuthError, ConfigError, SetupError
from pgrealtime.explain.caller import BearerToken, CallerSpec, NamedUser
from pgrealtime.explain.explain import Explanation, explain_delivery
from tests.config_values import parse_config
from tests.program import Outcome, run_program
from tests.readme import TEXT
from tests.topics import topic

_ROOT = Path(__file__).parents[2]
_SECRET = "a secret of these tests of more than thirty-two bytes"
_OWN = 'public = true || (@request.auth.id != "" && author = @request.auth.id)'
_SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, name text, role text, pin text);
CREATE TABLE posts (
  id bigint PRIMARY KEY, title text, author text REFERENCES users, public bool, views int,
  secret text, doc jsonb
);
CREATE TABLE members (
  id bigint PRIMARY KEY, post bigint REFERENCES posts, person text REFERENCES users, role text
);
INSERT INTO users VALUES ('ann', 'Ann', 'editor', '4711'), ('bob', 'Bob', 'reader', '0815');
INSERT INTO posts VALUES
  (1, 'Draft', 'ann', false, 5, 'hush', '{"n": 5, "s": "5"}'),
  (2, 'News', 'bob', true, NULL, 'hush', NULL);
INSERT INTO members VALUES (1, 1, 'ann', 'owner'), (2, 1, 'bob', 'guest');
"""

ANN, BOB = NamedUser("users", "ann"), NamedUser("users", "bob")


@dataclass(frozen=True, slots=True)
class World:
    """A small application, and the configuration that serves it."""

    url: str

    def settings(
        self, rule: str | None, *, view: str | None = None, auth: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        issuer = {"name": "app", "secret": _SECRET, "superuser_when": {"role": "admin"}}
        return {
            "version": 1,
            "database": {"url": self.url, "statement_timeout": "20s"},
            "auth": {"issuers": [issuer], **(auth or {})},
            "collections": {
                "users": {"table": "users", "type": "auth", "fields": {"hide": ["pin"]}},
                "posts": {
                    "table": "posts",
                    "fields": {"hide": ["secret"]},
                    "list_rule": rule,
                    "view_rule": view,
                },
                "members": {"table": "members", "list_rule": 'role != "guest"'},
            },
        }

    async def ask(
        self,
        rule: str | None,
        caller: CallerSpec,
        topic: str = "posts/*",
        record: str | None = None,
        *,
        with_sql: bool = False,
        **settings: Any,
    ) -> Explanation:
        config = parse_config(self.settings(rule, **settings), {})
        if record is None and topic.partition("?")[0].endswith("*"):
            record = "1"
        explanation = await explain_delivery(config, caller, topic, record, with_sql=with_sql)
        assert not any(line.startswith("BUG") for line in explanation.lines), explanation.lines
        assert explanation.is_delivered is (explanation.lines[-1] == "delivered")
        return explanation

    async def verdict(
        self, rule: str | None, caller: CallerSpec, *rest: str, **settings: Any
    ) -> str:
        return (await self.ask(rule, caller, *rest, **settings)).lines[-1]


@pytest.fixture
def world(database_url: str) -> World:
    with psycopg.connect(database_url) as connection:
        connection.execute(_SCHEMA.encode())
    return World(database_url)


def token(
    user: str, *, lifetime: float = 3600, secret: str = _SECRET, **claims: object
) -> BearerToken:
    made = {"sub": user, "exp": time.time() + lifetime, **claims}
    return BearerToken(jwt.encode(made, secret, algorithm="HS256"))


def block(explanation: Explanation, label: str) -> list[str]:
    """Return the lines under a label, without the label and their indentation."""
    lines = dropwhile(lambda line: not line.startswith(f"{label} "), explanation.lines)
    first = next(lines, None)
    if first is None:
        return []
    below = takewhile(lambda line: line.startswith(" "), lines)
    return [line.strip() for line in (first.removeprefix(label), *below)]


def filtered(text: str) -> str:
    return topic("posts/*", filter=text)


# -- rules


async def test_the_clause_that_decided_is_named(world: World) -> None:
    explanation = await world.ask('public = false && author = "bob" && views = 5', ANN)

    assert block(explanation, "list_rule") == [
        'public = false && author = "bob" && views = 5',
        "false    all of:",
        "true     public = false",
        "public is false",
        'false    author = "bob"',
        'author is "ann"',
        "true     views = 5",
        "views is 5",
    ]
    assert explanation.lines[-1] == 'not delivered: author = "bob"'


async def test_of_alternatives_each_is_named_by_what_it_lacks(world: World) -> None:
    explanation = await world.ask(_OWN, BOB)

    assert (
        explanation.lines[-1] == "not delivered: none of: public = true; author = @request.auth.id"
    )
    assert 'author is "ann"; @request.auth.id is "bob"' in block(explanation, "list_rule")


async def test_what_is_delivered_is_shown_clause_by_clause_too(world: World) -> None:
    explanation = await world.ask(_OWN, ANN)

    assert explanation.lines[-1] == "delivered"
    assert [line.split("  ")[0] for line in block(explanation, "list_rule")[1:]] == [
        *("true", "false", "public is false"),
        *("true", "true", '@request.auth.id is "ann"'),
        *("true", 'author is "ann"; @request.auth.id is "ann"'),
    ]


async def test_a_missing_rule_is_for_superusers_and_an_empty_one_for_everyone(world: World) -> None:
    missing = await world.ask(None, ANN)
    empty = await world.ask("", GUEST)

    assert block(missing, "list_rule") == ["missing: superusers only"]
    assert missing.lines[-1] == "not delivered: list_rule is missing: superusers only"
    assert block(empty, "list_rule") == ["empty: every caller"]
    assert empty.lines[-1] == "delivered"
    assert await world.verdict(None, Superuser("")) == "delivered"
    assert await world.verdict('title = "x"', Superuser("")) == "delivered"


async def test_a_topic_of_one_record_has_the_view_rule(world: World) -> None:
    view = 'title = "Draft"'

    assert await world.verdict(None, GUEST, "posts/1", view=view) == "delivered"
    explanation = await world.ask("", GUEST, "posts/2", view=view)
    assert block(explanation, "view_rule")[0] == view
    assert explanation.lines[-1] == f"not delivered: {view}"


async def test_a_comparison_with_null_is_unknown_and_denies(world: World) -> None:
    explanation = await world.ask("views > 3", GUEST, "posts/*", "2")

    assert block(explanation, "list_rule")[1:] == ["unknown  views > 3", "views is null"]
    assert explanation.lines[-1] == "not delivered: views > 3"


async def test_any_asks_for_one_related_row_and_all_for_every_one(world: World) -> None:
    """A clause evaluated alone means what it means in its rule: any, or all, of several values."""
    people = "members_via_post.person"
    some = await world.ask(f"{people} ?= @request.auth.id", BOB)
    every = await world.ask(f"{people} = @request.auth.id", BOB)

    values = f'{people} is "ann", "bob"; @request.auth.id is "bob"'
    assert block(some, "list_rule")[1:] == [f"true     {people} ?= @request.auth.id", values]
    assert block(every, "list_rule")[1:] == [f"false    {people} = @request.auth.id", values]
    assert (some.is_delivered, every.is_delivered) == (True, False)


async def test_clauses_of_different_related_rows_are_distinguished(world: World) -> None:
    """Both clauses are true, but of no single member: bob is one, and another one is an owner."""
    rule = 'members_via_post.person ?= @request.auth.id && members_via_post.role ?= "owner"'
    explanation = await world.ask(rule, BOB)

    assert block(explanation, "list_rule")[1:] == [
        "false    all of:",
        "each is true of some related row, but no one row makes all of them true",
        "true     members_via_post.person ?= @request.auth.id",
        'members_via_post.person is "ann", "bob"; @request.auth.id is "bob"',
        'true     members_via_post.role ?= "owner"',
        'members_via_post.role is "guest", "owner"',
    ]
    assert explanation.lines[-1] == f"not delivered: {rule}"
    assert await world.verdict(rule, ANN) == "delivered"


async def test_many_values_are_cut(world: World) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute(
            "INSERT INTO members SELECT n, 1, 'ann', 'r' || n FROM generate_series(10, 30) n"
        )
    explanation = await world.ask('members_via_post.role ?= "x"', GUEST)

    (values,) = block(explanation, "list_rule")[2:]
    assert values.endswith(", and more")
    assert values.count('"') == 10


async def test_numbers_and_texts_in_json_look_different(world: World) -> None:
    explanation = await world.ask('doc.n = "5" || doc.s = 5 || doc.t != null', GUEST)

    assert block(explanation, "list_rule")[3:8:2] == ["doc.n is 5", 'doc.s is "5"', "doc.t is null"]


async def test_an_empty_relation_is_reported_as_the_row_holds_it(world: World) -> None:
    """Rules read NULL as an empty text; the report shows NULL, as the table does."""
    with psycopg.connect(world.url) as connection:
        connection.execute("UPDATE posts SET author = NULL WHERE id = 1")

    explanation = await world.ask('author = ""', GUEST)

    assert block(explanation, "list_rule")[1:] == ['true     author = ""', "author is null"]


async def test_columns_of_the_callers_own_row_are_reported(world: World) -> None:
    explanation = await world.ask('@request.auth.role = "editor"', BOB)

    assert block(explanation, "list_rule")[2] == '@request.auth.role is "reader"'
    assert explanation.lines[-1] == 'not delivered: @request.auth.role = "editor"'
    assert await world.verdict('@request.auth.role = "editor"', ANN) == "delivered"


async def test_a_clause_that_gets_no_answer_in_time_is_denied(world: World) -> None:
    """As in the service; the other clauses get their answers."""
    settings = world.settings('public = false && members_via_post.role ?= "owner"')
    settings["database"]["statement_timeout"] = "300ms"
    with psycopg.connect(world.url) as other:
        other.execute("LOCK TABLE members")
        explanation = await explain_delivery(parse_config(settings, {}), GUEST, "posts/*", "1")

    lines = block(explanation, "list_rule")
    assert lines[1].startswith("denied   all of:")
    assert lines[2].partition(": ")[2].startswith("canceling statement due to ")
    assert "true     public = false" in lines
    assert explanation.lines[-1] == 'not delivered: members_via_post.role ?= "owner"'
    assert (await explain_delivery(parse_config(settings, {}), GUEST, "posts/*", "1")).is_delivered


async def test_a_clause_that_only_some_callers_may_use_is_named(world: World) -> None:
    """A name is no relation, and for guests the path is NULL."""
    rule = 'public = false && @request.auth.name.first != "x"'
    user = await world.ask(rule, ANN)

    assert block(user, "list_rule")[1:] == [
        "denied   all of:",
        'can\'t be evaluated for this caller: field "name" is not a relation',
        "true     public = false",
        "public is false",
        'denied   @request.auth.name.first != "x"',
        'can\'t be evaluated for this caller: field "name" is not a relation',
    ]
    assert user.lines[-1] == 'not delivered: @request.auth.name.first != "x"'
    assert await world.verdict(rule, GUEST) == "delivered"


async def test_a_question_that_postgres_refuses_is_denied_and_quotes_nothing(world: World) -> None:
    """A json member with U+0000 can't be read; the values in PostgreSQL's message aren't shown."""
    with psycopg.connect(world.url) as connection:
        connection.execute("""ALTER TABLE posts ADD bad json DEFAULT '{"k": "\\u0000"}'""")
    explanation = await world.ask("public = false && bad.k = 1", GUEST)

    lines = block(explanation, "list_rule")
    assert lines[1:3] == ["denied   all of:", "SQLSTATE 22P05"]
    assert lines[-3:-1] == ["denied   bad.k = 1", "bad.k is not available (SQLSTATE 22P05)"]
    assert explanation.lines[-1] == "not delivered: bad.k = 1"


# -- callers


async def test_a_token_gives_its_user_and_expiry(world: World) -> None:
    explanation = await world.ask(_OWN, token("ann"))

    (caller,) = block(explanation, "caller")
    assert caller.startswith("users/ann (token valid until 2")
    assert caller.endswith(" UTC)")
    assert explanation.is_delivered


@pytest.mark.parametrize(
    ("bearer", "code"),
    [
        (token("ann", lifetime=-1), "token_expired"),
        (token("ann", secret="x" * 40), "token_signature"),
        (token("zoe"), "account_unknown"),
        (BearerToken("nonsense"), "token_malformed"),
    ],
    ids=["expired", "signature", "unknown", "malformed"],
)
async def test_a_refused_token_says_why_and_is_a_guest(
    world: World, bearer: BearerToken, code: str
) -> None:
    explanation = await world.ask(_OWN, bearer)

    caller, why = block(explanation, "caller")
    assert caller == "guest"
    assert why.startswith(f"the token is refused: {code}: ")
    assert not explanation.is_delivered
    assert bearer.token not in "\n".join(explanation.lines)


async def test_a_token_of_a_superuser_passes(world: World) -> None:
    explanation = await world.ask(None, token("root", role="admin"))

    assert block(explanation, "caller")[0].startswith("superuser (token valid until ")
    assert explanation.is_delivered


async def test_guests_that_may_not_subscribe_receive_nothing(world: World) -> None:
    explanation = await world.ask("", token("ann", lifetime=-1), auth={"allow_guests": False})

    assert explanation.lines[-1] == "not delivered: guests may not subscribe (auth.allow_guests)"
    assert await world.verdict("", ANN, auth={"allow_guests": False}) == "delivered"


async def test_a_user_that_is_not_there_is_an_error(world: World) -> None:
    with pytest.raises(AuthError, match='"users" has no record "zoe"'):
        await world.ask("", NamedUser("users", "zoe"))
    with pytest.raises(AuthError, match='no auth collection "people"'):
        await world.ask("", NamedUser("people", "ann"))


# -- topics and records


async def test_a_topic_that_names_nothing_is_silent(world: World) -> None:
    explanation = await world.ask("", GUEST, "post/*")

    assert block(explanation, "topic") == [
        'there is no collection "post"; perhaps "posts"',
        "such a subscription is accepted and receives nothing, as in PocketBase",
    ]
    assert explanation.lines[-1] == "not delivered: the topic names no collection"


@pytest.mark.parametrize("record", ["9", "abc", "007", "99999999999999999999", "x\0y"])
async def test_a_missing_record_is_reported(world: World, record: str) -> None:
    verdict = await world.verdict("", GUEST, "posts/*", record)

    assert verdict.startswith('not delivered: "posts" has no record ')


async def test_a_topic_of_another_record_is_reported(world: World) -> None:
    verdict = await world.verdict("", GUEST, "posts/1", "2", view="")

    assert verdict == 'not delivered: the topic is for record "1", not for "2"'


async def test_hidden_fields_decide_and_are_not_shown(world: World) -> None:
    rule = 'secret = "open" || author.pin = "1" || @request.auth.pin = "2"'
    explanation = await world.ask(rule, BOB, with_sql=True)

    assert "secret is [hidden]" in block(explanation, "record")
    assert "secret is [hidden]" in block(explanation, "list_rule")
    assert "author.pin is [hidden]" in block(explanation, "list_rule")
    assert "@request.auth.pin is [hidden]" in block(explanation, "list_rule")
    for value in ("hush", "4711", "0815"):
        assert value not in "\n".join(explanation.lines)


async def test_a_terminal_gets_no_orders_from_a_row(world: World) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute("UPDATE posts SET title = E'\\x1b[2J\\u009b1m\\u202e' WHERE id = 1")
    explanation = await world.ask('title = "x\u202e"', GUEST)

    assert all(line.isprintable() for line in explanation.lines)
    assert r'title is "\u001b[2J\x9b1m\u202e"' in block(explanation, "record")


# -- filters and options


async def test_a_filter_has_its_say_after_the_rule(world: World) -> None:
    explanation = await world.ask("", GUEST, filtered('title ~ "news" || views > 5'))

    assert block(explanation, "filter")[1:] == [
        *("false    any of:", 'false    title ~ "news"', 'title is "Draft"'),
        *("false    views > 5", "views is 5"),
    ]
    assert explanation.lines[-1] == 'not delivered: the filter: none of: title ~ "news"; views > 5'
    assert await world.verdict("", GUEST, filtered('title ~ "draf"')) == "delivered"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "incomplete expression"),
        ('secret = "hush"', 'field "secret" is hidden'),
        ('author.name = "Ann"', 'collection "users" can\'t be listed'),
        ("title = @request.auth.id", '"@request." can\'t be used in client filters'),
    ],
)
async def test_a_refused_filter_says_why(world: World, text: str, message: str) -> None:
    explanation = await world.ask("", GUEST, filtered(text))

    assert block(explanation, "filter")[1:3] == [f"refused: {message}", text.strip()]
    assert explanation.lines[-1] == f"not delivered: the filter is refused: {message}"


async def test_a_filter_sees_related_rows_by_their_list_rule(world: World) -> None:
    """Bob's membership isn't listable, so the filter doesn't find it."""
    text = 'members_via_post.person ?= "{}"'

    assert await world.verdict("", GUEST, filtered(text.format("ann"))) == "delivered"
    assert (await world.verdict("", GUEST, filtered(text.format("bob")))).startswith("not")


async def test_a_compact_filter_at_its_limit_is_taken_apart(world: World) -> None:
    """With blanks and brackets between its parts it would exceed the length limit of filters."""
    text = "||".join(["views=5&&views=6"] * 99)
    text += "||title='" + "x" * (3500 - len(text) - len("||title=''")) + "'"
    assert len(text) == 3500

    explanation = await world.ask("", GUEST, filtered(text))
    assert not any(line.startswith("denied") for line in block(explanation, "filter"))
    assert explanation.lines[-1] == (
        "not delivered: the filter: none of: views = 6; views = 6; views = 6; 97 more"
    )


async def test_the_options_are_what_rules_read(world: World) -> None:
    rule = '@request.query.key = "k" && @request.headers.x_team:isset = true'
    options = quote('{"query": {"key": "k"}, "headers": {"X-Team": "a"}}')
    explanation = await world.ask(rule, GUEST, f"posts/*?options={options}")

    assert explanation.is_delivered
    assert block(explanation, "topic")[1:] == [
        '@request.query.key is "k"',
        '@request.headers.x_team is "a"',
    ]
    assert "@request.headers.x_team:isset is true" in block(explanation, "list_rule")
    lacking = await world.ask(rule, GUEST)
    assert "@request.query.key is null" in block(lacking, "list_rule")


async def test_the_statement_is_printed_on_demand(world: World) -> None:
    explanation = await world.ask(_OWN, ANN, with_sql=True)

    assert block(explanation, "sql")[0].startswith("SELECT ")
    assert "p0 = 'ann'" in block(explanation, "sql")
    assert block(await world.ask(_OWN, ANN), "sql") == []


# -- the command


def command(file: Path, *arguments: str, given: str = "", **environ: str) -> Outcome:
    arguments = ("explain", "-c", str(file), *arguments)
    return run_program(*arguments, cwd=file.parent, given=given, **environ)


@pytest.fixture
def file(world: World, tmp_path: Path) -> Path:
    path = tmp_path / "pgrealtime.yaml"
    path.write_text(yaml.safe_dump(world.settings(_OWN, view=_OWN)))
    return path


def test_the_exit_code_distinguishes_delivered_from_not(file: Path) -> None:
    yes = command(file, "posts/*", "--record", "1", "--user", "users/ann")
    no = command(file, "posts/1", "--guest")
    by_token = command(file, "posts/1", "--token", "-", given=token("ann").token + "\n")
    filtered_out = command(file, "posts/2", "--superuser", "--filter", "views = 1")
    optioned = command(file, "posts/2", "--superuser", "--options", '{"query": {"filter": ""}}')

    assert (yes.code, yes.err, yes.out.splitlines()[-1]) == (0, "", "delivered")
    assert (no.code, no.out.splitlines()[-1][:13]) == (3, "not delivered")
    assert (by_token.code, filtered_out.code, optioned.code) == (0, 3, 0)


def test_the_transcripts_of_the_readme_are_real_ones(database_url: str) -> None:
    found = re.findall(r"\n\$ pgrealtime explain (.*)\n([^`]*)\n```\n", TEXT)
    with psycopg.connect(database_url) as connection:
        connection.execute((_ROOT / "sql" / "demo.sql").read_bytes())
    outcomes = []
    for given, _ in found:
        _, name, *arguments = shlex.split(given)
        outcomes.append(
            command(_ROOT / name, *arguments, DATABASE_URL=database_url, DEMO_SECRET=_SECRET)
        )

    event, mirror = outcomes
    assert (event.code, event.out) == (3, f"{found[0][1]}\n")
    # Of the second the last line is shown.
    assert (mirror.code, mirror.out.splitlines()[-1:]) == (0, found[1][1].splitlines()[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        ("posts/*", "--guest"),
        ("posts/1",),
        ("posts/1", "--guest", "--superuser"),
        ("posts/1", "--user", "ann"),
        ("posts/1", "--user", "users/zoe"),
        ("posts/1", "--guest", "--filter", "a = 1", "--options", "{}"),
        ("posts/1?options={}", "--guest", "--filter", "a = 1"),
    ],
    ids=["no-record", "nobody", "two", "no-id", "unknown", "both", "in-topic-too"],
)
def test_what_makes_no_question_is_a_usage_error(file: Path, arguments: tuple[str, ...]) -> None:
    outcome = command(file, *arguments)

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err


def test_an_environment_that_is_not_ready_has_its_own_codes(world: World, file: Path) -> None:
    settings = world.settings("titel = 1")
    file.write_text(yaml.safe_dump(settings))
    bad_rule = command(file, "posts/1", "--guest")
    settings["database"]["url"] = "postgresql://postgres@127.0.0.1:1/none"
    file.write_text(yaml.safe_dump(settings))
    away = command(file, "posts/1", "--guest")
    settings["database"]["url"] = "postgresql:/nonsense:secret"
    file.write_text(yaml.safe_dump(settings))
    no_url = command(file, "posts/1", "--guest")

    assert (bad_rule.code, away.code, no_url.code) == (78, 69, 78)
    assert 'perhaps you meant "title"' in bad_rule.err
    assert "secret" not in no_url.err


async def test_a_table_that_may_not_be_read_is_not_permitted(world: World) -> None:
    role = f"reader_{os.getpid()}_{time.monotonic_ns()}"
    with psycopg.connect(world.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        try:
            settings = world.settings("")
            settings["database"]["url"] = world.url.replace("postgres@", f"{role}@")
            with pytest.raises(SetupError) as refused:
                await explain_delivery(parse_config(settings, {}), GUEST, "posts/1", None)
        finally:
            connection.execute(f"DROP ROLE {role}".encode())

    assert refused.value.error_code == "select_not_granted"


async def test_a_rule_that_can_not_be_used_is_the_configurations_fault(world: World) -> None:
    with pytest.raises(ConfigError, match="titel"):
        await world.ask("titel = 1", GUEST)

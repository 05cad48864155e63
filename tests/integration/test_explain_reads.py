"""``pgrealtime explain --list`` reports whether a caller finds a record, as the service answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import psycopg
import pytest
import yaml

from pgrealtime.auth.principal import GUEST, Superuser
from pgrealtime.config.model import Config
from pgrealtime.explain.caller import CallerSpec
from pgrealtime.explain.explain import Explanation, explain_delivery, explain_read
from pgrealtime.service.build import run_service
from tests.config_values import parse_config
from tests.integration.test_explain import ANN, BOB, World, block, command
from tests.integration.test_explain import world as world  # noqa: PLC0414 (a fixture)
from tests.topics import topic

_SECRET = "a secret of these tests of more than thirty-two bytes"
_TOKENS: Mapping[str, dict[str, Any] | None] = {
    "guest": None,
    "ann": {"sub": "ann"},
    "bob": {"sub": "bob"},
    "superuser": {"sub": "root", "role": "admin"},
}
_CALLERS: Mapping[str, CallerSpec] = {
    "guest": GUEST,
    "ann": ANN,
    "bob": BOB,
    "superuser": Superuser(""),
}
_MEMBER = 'members_via_post.person ?= @request.auth.id && @request.auth.id != ""'


def settings_of(world: World, rule: str | None, **settings: Any) -> dict[str, Any]:
    made = world.settings(rule, **settings)
    made["server"] = {"host": "127.0.0.1", "port": 0}
    made["collections"]["users"] |= {"list_rule": 'role = "editor"'}
    return made


async def read(
    world: World,
    rule: str | None,
    caller: CallerSpec,
    read_topic: str = "posts/*",
    record: str | None = "1",
    *,
    view: str | None = None,
    query: Mapping[str, str] | None = None,
    with_sql: bool = False,
) -> Explanation:
    settings = settings_of(world, rule, view=view)
    asked = topic(read_topic, **query) if query else read_topic
    config = parse_config(settings, {})
    explanation = await explain_read(config, caller, asked, record, with_sql=with_sql)
    assert not any(line.startswith("BUG") for line in explanation.lines), explanation.lines
    assert explanation.is_delivered is (explanation.lines[-1] == "found")
    return explanation


# -- the service's own answers

_QUERIES: tuple[dict[str, str], ...] = (
    {},
    {"filter": 'title ~ "raf"'},
    {"filter": 'members_via_post.role ?= "owner"'},
    {"filter": 'members_via_post.role ?= "guest"', "sort": "-title"},
    {"filter": 'members_via_post.role = "owner"'},
    {"filter": 'author.name = "Bob" || views = 5'},
    {"filter": 'secret = "hush"'},
    {"filter": "author = @request.auth.id"},
    {"filter": 'title != "@collection.users"'},
    {"filter": "title = "},
    {"sort": "author.name"},
    {"sort": "title,-members_via_post.role"},
    {"sort": "secret"},
    {"sort": "nothing"},
    {"sort": "@random", "filter": "doc.n = 5 || author = 'bob'"},
    {"page": "x"},
    {"perPage": "1.5", "filter": "views > 1"},
    {"fields": "title:excerpt(x)"},
    {"skipTotal": "yes"},
)


@pytest.mark.parametrize(
    "rule",
    [
        None,
        "",
        _MEMBER,
        (
            'public = true || author = @request.auth.id || (@request.query.filter ~ "raf"'
            ' && @request.context = "default" && @request.method = "GET")'
        ),
    ],
    ids=["locked", "open", "members", "own"],
)
async def test_the_verdict_is_the_service_s_answer(world: World, rule: str | None) -> None:
    """Of every request and caller, for lists and views."""
    settings = settings_of(world, rule, view=rule)
    both_verdicts: set[tuple[bool, bool]] = set()
    async with (
        run_service(Config.model_validate(settings)) as service,
        aiohttp.ClientSession() as session,
    ):
        url = f"http://127.0.0.1:{service.port}/api/collections/posts/records"
        for name, claims in _TOKENS.items():
            token = jwt.encode({"exp": time.time() + 600, **(claims or {})}, _SECRET)
            headers = {"Authorization": token} if claims else {}
            for query in _QUERIES:
                async with session.get(url, params=query, headers=headers) as response:
                    body = await response.json()
                    listed = {item.get("id") for item in body.get("items", ())}
                for record in ("1", "2"):
                    found = await read(world, rule, _CALLERS[name], "posts/*", record, query=query)
                    assert found.is_delivered is (record in listed), (name, query, found.lines)
                if "sort" in query:
                    continue
                async with session.get(f"{url}/1", params=query, headers=headers) as response:
                    is_viewed = response.status == 200
                viewed = await read(world, rule, _CALLERS[name], "posts/1", view=rule, query=query)
                assert viewed.is_delivered is is_viewed, (name, query, viewed.lines)
                both_verdicts.add((found.is_delivered, viewed.is_delivered))
    assert len(both_verdicts) > 1


# -- why


async def test_the_clause_that_decided_is_named(world: World) -> None:
    explanation = await read(world, 'public = false && author = "bob"', ANN)

    assert explanation.lines[1] == 'read      all records of "posts", table public.posts'
    assert block(explanation, "list_rule")[-2:] == ['false    author = "bob"', 'author is "ann"']
    assert explanation.lines[-1] == 'not found: author = "bob"'


async def test_rule_and_filter_are_about_one_related_row(world: World) -> None:
    """Bob is a member and there is an owner, who is another: in realtime both are true."""
    query = {"filter": 'members_via_post.role ?= "owner"'}
    explanation = await read(world, _MEMBER, BOB, query=query)

    assert block(explanation, "list_rule")[1].startswith("true ")
    assert block(explanation, "filter")[1].startswith("true ")
    assert explanation.lines[-1] == (
        "not found: no one related row satisfies rule and filter together"
    )
    config = parse_config(settings_of(world, _MEMBER), {})
    assert (await explain_delivery(config, BOB, topic("posts/*", **query), "1")).is_delivered
    assert (await read(world, _MEMBER, ANN, query=query)).lines[-1] == "found"


async def test_a_sort_through_a_relation_removes_what_can_t_be_listed(world: World) -> None:
    """Ann is an editor, and only editors are listed."""
    assert (await read(world, "", GUEST, "posts/*", "1", query={"sort": "author.name"})).lines[
        -1
    ] == "found"
    explanation = await read(world, "", GUEST, "posts/*", "2", query={"sort": "title,-author.name"})

    assert block(explanation, "sort") == [
        "title,-author.name",
        "true     title",
        "false    -author.name",
        "a list rule of what it joins doesn't admit the related row",
    ]
    assert explanation.lines[-1] == (
        "not found: the sort: -author.name joins what the caller can't list"
    )


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ({"filter": "title = "}, "the filter is refused: incomplete expression"),
        ({"filter": 'secret = "x"'}, 'the filter is refused: field "secret" is hidden'),
        ({"sort": "secret"}, 'the sort is refused: field "secret" is hidden'),
        (
            {"filter": 'title != "@request."'},
            "only superusers can use @request. in filter and sort, even in a text",
        ),
        ({"page": "x"}, "the request is refused: a page parameter is no integer"),
        ({"fields": "title:x"}, "the request is refused: fields can't be read"),
    ],
)
async def test_a_refused_request_says_why(world: World, query: dict[str, str], reason: str) -> None:
    explanation = await read(world, "", BOB, query=query)

    assert explanation.lines[-1] == f"not found: {reason}"


async def test_a_superuser_may_use_everything_in_lists(world: World) -> None:
    """Unlike in realtime; the values of hidden fields aren't printed."""
    query = {"filter": 'secret = "hush" && members_via_post.role ?= "guest"', "sort": "secret"}
    explanation = await read(world, None, Superuser(""), with_sql=True, query=query)

    assert explanation.lines[-1] == "found"
    assert "secret is [hidden]" in block(explanation, "filter")
    assert block(explanation, "sql")[0].startswith("SELECT ")


async def test_a_view_has_the_view_rule_and_no_filter(world: World) -> None:
    view = 'title = "Draft"'
    found = await read(
        world, None, GUEST, "posts/1", None, view=view, query={"filter": "views = 0"}
    )
    missing = await read(world, "", GUEST, "posts/2", None, view=view)

    assert found.lines[-1] == "found"
    assert block(found, "filter") == []
    assert missing.lines[-1] == f"not found: {view}"
    assert (await read(world, "", GUEST, "posts/1", None)).lines[-1] == (
        "not found: view_rule is missing: superusers only"
    )


@pytest.mark.parametrize(
    ("read_topic", "record", "reason"),
    [
        ("post/*", "1", 'there is no collection "post"'),
        ("posts/*", "9", '"posts" has no record "9"'),
        ("posts/*", "x\0y", '"posts" has no record "x\\x00y"'),
        ("posts/1", "2", 'the request is for record "1", not for "2"'),
    ],
)
async def test_what_is_not_there_is_reported(
    world: World, read_topic: str, record: str, reason: str
) -> None:
    explanation = await read(world, "", GUEST, read_topic, record)

    assert explanation.lines[-1] == f"not found: {reason}"


async def test_padding_is_no_part_of_an_id(world: World) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute("CREATE TABLE codes (id char(4) PRIMARY KEY)")
        connection.execute("INSERT INTO codes VALUES ('ab')")
    settings = settings_of(world, "")
    settings["collections"]["codes"] = {"table": "codes", "view_rule": ""}
    config = parse_config(settings, {})

    assert (await explain_read(config, GUEST, "codes/ab", None)).lines[-1] == "found"
    assert (await explain_delivery(config, GUEST, "codes/ab", None)).lines[-1] == "delivered"


async def test_a_collection_s_name_has_no_case_here(world: World) -> None:
    assert (await read(world, "", GUEST, "POSTS/*")).lines[-1] == "found"


async def test_a_view_of_the_database_is_read_and_has_no_events(world: World) -> None:
    with psycopg.connect(world.url) as connection:
        connection.execute(
            "CREATE VIEW seen AS SELECT id::text, title, 'infinity'::date FROM posts"
        )
    settings = settings_of(world, "")
    settings["collections"]["seen"] = {
        "table": "seen", "id": "id", "stream": False, "list_rule": 'title = "News"'
    }  # fmt: skip
    config = parse_config(settings, {})

    assert (await explain_read(config, GUEST, "seen/*", "2")).lines[-1] == "found"
    assert not (await explain_read(config, GUEST, "seen/*", "1")).is_delivered
    assert (await explain_delivery(config, GUEST, "seen/*", "2")).lines[-1] == (
        'not delivered: "seen" can only be read (stream: false)'
    )


async def test_where_nothing_is_read_nothing_is_found(world: World) -> None:
    settings = settings_of(world, "")
    off = parse_config(settings | {"reads": {"enabled": False}}, {})
    no_guests = parse_config(settings_of(world, "", auth={"allow_guests": False}), {})

    assert (await explain_read(off, GUEST, "posts/*", "1")).lines[-1] == (
        "not found: nothing can be read (reads.enabled)"
    )
    assert (await explain_read(no_guests, GUEST, "posts/*", "1")).lines[-1] == (
        "not found: guests may not read (auth.allow_guests)"
    )


# -- the command


def test_the_exit_code_distinguishes_found_from_not(world: World, tmp_path: Path) -> None:
    file = tmp_path / "pgrealtime.yaml"
    file.write_text(yaml.safe_dump(settings_of(world, "", view="")))
    yes = command(file, "posts/*", "--record", "1", "--guest", "--list", "--sort", "author.name")
    no = command(
        file, "posts/*", "--record", "2", "--guest", "--list",
        "--filter", "views != 1", "--sort", "author.name",
    )  # fmt: skip
    view = command(file, "posts/2", "--guest", "--list")
    unsorted = command(file, "posts/2", "--guest", "--sort", "title")

    assert (yes.code, yes.err, yes.out.splitlines()[-1]) == (0, "", "found")
    assert (no.code, no.out.splitlines()[-1][:9]) == (3, "not found")
    assert (view.code, unsorted.code) == (0, 2)

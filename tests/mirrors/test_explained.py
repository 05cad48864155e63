"""``pgrealtime explain --before`` says what a mirror is told, as the service tells it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import yaml

from pgrealtime.auth.principal import GUEST
from pgrealtime.explain.caller import BearerToken, CallerSpec
from pgrealtime.explain.explain import Explanation, explain_mirror
from pgrealtime.explain.text import MIRROR_CAVEAT
from tests.attacks.reading import SECRET, bearer, configured
from tests.mirrors.scene import scene
from tests.program import Outcome, run_program
from tests.topics import topic

SCHEMA = """
CREATE TABLE tasks (
  id int PRIMARY KEY, owner_id text NOT NULL, done boolean NOT NULL, tags text[], note text
);
CREATE UNIQUE INDEX covering ON tasks (id, owner_id);
ALTER TABLE tasks REPLICA IDENTITY USING INDEX covering;
INSERT INTO tasks VALUES (1, 'ann', false, '{a}', 'x'), (2, 'bob', false, '{}', 'x');
"""
RULE = "owner = @request.auth.id"


def collections(rule: str = RULE, mirrors: str = "on_request") -> dict[str, Any]:
    fields = {"rename": {"owner_id": "owner"}}
    return {
        "tasks": {
            "table": "tasks",
            "fields": fields,
            "list_rule": rule,
            "view_rule": rule,
            "mirrors": mirrors,
        }
    }


def caller(person: str) -> CallerSpec:
    return BearerToken(bearer(person)["Authorization"]) if person else GUEST


def verdict(explanation: Explanation) -> str:
    assert not any(line.startswith("BUG") for line in explanation.lines), explanation.lines
    assert explanation.is_delivered is explanation.lines[-1].startswith("delivered: ")
    return explanation.lines[-1]


async def test_the_service_tells_mirrors_what_explain_says(database_url: str) -> None:
    """Of each update and each person: what the client was sent is what is said of it."""
    rule = 'owner = @request.auth.id && (done = false || @request.auth.id = "bob")'
    updates: list[tuple[str, dict[str, object]]] = [
        ("note = 'y'", {"note": "x"}),
        ("owner_id = 'bob'", {"owner": "ann"}),
        ("owner_id = 'ann'", {"owner_id": "bob"}),
        ("done = true", {"done": False}),
        ("owner_id = 'bob'", {"owner": "ann"}),
        ("done = false, owner_id = 'ann'", {"done": True, "owner": "bob"}),
    ]
    told: list[tuple[str, str]] = []
    said: list[tuple[str, str]] = []
    async with scene(database_url, SCHEMA, collections(rule)) as world:
        clients = {name: await world.client("tasks", name) for name in ("ann", "bob", "cid")}
        for change, before in updates:
            lengths = {name: len(client.log) for name, client in clients.items()}
            await world.write(f"UPDATE tasks SET {change} WHERE id = 1")
            await world.settle()
            for name, client in clients.items():
                told.append((name, " ".join(a for a, _ in client.log[lengths[name] :])))
                explained = await explain_mirror(
                    world.reader.config, caller(name), client.topic, "1", before
                )
                said.append((name, _action(verdict(explained))))
        lengths = {name: len(client.log) for name, client in clients.items()}
        await world.write("DELETE FROM tasks WHERE id = 1")
        await world.settle()
        for name, client in clients.items():
            told.append((name, " ".join(a for a, _ in client.log[lengths[name] :])))
            row = {"owner": "ann", "done": False}
            explained = await explain_mirror(
                world.reader.config, caller(name), client.topic, "1", row
            )
            said.append((name, _action(verdict(explained))))

    assert said == told
    assert {action for _, action in told} == {"create", "update", "delete", "resync", ""}


def _action(verdict: str) -> str:
    is_told = verdict.startswith("delivered: ")
    return verdict.removeprefix("delivered: ").partition(",")[0] if is_told else ""


UNLOGGED = "of old rows only id, owner_id is logged (pgrealtime check says what helps)"


async def test_the_verdict_names_what_decided(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
    explain = partial(_explained, database_url)

    assert await explain("ann", {"owner": "bob"}) == "delivered: create, the row enters"
    assert await explain("bob", {"note": "z"}, tags="a") == (
        f"not delivered: before: {RULE}; now: {RULE}"
    )
    assert await explain("ann", {"tags": ["b"]}, tags="a") == "delivered: update"
    assert await explain("ann", {"tags": ["b"]}, tags="b") == (
        f"delivered: resync, its client loads the list anew: {UNLOGGED}"
    )
    assert await explain("bob", {"owner": "ann", "tags": None}, record="2") == (
        "delivered: create, the row enters"
    )
    assert await explain("ann", {"owner": "ann"}, record="2") == (
        f"delivered: delete, the row leaves: {RULE}"
    )
    assert await explain("ann", {"owner": "ann"}, record="9") == (
        "delivered: delete, the row leaves: it is gone"
    )
    assert await explain("ann", {"note": "z"}, record="9") == (
        "not delivered: there is no such record now: name all of owner_id in --before"
    )
    assert await explain("ann", {"ownr": "z"}) == (
        'not delivered: "tasks" has no column "ownr"; perhaps "owner"'
    )
    assert (await explain("ann", {"done": "maybe"})).startswith(
        "not delivered: the row before can't be in the table: "
    )
    assert await explain("ann", {"id": 7}) == (
        "not delivered: an update of the id is a deletion and a new record: explain each"
    )
    assert await explain("ann", {}, mirrors="off") == (
        'not delivered: "tasks" has no mirrors (mirrors: off)'
    )
    assert await explain("ann", {}, mode="") == (
        'not delivered: the topic is no mirror: its options have no query.mode of "mirror"'
    )
    assert await explain("ann", {}, mode="", mirrors="always") == "delivered: update"


async def _explained(
    url: str,
    person: str,
    before: dict[str, object],
    *,
    record: str = "1",
    tags: str = "",
    mode: str = "mirror",
    mirrors: str = "on_request",
) -> str:
    options = {"filter": f"tags ~ '{tags}'"} if tags else {}
    text = topic("tasks/*", mode=mode, **options)
    config = configured(url, collections(mirrors=mirrors))
    return verdict(await explain_mirror(config, caller(person), text, record, before))


def test_the_command_explains_mirrors(database_url: str, tmp_path: Path) -> None:
    """With the option for a mirror in the topic, unless options are given."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
    file = tmp_path / "pgrealtime.yaml"
    settings = {
        "version": 1,
        "database": {"url": database_url},
        "auth": {"issuers": [{"name": "app", "secret": SECRET}]},
        "collections": collections(),
    }
    file.write_text(yaml.safe_dump(settings))

    def explain(*arguments: str) -> Outcome:
        return run_program("explain", "-c", str(file), *arguments, cwd=tmp_path)

    token = bearer("bob")["Authorization"]
    left = explain("tasks/1", "--token", token, "--before", '{"owner": "bob"}')
    assert (left.code, left.err) == (0, "")
    assert left.out.splitlines()[1:] == [
        'topic     the record "1" of "tasks", table public.tasks',
        '          @request.query.mode is "mirror"',
        'before    owner is "bob"',
        f"view_rule {RULE}",
        f"  true     {RULE}",
        '           owner is "bob"; @request.auth.id is "bob"',
        "record    tasks/1 exists",
        '          owner is "ann"',
        f"view_rule {RULE}",
        f"  false    {RULE}",
        '           owner is "ann"; @request.auth.id is "bob"',
        f"note      {MIRROR_CAVEAT}",
        f"delivered: delete, the row leaves: {RULE}",
    ]
    assert explain("tasks/1", "--guest", "--before", "{}").code == 3
    assert explain("tasks/1", "--guest", "--before", "[]").code == 2
    assert explain("tasks/1", "--guest", "--before", "{}", "--list").code == 2

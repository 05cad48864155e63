"""Accounts and relations by an id of several columns, as tables of many tenants have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.listener import listener
from tests.e2e.service import service, token

SCHEMA = """
CREATE TABLE users (tenant int, name text, role text, PRIMARY KEY (tenant, name));
CREATE TABLE tasks (id int PRIMARY KEY, title text, owner text);
ALTER TABLE tasks REPLICA IDENTITY FULL;
ALTER TABLE users REPLICA IDENTITY FULL;
INSERT INTO users VALUES (1, 'ann', 'boss'), (2, 'ann', 'boss'), (1, 'a/b', 'clerk');
"""
COLLECTIONS: dict[str, dict[str, Any]] = {
    "users": {
        "table": "users",
        "type": "auth",
        "list_rule": "id = @request.auth.id",
        "view_rule": "tenant = @request.auth.tenant",
    },
    "tasks": {
        "table": "tasks",
        "relations": {"owner": {"collection": "users"}},
        "list_rule": 'owner.tenant = @request.auth.tenant && owner.role = "boss"',
        "view_rule": "",
    },
}


async def test_an_account_is_known_and_pointed_to_by_its_id(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        service(database_url, tmp_path, collections=COLLECTIONS, schema=SCHEMA) as running,
        listener(running.address, "tasks/*", "users/*", token=token("1~ann")) as ann,
        aiohttp.ClientSession(headers={"Authorization": token("1~ann")}) as session,
    ):
        write = running.write
        await write.execute("INSERT INTO tasks VALUES (1, 'a', '1~ann'), (2, 'b', '2~ann')")
        await write.execute("INSERT INTO tasks VALUES (3, 'c', '1~a!2b'), (4, 'd', '1~nobody')")
        # Related rows are read as they are when the event is evaluated: wait for what follows.
        await write.execute("UPDATE users SET tenant = tenant")
        received = [(m.event, m.data["action"], m.data["record"]["id"]) for m in await ann.take(2)]
        assert received == [("tasks/*", "create", "1"), ("users/*", "update", "1~ann")]

        await write.execute("UPDATE users SET role = 'boss'")
        await write.execute("DELETE FROM tasks")
        received = [(m.event, m.data["action"], m.data["record"]["id"]) for m in await ann.take(3)]
        assert received == [
            ("users/*", "update", "1~ann"),
            ("tasks/*", "delete", "1"),
            ("tasks/*", "delete", "3"),
        ]
        await write.execute("INSERT INTO tasks VALUES (3, 'c', '1~a!2b'), (4, 'd', 'garbage')")
        url = f"{running.url}/api/collections"
        async with session.get(f"{url}/tasks/records?expand=owner") as response:
            listed = await response.json()
        (task,) = listed["items"]
        assert (task["id"], task["expand"]["owner"]["id"]) == ("3", "1~a!2b")
        path = "users/records?expand=tasks_via_owner&filter=tasks_via_owner.title ?= 'c'"
        async with session.get(f"{url}/{path}") as response:
            assert (await response.json())["items"] == []
        async with session.get(f"{url}/users/records/1~a!2b?expand=tasks_via_owner") as response:
            viewed = await response.json()
        assert [one["id"] for one in viewed["expand"]["tasks_via_owner"]] == ["3"]

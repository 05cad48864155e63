"""Failures are reported in log and metrics with what an operator needs, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import bcrypt

from tests.conformance.http_client import send
from tests.e2e.listener import listener
from tests.e2e.service import service
from tests.e2e.test_admin import admin, scrape
from tests.realtime import post_json

HASH = bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode()

SCHEMA = f"""
CREATE TABLE users (id text PRIMARY KEY, email text UNIQUE, pass text);
INSERT INTO users VALUES ('ann', 'ann@example.com', '{HASH}');
CREATE TABLE posts (id text PRIMARY KEY, title text);
ALTER TABLE posts REPLICA IDENTITY FULL;
"""

COLLECTIONS: dict[str, dict[str, Any]] = {
    "users": {
        "table": "users",
        "type": "auth",
        "login": {"identity": ["email"], "password_hash": "pass"},
        "auth_rule": "",
    },
    "posts": {"table": "posts", "list_rule": ""},
}


async def test_gaps_are_logged_with_their_tables(database_url: str, tmp_path: Path) -> None:
    sections = {"changelog": {"max_size": "100KiB"}}
    async with (
        service(
            database_url, tmp_path, sections=sections, collections=COLLECTIONS, schema=SCHEMA
        ) as running,
        listener(running.address, "posts/*", "PB_CURSOR") as guest,
    ):
        await running.write.execute("TRUNCATE posts")
        await running.write.execute(
            "INSERT INTO posts SELECT n, repeat('x', 1000) FROM generate_series(1, 500) n"
        )
        reasons: list[str] = []
        while len(reasons) < 2:
            (message,) = await guest.take(1)
            if message.event == "PB_RESYNC":
                reasons.append(message.data["reason"])
        said = running.process.logged("replication.gap")

    assert reasons == ["truncate", "too_large"]
    keys = ("level", "reason", "collections", "tables")
    assert sorted([one.get(key) for key in keys] for one in said) == [
        ["warning", "too_large", None, ["public.posts"]],
        ["warning", "truncate", ["posts"], None],
    ]


async def test_a_mute_topic_is_named_without_its_options(database_url: str, tmp_path: Path) -> None:
    """Options may contain what a client sends as headers, such as a token."""
    options = quote(json.dumps({"headers": {"authorization": "a-secret"}}))
    topics = [f"nobody/*?options={options}", "nothing/1"]
    async with (
        service(database_url, tmp_path, collections=COLLECTIONS, schema=SCHEMA) as running,
        listener(running.address, *topics),
    ):
        (said,) = running.process.logged("subscription.mute")
        output = running.process.output()

    assert (said["topics"], said["topic"]) == (2, "nobody/*")
    assert "a-secret" not in output


async def test_refused_logins_are_logged_and_counted(database_url: str, tmp_path: Path) -> None:
    """Without the input: users type passwords into the wrong field.

    Attempts beyond the limit are logged once a minute.
    """
    at, sections = admin()
    sections["auth"] = {
        "login": {"enabled": True, "secret": "s" * 40, "attempts_per_minute": 2},
        "issuers": [],
    }
    async with service(
        database_url, tmp_path, sections=sections, collections=COLLECTIONS, schema=SCHEMA
    ) as running:

        async def status(identity: str, password: str) -> int:
            body = json.dumps({"identity": identity, "password": password}).encode()
            path = "/api/collections/users/auth-with-password"
            return (await send(post_json(path, body), running.address)).head.status

        answers = [await status("ann@example.com", "right")]
        answers += [await status("hunter2@example.com", "wrong") for _ in range(6)]
        metrics = await scrape(at)
        said = running.process.logged("login.refused")
        output = running.process.output()

    assert answers == [200, 400, 400, 429, 429, 429, 429]
    assert [one["code"] for one in said] == ["login_failed", "login_failed", "login_refused"]
    assert {(one["collection"], one["address"]) for one in said} == {("users", "127.0.0.1")}
    assert "hunter2" not in output
    assert {name: value for name, value in metrics.items() if name.startswith("logins_total")} == {
        "logins_total{ok}": 1,
        "logins_total{login_failed}": 2,
        "logins_total{login_refused}": 4,
    }

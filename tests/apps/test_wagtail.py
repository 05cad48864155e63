"""Wagtail's site, as its owner would connect it: ``init``, its suggestions, and the same lists.

Its authors do 500 random things. Then a listener that saw every event has what the tables have, and
a user who keeps lists by mirrors has what a new list gives.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import yaml
from psycopg import sql
from psycopg.rows import dict_row

from tests.conformance.http_client import Address, Request, send
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import ServerProcess, free_port
from tests.e2e.listener import Listener, listener
from tests.e2e.service import environ_of, token
from tests.integration.test_init import unlocked
from tests.program import run_program
from tests.topics import topic

OPERATIONS = int(os.environ.get("PGREALTIME_TEST_OPERATIONS", "500"))
SEED = int(os.environ.get("PGREALTIME_TEST_SEED", "1"))
LAST_PATH = "/the-end"
_SITE = Path(__file__).with_name("wagtail_site.py")
_PACKAGES = Path(__file__).parents[1] / ".python" / "wagtail"
_SECONDS = 120.0

_KEY_OF = """
SELECT attname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
WHERE indrelid = %s::regclass AND indisprimary
"""

Record = dict[str, Any]


@dataclass
class Lists:
    """What a client has of each collection, by id: a list first, then what it is told."""

    address: Address
    token: str
    rows: dict[str, dict[str, Record]] = field(default_factory=lambda: defaultdict(dict))
    resyncs: Counter[str] = field(default_factory=Counter)

    async def load(self, collection: str) -> None:
        self.rows[collection] = await self.fetch(collection)

    async def fetch(self, collection: str) -> dict[str, Record]:
        path = f"/api/collections/{quote(collection)}/records?perPage=1000&skipTotal=1"
        headers = {"Authorization": self.token}
        answer = await send(Request(method="GET", path=path, headers=headers), self.address)
        body = json.loads(answer.body)
        assert answer.head.status == 200, (collection, body)
        assert len(body["items"]) < 1000, collection
        return {record["id"]: record for record in body["items"]}

    def has_last_redirect(self) -> bool:
        redirects = self.rows["wagtailredirects_redirect"].values()
        return any(redirect["old_path"] == LAST_PATH for redirect in redirects)

    async def follow(self, opened: Listener) -> None:
        """Apply what comes, to the end of the connection."""
        while True:
            for message in await opened.take(1, 3600.0):
                await self._apply(message.event.partition("/")[0], message.data)

    async def _apply(self, collection: str, data: Mapping[str, Any]) -> None:
        match data["action"]:
            case "delete":
                self.rows[collection].pop(data["record"]["id"], None)
            case "resync":
                self.resyncs[data["reason"]] += 1
                await self.load(collection)
            case _:
                self.rows[collection][data["record"]["id"]] = data["record"]


def wagtail(database_url: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, _SITE, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DATABASE_URL": database_url, "PYTHONPATH": str(_PACKAGES)},
    )
    assert done.returncode == 0, done.stderr


async def differing(database_url: str, collections: Mapping[str, Any], lists: Lists) -> list[str]:
    """Return how the records of some collections differ from the rows of their tables."""
    found: list[str] = []
    async with await psycopg.AsyncConnection.connect(database_url, row_factory=dict_row) as reading:
        for name, settings in collections.items():
            table = sql.Identifier(*settings["table"].split("."))
            cursor = await reading.execute(_KEY_OF, (table.as_string(),))
            (key,) = await cursor.fetchall()
            cursor = await reading.execute(sql.SQL("SELECT * FROM {}").format(table))
            rows = {str(row[key["attname"]]): row for row in await cursor.fetchall()}
            records = lists.rows[name]
            if rows.keys() != records.keys():
                found.append(f"{name}: ids {rows.keys() ^ records.keys()}")
            for id_ in rows.keys() & records.keys():
                found += [
                    f"{name}/{id_}.{column}: {value!r}, not {records[id_][column]!r}"
                    for column, value in rows[id_].items()
                    if column in records[id_] and not is_same(value, records[id_][column])
                ]
    return found


def is_same(value: object, in_record: object) -> bool:
    """Compare a column's value with the field of a record, where both are plain."""
    if value is None:
        return not in_record
    if isinstance(value, bool | str):
        return value == in_record
    # A key of another record is a text.
    return not isinstance(value, int) or str(value) == str(in_record)


@pytest.mark.timeout(600)
async def test_listeners_have_what_wagtail_s_tables_have(database_url: str, tmp_path: Path) -> None:
    await asyncio.to_thread(wagtail, database_url, "migrate")
    file = tmp_path / "pgrealtime.yaml"
    address = Address(host="127.0.0.1", port=free_port())
    environment = environ_of(database_url, file, address)
    made = await asyncio.to_thread(run_program, "init", cwd=tmp_path, **environment)
    assert made.code == 0, made.err
    file.write_text(with_superusers(unlocked(file.read_text(encoding="utf-8"))), encoding="utf-8")
    checked = await asyncio.to_thread(run_program, "check", cwd=tmp_path, **environment)
    assert checked.code == 0, checked.err
    collections = yaml.safe_load(file.read_text(encoding="utf-8"))["collections"]
    process = await ServerProcess.start([command(), "run"], tmp_path / "log", environment)
    try:
        await process.wait_healthy(address)
        await compare(database_url, collections, address)
    finally:
        await process.stop()


async def compare(database_url: str, collections: Mapping[str, Any], address: Address) -> None:
    """Have Wagtail's authors work while two people listen, and compare what these have."""
    names, listed = list(collections), [n for n, one in collections.items() if "list_rule" in one]
    superuser, user = token("root", role="admin"), token("1")
    everything, own = Lists(address, superuser), Lists(address, user)
    topics, mirrors = [f"{n}/*" for n in names], [topic(f"{n}/*", mode="mirror") for n in listed]
    async with (
        listener(address, *topics, token=superuser) as watching,
        listener(address, *mirrors, token=user) as mirroring,
    ):
        # The mirrors are told to load.
        for name in names:
            await everything.load(name)
        following = [
            asyncio.create_task(everything.follow(watching)),
            asyncio.create_task(own.follow(mirroring)),
        ]
        try:
            await asyncio.to_thread(wagtail, database_url, "edit", str(SEED), str(OPERATIONS))
            async with asyncio.timeout(_SECONDS):
                while not everything.has_last_redirect():
                    await asyncio.sleep(0.05)
                while [name for name in listed if await own.fetch(name) != own.rows[name]]:
                    await asyncio.sleep(0.5)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
    assert await differing(database_url, collections, everything) == []
    some = ("auth_user", "wagtailcore_page", "wagtailcore_revision")
    assert all(0 < len(own.rows[name]) < len(everything.rows[name]) for name in some)
    print(  # noqa: T201 (seen if it is run by hand)
        f"{sum(map(len, everything.rows.values()))} rows of {len(names)} tables,"
        f" {sum(map(len, own.rows.values()))} of them the user's, resyncs {own.resyncs}"
    )


def with_superusers(text: str) -> str:
    return re.sub(r"(issuers: \[\{)", r"\1superuser_when: {role: admin}, ", text)

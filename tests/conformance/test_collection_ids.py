"""Clients may subscribe by a collection's id: it is the one that PocketBase would derive."""

from __future__ import annotations

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from pgrealtime.collections.model import derive_collection_id
from tests.conformance.pocketbase_server import pocketbase_binary

_FIXED = {"_pb_users_auth_"}
"""The stock users collection has an id from before ids were derived."""


def test_collection_ids_are_derived_as_pocketbase_derives_them(tmp_path: Path) -> None:
    data = tmp_path / "pb_data"
    subprocess.run(
        [
            *(pocketbase_binary(), "superuser", "upsert", "root@example.com", "rootpass1234"),
            f"--dir={data}",
        ],
        check=True,
        timeout=60,
        capture_output=True,
    )
    with closing(sqlite3.connect(data / "data.db")) as database:
        made = database.execute("SELECT id, type, name FROM _collections").fetchall()
    derived = {(one, kind, name) for one, kind, name in made if one not in _FIXED}
    assert {kind for _, kind, _ in derived} == {"auth", "base"}
    assert derived == {(derive_collection_id(kind, name), kind, name) for _, kind, name in derived}

"""Keys that are foreign keys: one-to-one pairs, and the tables of Django's inheritance.

PocketBase shows what a unique relation points back from as one record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import yaml

from tests.e2e.listener import listener
from tests.e2e.service import service
from tests.program import run_program

SCHEMA = """
CREATE TABLE places (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE restaurants (place_ptr_id int PRIMARY KEY REFERENCES places, stars int NOT NULL);
CREATE TABLE pizzerias (restaurant_ptr_id int PRIMARY KEY REFERENCES restaurants, oven text);
CREATE TABLE settings (id int PRIMARY KEY REFERENCES places, theme text);
INSERT INTO places VALUES (1, 'Roma'), (2, 'Capri'), (3, 'Park');
INSERT INTO restaurants VALUES (1, 5), (2, 1);
INSERT INTO pizzerias VALUES (1, 'stone');
INSERT INTO settings VALUES (1, 'dark');
"""
COLLECTIONS: dict[str, dict[str, Any]] = {
    "places": {
        "table": "places",
        "list_rule": "restaurants_via_place_ptr_id.stars > 3",
        "view_rule": "",
    },
    "restaurants": {
        "table": "restaurants",
        "list_rule": 'place_ptr_id.name !~ "Capri"',
        "view_rule": "",
    },
    "pizzerias": {
        "table": "pizzerias",
        "list_rule": 'restaurant_ptr_id.place_ptr_id.settings_via_place.theme = "dark"',
        "view_rule": "",
    },
    "settings": {
        "table": "settings",
        "list_rule": "",
        "view_rule": "",
        "fields": {"rename": {"id": "place"}},
    },
}


async def test_a_key_that_is_a_foreign_key_is_a_relation_both_ways(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        service(database_url, tmp_path, collections=COLLECTIONS, schema=SCHEMA) as running,
        listener(running.address, "restaurants/*", "places/*", "pizzerias/*") as guest,
        aiohttp.ClientSession() as session,
    ):

        async def get(path: str) -> Any:
            async with session.get(f"{running.url}/api/collections/{path}") as response:
                assert response.status == 200, await response.text()
                return await response.json()

        await running.write.execute("UPDATE restaurants SET stars = stars + 1")
        await running.write.execute("UPDATE places SET name = name || '!'")
        await running.write.execute("UPDATE pizzerias SET oven = 'gas'")
        received = [(m.event, m.data["record"]) for m in await guest.take(3)]
        assert [(event, record["id"]) for event, record in received] == [
            ("restaurants/*", "1"),
            ("places/*", "1"),
            ("pizzerias/*", "1"),
        ]
        assert received[0][1]["place_ptr_id"] == "1"

        path = "pizzerias/records/1?expand=restaurant_ptr_id.place_ptr_id.settings_via_place"
        restaurant = (await get(path))["expand"]["restaurant_ptr_id"]
        place = restaurant["expand"]["place_ptr_id"]
        assert place["name"] == "Roma!"
        # One record, as each place has one row of settings at most.
        assert place["expand"]["settings_via_place"]["theme"] == "dark"
        listed = await get("places/records")
        assert [one["name"] for one in listed["items"]] == ["Roma!"]
        query = "filter=place.name ~ 'Roma'&fields=id,place"
        assert (await get(f"settings/records?{query}"))["items"] == [{"id": "1", "place": "1"}]


def test_init_names_a_key_called_id_as_the_relation_that_it_is(
    database_url: str, tmp_path: Path
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(SCHEMA.encode())
    file = tmp_path / "pgrealtime.yaml"
    made = run_program("init", "-c", str(file), DATABASE_URL=database_url)
    assert made.code == 0, made

    collections = yaml.safe_load(file.read_text())["collections"]
    assert collections["settings"]["fields"] == {"rename": {"id": "place"}}
    assert collections["restaurants"] == {"table": "public.restaurants"}
    assert run_program("check", "-c", str(file), DATABASE_URL=database_url).code == 0

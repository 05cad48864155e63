"""Schemas that others have made: each table of Pagila, Northwind and Chinook is served."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import yaml

from tests.program import run_program

SCHEMA = Path(__file__).with_name("sample_databases.sql")
SCHEMAS = ("pagila", "northwind", "chinook")


def test_each_table_is_served_or_said_in_a_line_why_not(database_url: str, tmp_path: Path) -> None:
    """Tables of pairs alone are relations of the tables that they pair."""
    with psycopg.connect(database_url) as connection:
        connection.execute(SCHEMA.read_bytes())
        names = connection.execute(
            "SELECT relnamespace::regnamespace::text || '.' || relname FROM pg_class"
            " WHERE relnamespace::regnamespace::text = ANY (%s) AND relkind IN ('r', 'p', 'v', 'm')"
            " AND NOT relispartition",
            [[*SCHEMAS]],
        ).fetchall()
    file = tmp_path / "pgrealtime.yaml"
    schemas = [option for schema in SCHEMAS for option in ("--schema", schema)]
    made = run_program("init", "-c", str(file), *schemas, DATABASE_URL=database_url)
    assert (made.code, made.err) == (0, "")
    text = file.read_text(encoding="utf-8")
    collections = yaml.safe_load(text)["collections"]
    left_out = dict(re.findall(r"#   (\S+): (.*)", text.partition("# Left out:")[2]))

    assert "Not served" not in text
    assert {one["table"] for one in collections.values()} | {*left_out} == {n for (n,) in names}
    assert left_out == {
        "pagila.rental_by_category": "a materialized view without a column id",
        "pagila.sales_by_store": "a view without a column id",
        "northwind.customer_customer_demo": "its pairs are shown as customers.customer_demo",
        "northwind.employee_territories": "its pairs are shown as employees.territories",
        "chinook.playlist_track": "its pairs are shown as playlist.track",
    }
    assert collections["payment"]["id"] == "payment_id"
    assert collections["film_actor"] == {"table": "pagila.film_actor"}
    assert collections["order_details"] == {"table": "northwind.order_details"}

    checked = run_program("check", "-c", str(file), DATABASE_URL=database_url)
    assert checked.code == 0, checked.err
    assert f"{len(collections)} collections" in checked.out

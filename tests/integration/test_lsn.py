"""LSNs read and print as Postgres's own ``pg_lsn`` type does."""

from __future__ import annotations

import random

import psycopg
import pytest
from psycopg import errors

from pgrealtime.lsn import LSN, format_lsn, parse_lsn

_EDGES = (0, 1, 0xFFFF_FFFF, 0x1_0000_0000, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def test_postgres_prints_the_same_text(database_url: str) -> None:
    """An LSN in our log can be pasted into psql, and one of psql's into our commands."""
    bits = random.Random(7)
    lsns = [LSN(n) for n in (*_EDGES, *(bits.getrandbits(bits.randint(1, 64)) for _ in range(500)))]
    with psycopg.connect(database_url) as connection:
        printed = connection.execute(
            "SELECT ('0/0'::pg_lsn + n)::text FROM unnest(%s::numeric[]) WITH ORDINALITY u (n, o)"
            " ORDER BY o",
            [list(lsns)],
        ).fetchall()
    assert [format_lsn(lsn) for lsn in lsns] == [text for (text,) in printed]
    assert [parse_lsn(text) for (text,) in printed] == lsns


@pytest.mark.parametrize(
    "text", ["", "0", "0/", "/0", "0/G", "0/100000000", " 0/0", "0/0/0", "-1/0"]
)
def test_postgres_refuses_the_same_texts(database_url: str, text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        parse_lsn(text)
    with (
        psycopg.connect(database_url) as connection,
        pytest.raises(errors.InvalidTextRepresentation),
    ):
        connection.execute("SELECT %s::pg_lsn", [text])

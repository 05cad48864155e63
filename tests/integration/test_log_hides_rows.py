"""Row values that PostgreSQL quotes in its errors don't reach the log."""

from __future__ import annotations

import psycopg
import pytest

from pgrealtime.observe.redact import describe_traceback

_SETUP = """
CREATE TABLE users (id int PRIMARY KEY, email text UNIQUE CHECK (email LIKE '%@%'));
INSERT INTO users VALUES (1, 'ann@private');
CREATE FUNCTION shout() RETURNS void LANGUAGE plpgsql AS
  $$BEGIN RAISE EXCEPTION 'no such user: ann@private'; END$$;
CREATE FUNCTION refuse() RETURNS void LANGUAGE plpgsql AS
  $$BEGIN RAISE insufficient_privilege USING MESSAGE = 'not for ann@private'; END$$;
CREATE FUNCTION own_code() RETURNS void LANGUAGE plpgsql AS
  $$BEGIN RAISE 'no such user: ann@private' USING ERRCODE = 'PT404'; END$$;
"""


@pytest.mark.parametrize(
    ("query", "sqlstate"),
    [
        ("INSERT INTO users VALUES (2, 'ann@private')", "23505"),
        ("INSERT INTO users VALUES (2, 'private')", "23514"),
        ("SELECT email::int FROM users", "22P02"),
        ("SELECT shout()", "P0001"),
        ("SELECT refuse()", "42501"),
        ("SELECT own_code()", "PT404"),
    ],
)
def test_an_error_that_quotes_a_value_is_logged_by_its_code(
    database_url: str, query: str, sqlstate: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(_SETUP)
        with pytest.raises(psycopg.Error) as raised:
            connection.execute(query.encode())
    assert "private" in str(raised.value)
    text = describe_traceback(raised.value)
    assert text.endswith(f": SQLSTATE {sqlstate}")
    assert "private" not in text


def test_an_error_that_quotes_none_keeps_its_message(database_url: str) -> None:
    with psycopg.connect(database_url) as connection, pytest.raises(psycopg.Error) as raised:
        connection.execute("SELECT * FROM nowhere")
    assert describe_traceback(raised.value).endswith(
        'psycopg.errors.UndefinedTable: SQLSTATE 42P01: relation "nowhere" does not exist'
    )

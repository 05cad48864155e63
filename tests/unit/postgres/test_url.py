"""A database URL says what libpq would make of it, and no message shows a password."""

from __future__ import annotations

import pytest

from pgrealtime.errors import SetupError
from pgrealtime.postgres.url import parse_database_url


def test_a_url_is_read_as_libpq_reads_it() -> None:
    assert parse_database_url("postgresql://me:p%40ss@one:1,two:2/app?sslmode=require") == {
        "user": "me",
        "password": "p@ss",
        "host": "one,two",
        "port": "1,2",
        "dbname": "app",
        "sslmode": "require",
    }
    assert parse_database_url("") == {}
    assert parse_database_url("host=@abstract,/run dbname=app")["host"] == "@abstract,/run"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql//me:hunter2@host/app",
        "postgresql://me:some@hunter2@host/app",
        "postgresql://me:some@hunter2@one,two/app",
        "host=x password=hunter2 5",
        "postgresql://me:hunter2@host/app?connect_timeout=5s",
    ],
    ids=["no scheme", "an at sign", "an at sign, two hosts", "no URL", "no number"],
)
def test_what_is_no_url_is_told_without_showing_it(url: str) -> None:
    """To libpq the password ends at its first "@": the rest is a host, which errors name."""
    with pytest.raises(SetupError) as caught:
        parse_database_url(url)

    assert caught.value.error_code == "database_url_invalid"
    assert "hunter2" not in str(caught.value)


def test_who_asks_for_a_session_that_may_write_means_the_primary() -> None:
    """Rules are asked in sessions that may not, so that libpq would find no server at all."""
    url = "postgresql://one,two/app?target_session_attrs={}"
    assert parse_database_url(url.format("read-write"))["target_session_attrs"] == "primary"
    assert parse_database_url(url.format("any"))["target_session_attrs"] == "any"

"""Paths are cleaned as Go's ``path.Clean`` does it, and never lead to another host."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.api.app import clean_path
from tests.conformance.http_client import Request, send
from tests.unit.api.served import served


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/", "/"),
        ("/api/realtime", "/api/realtime"),
        ("/api/realtime/", "/api/realtime/"),
        ("//", "/"),
        ("//api///realtime//", "/api/realtime/"),
        ("/api/./realtime", "/api/realtime"),
        ("/api/x/../realtime", "/api/realtime"),
        ("/api/realtime/.", "/api/realtime"),
        ("/api/realtime/x/..", "/api/realtime"),
        ("/../..", "/"),
        ("/api/%2e%2e/%2F/...", "/api/%2e%2e/%2F/..."),
    ],
)
def test_segments_that_say_nothing_go(path: str, plain: str) -> None:
    """Empty segments, "." and ".." are resolved; escaped ones are left alone."""
    assert clean_path(path) == plain


@given(st.lists(st.sampled_from(["/", ".", "..", "a", "%2F"]), max_size=12))
def test_a_plain_path_is_on_this_server_and_stays_as_it_is(pieces: list[str]) -> None:
    """A redirected client isn't redirected again, nor to another host."""
    plain = clean_path("/" + "".join(pieces))

    assert plain.startswith("/")
    assert not plain.startswith("//")
    assert clean_path(plain) == plain


async def test_base_url_with_a_slash_too_many_leads_to_the_api() -> None:
    """Clients join ``https://host/`` and ``/api/health``."""
    async with served() as service:
        first = await send(
            Request(method="GET", path="//api/health?x", headers={}), service.address
        )
        location = first.head.header("location")
        second = await send(Request(method="GET", path=str(location), headers={}), service.address)

    assert (first.head.status, location) == (307, "/api/health?x")
    assert second.head.status == 200

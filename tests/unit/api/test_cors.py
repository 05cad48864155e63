"""Which origins may read answers."""

from __future__ import annotations

import pytest

from pgrealtime.api.cors import AllowedOrigins

APP = "https://app.example"


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (["*"], APP, "*"),
        (["*"], "null", "*"),
        ([APP], APP, APP),
        ([APP], "https://app.example.evil.org", None),
        ([APP], "https://other.example", None),
        (["https://other.example", "*"], APP, "*"),
        (["https://*.example"], APP, APP),
        (["https://*.example"], "http://app.example", None),
        (["https://*.example"], "https://app.example.org", None),
        (["https://app?.example"], "https://app1.example", "https://app1.example"),
        (["https://a.p.example"], "https://axp.example", None),
        (["https://*.example"], f"https://{'a' * 300}.example", None),
        (["*.example"], "app.example", None),
        ([], APP, None),
    ],
)
def test_origin_is_allowed_by_name_or_pattern(
    origins: list[str], origin: str, allowed: str | None
) -> None:
    """Protocol 1.2; the patterns are PocketBase's."""
    assert AllowedOrigins(origins).allow_origin(origin) == allowed


def test_preflight_of_a_stranger_is_bare() -> None:
    """A browser treats the missing header as a refusal (protocol, 1.2)."""
    assert AllowedOrigins([APP]).preflight_headers("https://evil.example", "x") == [
        ("Vary", "Origin")
    ]


def test_preflight_gives_the_asked_headers_back() -> None:
    """Every requested header is allowed."""
    headers = AllowedOrigins([APP]).preflight_headers(APP, "authorization,content-type")

    assert headers == [
        ("Vary", "Origin"),
        ("Access-Control-Allow-Origin", APP),
        ("Vary", "Access-Control-Request-Method"),
        ("Vary", "Access-Control-Request-Headers"),
        ("Access-Control-Allow-Methods", "GET,HEAD,PUT,PATCH,POST,DELETE"),
        ("Access-Control-Allow-Headers", "authorization,content-type"),
    ]

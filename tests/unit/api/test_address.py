"""Which entry of X-Forwarded-For is the client's address."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from pgrealtime.api.address import address_behind_proxies

PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        ("203.0.113.7", [], "203.0.113.7"),
        ("203.0.113.7", ["1.2.3.4"], "203.0.113.7"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4", "10.0.0.2"], "1.2.3.4"),
        ("10.0.0.1", ["10.0.0.9, 10.0.0.2"], "10.0.0.9"),
        ("10.0.0.1", ["1.2.3.4:5678"], "1.2.3.4"),
        ("10.0.0.1", ["[2001:db8::1]:443"], "2001:0db8:0000:0000:0000:0000:0000:0001"),
        ("fd00::1", ["2001:db8::1"], "2001:0db8:0000:0000:0000:0000:0000:0001"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("::ffff:1.2.3.4", [], "1.2.3.4"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4,"], "10.0.0.1"),
        ("", ["1.2.3.4"], ""),
    ],
)
def test_entries_count_as_far_as_a_proxy_wrote_them(
    peer: str, forwarded_for: list[str], address: str
) -> None:
    """Entries that a client sends itself must not change its address."""
    assert address_behind_proxies(peer, forwarded_for, PROXIES) == address

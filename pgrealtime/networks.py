"""What clients are counted by where something is bounded for each."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network


def client_network(address: str) -> str:
    """Return what an address counts as: whoever has one of IPv6 has all of its /64."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address  # a Unix socket's, or one with a scope
    if isinstance(parsed, IPv6Address):
        return str(ip_network((int(parsed), 64), strict=False))
    return address
